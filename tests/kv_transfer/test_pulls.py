"""The ledger: every pull ends once, and its time is that of the transfer."""

from __future__ import annotations

import pytest

from kv_transfer.base import Pull, PullOutcome
from kv_transfer.pulls import OpenPull, PullLedger, difference


def _open(ledger: PullLedger, name: str = "a", begun_s: float = 10.0, deadline_s: float = 15.0) -> None:
    ledger.begin(OpenPull(name, "p", begun_s, deadline_s))


def test_a_pull_ends_once() -> None:
    ledger = PullLedger()
    _open(ledger)
    ledger.moved("a", 100)
    ledger.moved("a", 20)
    assert ledger.end("a", PullOutcome.PULLED, now_s=12.0)
    assert not ledger.end("a", PullOutcome.FAILED, now_s=13.0)
    assert ledger.take() == [Pull("a", "p", PullOutcome.PULLED, 120, 2.0)]
    assert ledger.take() == []


def test_time_in_the_queue_is_no_part_of_the_transfer() -> None:
    ledger = PullLedger()
    _open(ledger)
    ledger.started("a", now_s=14.0)
    ledger.end("a", PullOutcome.LEASE_LOST, now_s=14.5, detail="gone")
    assert ledger.take() == [Pull("a", "p", PullOutcome.LEASE_LOST, 0, 0.5, "gone")]


def test_the_late_ones_are_named_until_they_end() -> None:
    ledger = PullLedger()
    _open(ledger, "a", deadline_s=15.0)
    _open(ledger, "b", deadline_s=16.0)
    assert ledger.late(14.9) == []
    assert ledger.late(15.0) == ["a"]
    ledger.end("a", PullOutcome.LATE, now_s=15.0)
    assert ledger.late(20.0) == ["b"]


def test_a_request_pulls_once_at_a_time() -> None:
    ledger = PullLedger()
    _open(ledger)
    with pytest.raises(ValueError, match="under way"):
        _open(ledger)
    ledger.end("a", PullOutcome.FAILED, now_s=11.0)
    _open(ledger)


def test_what_never_began_is_ignored() -> None:
    ledger = PullLedger()
    ledger.moved("x", 1)
    ledger.started("x", 1.0)
    assert ledger.get("x") is None
    assert not ledger.end("x", PullOutcome.PULLED, now_s=1.0)


@pytest.mark.parametrize(
    ("arrived", "wrong"),
    [
        ([[1, 2, 3], [7]], ""),
        ([[2, 3], [7]], ""),  # the first one was here
        ([[], []], ""),
        ([[1, 3, 2], [7]], "2 of 4 blocks"),
        ([[2, 3], [8]], "1 of 3 blocks"),
        ([[0, 1, 2, 3], [7]], "5 blocks are needed, and 4 were on offer"),
        ([[1, 2, 3]], "3 blocks are needed"),
    ],
)
def test_each_block_that_came_must_be_the_one_on_offer(arrived: list[list[int]], wrong: str) -> None:
    found = difference([[1, 2, 3], [7]], arrived)
    assert found.startswith(wrong)
    assert bool(found) == bool(wrong)
