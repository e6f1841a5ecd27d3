"""Output lengths are learned as they come, lean on wider groups at first, and never pass max_tokens."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.planner.lengths import (
    ALWAYS,
    EDGES,
    WINDOW,
    KnownLengths,
    LearnedLengths,
    LengthDistribution,
    bucket,
    stack,
)

OUTPUTS = st.lists(st.integers(1, 5000), max_size=60)
CUT = st.lists(st.integers(0, 5000), max_size=20)


def learned(outputs: list[int], cut: list[int] | None = None, class_name: str = "chat") -> LearnedLengths:
    lengths = LearnedLengths()
    for tokens in outputs:
        lengths.observe(class_name, 500, tokens)
    for tokens in cut or []:
        lengths.observe_at_least(class_name, 500, tokens)
    return lengths


@given(OUTPUTS, CUT, st.integers(1, 4000), st.integers(0, 5000), st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=150, deadline=None)
def test_quantiles_rise_and_stay_within_max_tokens(
    outputs: list[int], cut: list[int], max_tokens: int, made: int, low: float, high: float
) -> None:
    distribution = learned(outputs, cut).lengths("chat", 500, max_tokens)
    low, high = min(low, high), max(low, high)
    left = max(max_tokens - made, 0)

    assert (
        0 <= distribution.remaining_quantile(low, made) <= distribution.remaining_quantile(high, made) <= left
    )
    assert 0 <= distribution.mean_remaining(made) <= left + 1e-6


@given(OUTPUTS, CUT, st.integers(2, 4000), st.integers(0, 3999), st.floats(0.01, 0.99))
@settings(max_examples=150, deadline=None)
def test_a_quantile_is_the_least_length_that_survival_allows(
    outputs: list[int], cut: list[int], max_tokens: int, made: int, quantile: float
) -> None:
    made = made % max_tokens
    distribution = learned(outputs, cut).lengths("chat", 500, max_tokens)
    end = made + distribution.remaining_quantile(quantile, made)

    assert distribution.longer_than(end, made) <= 1 - quantile + 1e-9
    if end > made + 1:
        assert distribution.longer_than(end - 1, made) > 1 - quantile - 1e-9


@given(OUTPUTS, CUT, st.integers(1, 3000), st.integers(0, 2999))
@settings(max_examples=100, deadline=None)
def test_the_mean_remaining_is_the_sum_of_survival(
    outputs: list[int], cut: list[int], max_tokens: int, made: int
) -> None:
    made = made % max_tokens
    distribution = learned(outputs, cut).lengths("chat", 500, max_tokens)
    at = np.arange(made, max_tokens)
    survival = np.interp(at, EDGES, distribution.survival) / np.interp(made, EDGES, distribution.survival)

    assert distribution.mean_remaining(made) == pytest.approx(survival.sum())


@given(
    st.lists(
        st.tuples(OUTPUTS, st.integers(1, 4000), st.integers(0, 3000), st.integers(0, 6000)),
        min_size=1,
        max_size=5,
    )
)
@settings(max_examples=50, deadline=None)
def test_a_table_answers_as_its_distributions_do(cases: list[tuple[list[int], int, int, int]]) -> None:
    distributions = [learned(outputs).lengths("chat", 500, most) for outputs, most, _, _ in cases]
    made = np.array([min(case[2], case[1] - 1) for case in cases])
    at = made + np.array([case[3] for case in cases])
    table = stack(distributions)
    survival = (table.longer_than(at[:, None]) / table.longer_than(made[:, None]))[:, 0]

    for index, distribution in enumerate(distributions):
        assert survival[index] == pytest.approx(distribution.longer_than(int(at[index]), int(made[index])))
        expected = distribution.mean_remaining(int(made[index]))
        assert table.mean_remaining(made)[index] == pytest.approx(expected)


@given(st.integers(1, 1 << 20), st.integers(0, 1 << 20), st.floats(0.001, 1))
def test_the_oracle_is_exact(tokens: int, made: int, quantile: float) -> None:
    made = min(made, tokens - 1)
    distribution = KnownLengths().lengths("any", 10, tokens)

    assert distribution.certain
    assert distribution.mean_remaining(made) == tokens - made
    assert distribution.remaining_quantile(quantile, made) == tokens - made
    assert distribution.longer_than(tokens - 1, made) == 1.0
    assert distribution.longer_than(tokens, made) == 0.0


def test_quantiles_converge_to_a_known_distribution() -> None:
    rng = np.random.default_rng(3)
    drawn = np.maximum(np.rint(rng.lognormal(5.2, 0.7, 6000)), 1).astype(int)
    distribution = learned(drawn.tolist()).lengths("chat", 500, 4096)

    for made in (0, 100, 300):
        rest = drawn[drawn > made] - made
        assert distribution.mean_remaining(made) == pytest.approx(rest.mean(), rel=0.08)
        for quantile in (0.1, 0.5, 0.9):
            expected = np.quantile(rest, quantile)
            assert distribution.remaining_quantile(quantile, made) == pytest.approx(expected, rel=0.12, abs=2)


def test_short_outputs_are_counted_to_the_token() -> None:
    distribution = learned([3, 7] * 500).lengths("chat", 500, 100)

    assert distribution.longer_than(2) == pytest.approx(1.0, abs=0.01)
    assert distribution.longer_than(3) == pytest.approx(0.5, abs=0.05)
    assert distribution.remaining_quantile(0.9, made=3) == 4


def test_nothing_seen_means_max_tokens() -> None:
    distribution = LearnedLengths().lengths("chat", 500, 700)

    assert distribution.remaining_quantile(0.01, made=50) == 650
    assert distribution.mean_remaining(50) == 650


def test_one_that_outlived_all_seen_is_expected_to_run_to_max_tokens() -> None:
    distribution = learned([50] * 300).lengths("chat", 500, 1000)

    assert distribution.remaining_quantile(0.5, made=400) == 600


def test_a_class_with_few_samples_leans_on_all_and_with_many_on_itself() -> None:
    lengths = learned([200] * 1000, class_name="chat")
    lengths.observe("new", 500, 20)
    leaning = lengths.lengths("new", 500, 4096).mean_remaining()
    for _ in range(500):
        lengths.observe("new", 500, 20)
    own = lengths.lengths("new", 500, 4096).mean_remaining()

    assert leaning > 150
    assert own == pytest.approx(20, rel=0.2)
    assert lengths.lengths("never seen", 500, 4096).mean_remaining() > own


def test_a_bucket_of_prompts_has_lengths_of_its_own_and_leans_on_its_class() -> None:
    lengths = LearnedLengths()
    for _ in range(600):
        lengths.observe("chat", 100, 30)
        lengths.observe("chat", 3000, 400)

    assert lengths.lengths("chat", 100, 4096).remaining_quantile(0.5) == pytest.approx(30, rel=0.1)
    assert lengths.lengths("chat", 3000, 4096).remaining_quantile(0.5) == pytest.approx(400, rel=0.1)
    assert 100 < lengths.lengths("chat", 9, 4096).mean_remaining() < 300


def test_requests_cut_short_do_not_bias_what_is_learned() -> None:
    rng = np.random.default_rng(5)
    true = np.maximum(np.rint(rng.exponential(300, 4000)), 1).astype(int)
    patience = np.maximum(np.rint(rng.exponential(300, 4000)), 1).astype(int)
    lengths, as_if_ended = LearnedLengths(), LearnedLengths()
    for tokens, cut in zip(true.tolist(), patience.tolist(), strict=True):
        as_if_ended.observe("chat", 500, min(tokens, cut))
        if cut < tokens:
            lengths.observe_at_least("chat", 500, cut)
        else:
            lengths.observe("chat", 500, tokens)
    median = np.median(true)

    assert lengths.lengths("chat", 500, 8192).remaining_quantile(0.5) == pytest.approx(median, rel=0.1)
    assert as_if_ended.lengths("chat", 500, 8192).remaining_quantile(0.5) < 0.7 * median


def test_a_drift_is_followed() -> None:
    lengths = learned([100] * WINDOW)
    for _ in range(4 * WINDOW):
        lengths.observe("chat", 500, 400)

    assert lengths.lengths("chat", 500, 4096).longer_than(200) > 0.95


def test_weights_stay_finite_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coordinator.planner.lengths.RESCALE_AT", 1.5)
    often = learned([100, 200] * 2000)
    monkeypatch.undo()

    usual = learned([100, 200] * 2000).lengths("chat", 500, 4096).survival
    np.testing.assert_allclose(often.lengths("chat", 500, 4096).survival, usual, atol=1e-9)


def test_prompts_alike_are_of_one_power_of_two() -> None:
    assert bucket(512) == bucket(1023) != bucket(1024)
    assert bucket(0) == 0


@pytest.mark.parametrize("max_tokens", [0, -1, (1 << 20) + 1])
def test_an_impossible_cap_is_refused(max_tokens: int) -> None:
    with pytest.raises(ValueError, match="max_tokens"):
        LengthDistribution(ALWAYS, max_tokens)
