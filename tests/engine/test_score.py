"""Scoring: both paces, slack from an early prefill, 5 % tolerance, and misses that count."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from engine.request import Slo, StageKind
from engine.score import ARRAYS_FROM, Score, score

SLO = Slo("chatbot", ttft_s=1.0, tpot_s=0.1)


def _paced(first_s: float, tpot_s: float, tokens: int) -> list[float]:
    return [first_s + n * tpot_s for n in range(tokens)]


def test_on_time_everywhere_is_met() -> None:
    result = score(SLO, _paced(0.9, 0.1, 50), completed=True)
    assert result.met
    assert result.strict


def test_a_late_first_token_misses_the_prefill_alone() -> None:
    result = score(SLO, _paced(1.2, 0.1, 50), completed=True)
    assert result.stages == {StageKind.PREFILL: False, StageKind.ANSWER: True}


def test_five_percent_late_is_still_met_but_not_strictly() -> None:
    result = score(SLO, _paced(1.04, 0.1, 50), completed=True)
    assert result.met
    assert not result.strict


def test_an_early_prefill_gives_slack_to_the_decode() -> None:
    slow = score(SLO, _paced(0.1, 0.115, 50), completed=True)
    without_slack = score(SLO, _paced(1.0, 0.115, 50), completed=True)
    assert slow.met
    assert not without_slack.met


def test_a_stall_between_checks_is_seen_by_the_strict_score_only() -> None:
    times_s = _paced(1.0, 0.1, 30)
    times_s[4] += 0.3
    result = score(SLO, times_s, completed=True)
    assert result.met
    assert not result.strict


def test_the_last_token_is_always_checked() -> None:
    times_s = _paced(1.0, 0.1, 13)
    times_s[-1] += 5.0
    assert not score(SLO, times_s, completed=True).met


def test_thinking_and_answer_are_scored_apart() -> None:
    slo = Slo("reasoning", ttft_s=1.0, tpot_s=0.1, thinking_tpot_s=0.05)
    late_thinking = _paced(1.0, 0.08, 20) + [1.0 + 19 * 0.08 + 0.01 * n for n in range(1, 21)]
    result = score(slo, late_thinking, completed=True, thinking_tokens=20)
    assert result.stages == {StageKind.PREFILL: True, StageKind.THINKING: False, StageKind.ANSWER: True}
    on_time = _paced(1.0, 0.05, 20) + [1.0 + 19 * 0.05 + 0.1 * n for n in range(1, 21)]
    assert score(slo, on_time, completed=True, thinking_tokens=20).met


def test_what_failed_or_said_nothing_met_nothing() -> None:
    assert not score(SLO, _paced(0.1, 0.01, 5), completed=False).met
    assert not score(SLO, [], completed=True).met


def _by_token(slo: Slo, times_s: list[float], thinking: int) -> Score:
    """The definition, one token at a time."""
    dues_s = [max(slo.ttft_s, times_s[0])]
    for n in range(2, len(times_s) + 1):
        thinks = slo.thinking_tpot_s is not None and n <= thinking
        dues_s.append(dues_s[-1] + (slo.first_pace_s if thinks else slo.tpot_s))
    kinds = [StageKind.ANSWER] if slo.thinking_tpot_s is None else [StageKind.THINKING, StageKind.ANSWER]
    stages = {StageKind.PREFILL: times_s[0] <= slo.ttft_s * 1.05}
    stages |= dict.fromkeys(kinds, True)
    for n in range(2, len(times_s) + 1):
        kind = StageKind.THINKING if len(kinds) > 1 and n <= thinking else StageKind.ANSWER
        ends = n in (thinking, len(times_s)) if len(kinds) > 1 else n == len(times_s)
        late = times_s[n - 1] > dues_s[0] + (dues_s[n - 1] - dues_s[0]) * 1.05
        if late and (n % 10 == 0 or ends):
            stages[kind] = False
    strict = times_s[0] <= slo.ttft_s and all(times_s[n] <= dues_s[n] for n in range(1, len(times_s)))
    mean_tpot_s = (times_s[-1] - times_s[0]) / max(len(times_s) - 1, 1)
    return Score(stages, strict, goodput=times_s[0] <= slo.ttft_s and mean_tpot_s <= slo.tpot_s)


SLOS = st.builds(
    Slo,
    st.just("any"),
    ttft_s=st.sampled_from((0.3, 1.0, 7.1)),
    tpot_s=st.sampled_from((0.025, 0.05, 0.1)),
    thinking_tpot_s=st.sampled_from((None, 0.01, 0.03)),
)
# Of the time that a token has: in time, at the edges of strict and of tolerated, and beyond.
SHARES = st.sampled_from((0.5, 0.999, 1.0, 1.0 + 1e-15, 1.03, 1.05, 1.05 + 1e-12, 1.06))
STALLS = st.lists(st.tuples(st.floats(0, 1), st.sampled_from((1e-9, 0.05, 1.0))), max_size=3)
LONG = ARRAYS_FROM + 22


@given(
    slo=SLOS,
    count=st.integers(1, 2 * LONG),
    first=SHARES,
    share=SHARES,
    stalls=STALLS,
    thinking=st.one_of(st.none(), st.integers(-1, 2 * LONG + 1)),
)
@example(slo=SLO, count=ARRAYS_FROM - 1, first=1.0, share=1.0, stalls=[], thinking=None)
@example(slo=SLO, count=ARRAYS_FROM, first=1.05, share=1.05, stalls=[], thinking=None)
@example(slo=SLO, count=LONG, first=0.5, share=1.05, stalls=[(0.99, 1.0)], thinking=40)
def test_lists_and_arrays_of_any_length_are_scored_by_the_definition(
    slo: Slo, count: int, first: float, share: float, stalls: list[tuple[float, float]], thinking: int | None
) -> None:
    thought = min(max(thinking or 0, 0), count)
    times_s = _at_edges(slo, count, first, share, thought)
    for where, stall_s in stalls:
        times_s[int(where * (count - 1))] += stall_s
    expected = _by_token(slo, times_s, thought)
    for given_times in (times_s, tuple(times_s), np.array(times_s)):
        got = score(slo, given_times, completed=True, thinking_tokens=thinking)
        assert got == expected
        assert {type(met) for met in (*got.stages.values(), got.strict, got.goodput)} == {bool}


def _at_edges(slo: Slo, count: int, first: float, share: float, thinking: int) -> list[float]:
    """Every token at `share` of the time that it has since the decode clock's origin, the first at `first`."""
    times_s = [slo.ttft_s * first]
    origin_s = due_s = max(slo.ttft_s, times_s[0])
    for n in range(2, count + 1):
        due_s += slo.first_pace_s if n <= thinking else slo.tpot_s
        times_s.append(origin_s + (due_s - origin_s) * share)
    return times_s


