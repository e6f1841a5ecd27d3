"""Scoring: both paces, slack from an early prefill, 5 % tolerance, and misses that count."""

from __future__ import annotations

from engine.request import Slo, StageKind
from engine.score import score

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
