"""Step costs fitted to tables: what was put in comes out, outliers or not."""

from __future__ import annotations

import random

import numpy as np
import pytest

from engine.cost import Piece, StepCost
from engine.cost_fit import FAMILIES, Family, fit_cost, predicted_s
from tests.engine.step_rows import made_table

BY_NAME = {family.name: family for family in FAMILIES}
# SLOs-Serve's own fits: OPT-6.7B, ToolLlama-7B, OPT-13B TP2, OPT-30B TP4 (A100), OPT-13B (H100).
PUBLISHED = [
    Piece(24.8e-3, 6.9e-5),
    Piece(27.5e-3, 6.6e-5),
    Piece(31.7e-3, 7.2e-5, 3.3e-3),
    Piece(37.9e-3, 9.3e-5, 2.8e-3),
    Piece(27.4e-3, 4.2e-5),
]
FULL = StepCost(
    (Piece(10e-3, 1e-5), Piece(5e-3, 5e-5, 1e-4)),
    per_context_token_s=2e-7,
    per_prefill_work_s=2e-9,
    per_seq_s=2e-5,
    per_prefill_kv_token_s=3e-7,
)


@pytest.mark.parametrize("piece", PUBLISHED)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_published_coefficients_are_recovered_by_every_form(piece: Piece, family: Family) -> None:
    table = made_table(StepCost((piece,)), 400)
    cost = fit_cost(table, family)
    assert predicted_s(cost, table) == pytest.approx(table.seconds, rel=1e-3)
    if family.name == "line":
        assert cost.pieces[0].base_s == pytest.approx(piece.base_s, rel=1e-6)
        assert cost.pieces[0].per_token_s == pytest.approx(piece.per_token_s, rel=1e-6)
        assert cost.pieces[0].per_draft_step_s == pytest.approx(piece.per_draft_step_s, abs=1e-9)


def test_outliers_do_not_move_the_fit() -> None:
    def one_in_ten_takes_thrice(draw: random.Random) -> float:
        return draw.gauss(1.0, 0.02) * (3.0 if draw.random() < 0.1 else 1.0)

    cost = fit_cost(made_table(StepCost((PUBLISHED[2],)), 1000, one_in_ten_takes_thrice), BY_NAME["line"])
    assert cost.pieces[0].base_s == pytest.approx(PUBLISHED[2].base_s, rel=0.04)
    assert cost.pieces[0].per_token_s == pytest.approx(PUBLISHED[2].per_token_s, rel=0.04)
    assert cost.pieces[0].per_draft_step_s == pytest.approx(PUBLISHED[2].per_draft_step_s, rel=0.1)


def test_every_term_of_a_full_cost_is_recovered() -> None:
    cost = fit_cost(made_table(FULL, 1500), BY_NAME["additive-kv"])
    assert cost.per_context_token_s == pytest.approx(FULL.per_context_token_s, rel=0.05)
    assert cost.per_prefill_work_s == pytest.approx(FULL.per_prefill_work_s, rel=0.05)
    assert cost.per_prefill_kv_token_s == pytest.approx(FULL.per_prefill_kv_token_s, rel=0.05)
    assert len(cost.pieces) == 2
    for found, put_in in zip(cost.pieces, FULL.pieces, strict=True):
        assert found.base_s == pytest.approx(put_in.base_s, rel=0.05)
        assert found.per_token_s == pytest.approx(put_in.per_token_s, rel=0.1)


def test_the_columns_are_predicted_as_single_batches_are() -> None:
    table = made_table(FULL, 50, seed=1)
    assert predicted_s(FULL, table) == pytest.approx(table.seconds, rel=1e-12)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_steps_that_fall_with_tokens_still_give_a_cost_that_can_be_inverted(family: Family) -> None:
    table = made_table(StepCost.line(10e-3, 1e-9), 60, lambda draw: draw.uniform(0.5, 2.0))
    cost = fit_cost(table, family)
    assert np.isfinite(predicted_s(cost, table)).all()
    assert cost.tokens_in(1.0) > 0
