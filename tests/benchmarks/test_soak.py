"""The soak: memory that grows is told from memory that does not, and a killed process from its successor."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from benchmarks.chaos.fuzz import _told
from benchmarks.chaos.memory import LEAST_S, WARM_S, MemoryWatch
from benchmarks.chaos.soak import swings
from benchmarks.report.chaos import soak


def watched(mib_per_min: float, seconds: float = WARM_S + LEAST_S + 60, pid: int = 1) -> MemoryWatch:
    numbers, memory = random.Random(1), MemoryWatch()
    for at in range(0, int(seconds), 10):
        warming = 50.0 * min(at / WARM_S, 1.0)
        memory.note("node", pid, at, 400.0 + warming + mib_per_min * at / 60 + numbers.uniform(-1, 1))
    return memory


@pytest.mark.parametrize(("mib_per_min", "flat"), [(0.0, True), (-3.0, True), (5.0, False)])
def test_growth_is_told_from_noise_and_from_what_fills_at_the_start(mib_per_min: float, flat: bool) -> None:
    (trend,) = watched(mib_per_min).trends()
    assert trend.mib_per_min == pytest.approx(mib_per_min, abs=0.3)
    assert trend.flat is flat


def test_a_process_that_was_seen_for_too_short_has_no_slope() -> None:
    assert watched(9.0, seconds=WARM_S + LEAST_S - 30).trends() == []


def test_a_process_that_was_started_again_is_another() -> None:
    memory = MemoryWatch()
    for pid, mib in ((1, 400.0), (2, 300.0)):
        for at in range(0, int(WARM_S + LEAST_S + 60), 10):
            memory.note("node", pid, at, mib)
    assert [(trend.pid, trend.mib, trend.mib_per_min) for trend in memory.trends()] == [
        (1, 400.0, pytest.approx(0.0, abs=1e-9)),
        (2, 300.0, pytest.approx(0.0, abs=1e-9)),
    ]


def test_processes_that_are_gone_are_passed_over() -> None:
    MemoryWatch().sample({"gone": 2**22 + 1})


def test_the_report_says_what_grew_and_what_clients_saw(tmp_path: Path) -> None:
    counts = dict.fromkeys(("tokens", "turned_away", "wrong_tokens", "blocks_leaked", "processes_left"), 0)
    row = {"process": "decode-0", "minutes": 28.0, "mib": 440.0, "mib_per_min": 4.0, "flat": False}
    faults = [{"victim": "decode-1"}, {"passed_over": "no node was at the moment to be struck"}]
    file = counts | {"seconds": 1800.0, "requests": 900, "client_errors": 2, "faults": faults, "memory": [row]}
    text, memory = soak(file, tmp_path)
    assert "1 faults" in text
    assert "2 errors outside the contract" in text
    assert "| decode-0 | 28 | 440 | +4.00 | **no** |" in memory
    assert "changes of role" not in text
    alone = file | {"faults": [], "role_changes": [{"node": "decode-0"}], "swings": 0}
    assert "1 changes of role, 0 of them back again" in soak(alone, tmp_path)[0]


def test_what_schemathesis_found_is_told() -> None:
    report = {
        "test_cases": {"generated": 3158},
        "operations": {"tested": 28},
        "failures": [{"title": "Server error"}],
        "errors": [],
        "stop_reason": "max_time",
    }
    told = _told(report)
    assert (told["requests"], told["operations"], told["failures"], told["errors"]) == (3158, 28, 1, 0)


def test_a_change_that_is_undone_by_the_next_is_a_swing() -> None:
    there, back = {"before": "decode", "after": "prefill"}, {"before": "prefill", "after": "decode"}
    assert [swings(changes) for changes in ([], [there], [there, there], [there, back, there])] == [0, 0, 0, 2]