@pytest.mark.parametrize("count", [5, ARRAYS_FROM, 500])
@pytest.mark.parametrize("where", ["tenth", "last"])
def test_the_edge_of_tolerance_is_met_and_the_next_number_is_not(count: int, where: str) -> None:
    n = count if where == "last" or count < 10 else 10
    times_s = _at_edges(SLO, count, 1.0, 1.0, 0)
    times_s[n - 1] = _at_edges(SLO, count, 1.0, 1.05, 0)[n - 1]
    assert score(SLO, times_s, completed=True).met
    times_s[n - 1] = math.nextafter(times_s[n - 1], math.inf)
    assert not score(SLO, times_s, completed=True).met


def test_of_long_requests_too_the_strict_score_sees_every_token() -> None:
    times_s = _at_edges(SLO, 1000, 0.9, 1.0, 0)
    assert all(later > earlier for earlier, later in pairwise(times_s))
    assert score(SLO, times_s, completed=True).strict
    times_s[876] += 1e-6
    assert not score(SLO, times_s, completed=True).strict
    assert score(SLO, times_s, completed=True).met


def test_an_array_that_failed_or_is_empty_met_nothing() -> None:
    assert not score(SLO, np.full(200, 0.1), completed=False).met
    assert not score(SLO, np.array([]), completed=True).met
