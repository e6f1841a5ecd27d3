"""A step-time profile: the right form, honest errors, and a file that says what is wrong with it."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.actor import start_cost
from engine.base import StepReport
from engine.cost import Piece, StepCost
from engine.cost_fit import predicted_s
from engine.errors import ConfigError
from engine.profile import StepProfile, split
from tests.engine.step_rows import made_table

ATTENTION = StepCost((Piece(10e-3, 5e-5),), per_context_token_s=2e-7, per_prefill_work_s=5e-9)


def noisy(draw: random.Random) -> float:
    return draw.gauss(1.0, 0.03)


@pytest.fixture(scope="module")
def fitted() -> StepProfile:
    return StepProfile.fit(made_table(ATTENTION, 400, noisy))


def test_a_line_is_preferred_where_a_line_is_enough() -> None:
    assert StepProfile.fit(made_table(StepCost.line(25e-3, 7e-5), 400, noisy)).family == "line"


def test_a_maximum_is_preferred_where_steps_are_one() -> None:
    bent = StepCost((Piece(20e-3, 1e-6), Piece(5e-3, 1e-4)))
    assert StepProfile.fit(made_table(bent, 400, noisy)).family == "max"


def test_attention_is_found_where_it_counts(fitted: StepProfile) -> None:
    assert fitted.family == "additive"
    assert fitted.held_out.r2 > 0.97
    assert fitted.held_out.median_error < 0.05
    assert fitted.held_out.rows == 80
    assert fitted.compared["line"].median_error > 2 * fitted.held_out.median_error
    assert len(fitted.worst) == 5


def test_held_out_rows_are_not_fitted() -> None:
    table = made_table(ATTENTION, 100)
    seen, unseen = split(table)
    assert len(unseen.rows) == 20
    assert set(seen.rows) | set(unseen.rows) == set(table.rows)
    assert not set(seen.rows) & set(unseen.rows)


def test_a_profile_survives_its_file(fitted: StepProfile, tmp_path: Path) -> None:
    fitted.save(tmp_path / "deep" / "p.json")
    assert StepProfile.load(tmp_path / "deep" / "p.json") == fitted


def test_a_loaded_cost_predicts_and_inverts(fitted: StepProfile, tmp_path: Path) -> None:
    fitted.save(tmp_path / "p.json")
    cost = StepProfile.load(tmp_path / "p.json").cost
    table = made_table(ATTENTION, 20, seed=3)
    assert predicted_s(cost, table) == pytest.approx(table.seconds, rel=0.1)
    assert cost.predict(cost.tokens_in(0.05)) <= 0.05 + 1e-9


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        (("cost", "drift"), "fast", r"\$\.cost\.drift"),
        (("cost", "pieces", 0, "base_s"), -1.0, r"base_s = -1\.0: .*\$\.cost\.pieces\[0\]"),
        (("cost", "per_seq_s"), None, r"\$\.cost\.per_seq_s"),
        (("held_out",), None, r"\$\.held_out"),
        (("version",), 2, "version is 2"),
    ],
)
def test_a_bad_field_is_named_with_its_file(
    fitted: StepProfile, tmp_path: Path, path: tuple[Any, ...], value: Any, complaint: str
) -> None:
    file = tmp_path / "p.json"
    fitted.save(file)
    content = json.loads(file.read_text(encoding="utf-8"))
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ConfigError, match=rf"p\.json: .*{complaint}"):
        StepProfile.load(file)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_what_is_no_profile_is_an_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "p.json").write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"p\.json: is "):
        StepProfile.load(tmp_path / "p.json")


def test_a_cost_from_elsewhere_is_as_slow_as_the_machine_it_is_used_on(fitted: StepProfile) -> None:
    steps = [StepReport(0.0, 100 * n, 4, 3, 500, 1e4 * n) for n in range(1, 6)]
    slow = [replace(step, seconds=2.5 * fitted.cost.of(step)) for step in steps]
    slow[0] = replace(slow[0], seconds=9.0)  # a pause
    here = fitted.cost_here(slow)
    assert here.predict(300, context_tokens=9000) == pytest.approx(
        2.5 * fitted.cost.predict(300, context_tokens=9000)
    )
    assert here.drift == 1.0
    assert fitted.cost_here([]) == fitted.cost


def test_a_node_starts_with_the_profile_that_it_is_given_and_else_with_a_line(
    fitted: StepProfile, tmp_path: Path
) -> None:
    fitted.save(tmp_path / "p.json")
    steps = [StepReport(0.0, tokens, 1, 0, 0, tokens**2 / 2) for tokens in (16, 64, 256, 1024)]
    reports = [replace(step, seconds=2 * fitted.cost.of(step)) for step in steps]
    with_profile = start_cost(reports, (tmp_path / "p.json").read_text())
    assert with_profile.per_context_token_s == pytest.approx(2 * fitted.cost.per_context_token_s)
    assert start_cost(reports, None) == StepCost.fit(reports)


def test_too_few_steps_are_refused() -> None:
    with pytest.raises(ConfigError, match="19 steps are too few"):
        StepProfile.fit(made_table(ATTENTION, 19))
