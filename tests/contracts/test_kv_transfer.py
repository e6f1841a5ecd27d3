"""The failure contract of kv_transfer/base.py, row by row: the fake, NIXL, and virtual engines.

Every row ends with the same promise: the target says what its prompt gives, and the blocks in use on both
ends are what they were.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

import pytest

from kv_transfer.base import PullOutcome
from tests.contracts.kv_ends import LEASE_S, Ends, FakeEnds, NixlEnds, VirtualEnds

pytestmark = [pytest.mark.engines, pytest.mark.timeout(300)]

# A step that waits for a stopped peer would wait for ever; a busy machine may take a while for a step.
BLOCKED_S = 20.0

IN_MEMORY = {"fake": FakeEnds, "virtual": VirtualEnds}

_NAMES = (f"request-{number}" for number in itertools.count())


@pytest.fixture(scope="module", params=["fake", "virtual", "nixl"])
def shared_ends(request: pytest.FixtureRequest) -> Iterator[Ends]:
    if request.param in IN_MEMORY:
        yield IN_MEMORY[request.param]()
        return
    pytest.importorskip("vllm")
    pytest.importorskip("nixl")
    ends = NixlEnds(base_port=5930)
    yield ends
    ends.close()


@pytest.fixture
def ends(shared_ends: Ends) -> Iterator[Ends]:
    assert shared_ends.used_blocks() == (0, 0)
    yield shared_ends
    assert shared_ends.used_blocks() == (0, 0)
    assert shared_ends.held_blocks() == 0


@pytest.fixture
def name() -> str:
    return next(_NAMES)


def test_bytes_arrive_intact_and_the_lease_ends(ends: Ends, name: str) -> None:
    handoff = ends.offer(name)
    assert [lease.request_id for lease in ends.leases()] == [name]
    pull = ends.pull(name, handoff)
    assert pull.outcome is PullOutcome.PULLED, pull
    assert pull.source == handoff.source
    assert pull.kv_bytes >= handoff.kv_bytes * 0.99  # whole blocks move
    assert 0 < pull.seconds < BLOCKED_S
    assert ends.is_right(name)
    assert ends.used_blocks() == (0, 0)
    assert ends.leases() == []


def test_several_sizes_arrive_intact(ends: Ends) -> None:
    for num_tokens in (1, 31, 32, 33, 700):
        name = next(_NAMES)
        pull = ends.pull(name, ends.offer(name, num_tokens))
        assert pull.outcome is PullOutcome.PULLED, (num_tokens, pull)
        assert ends.is_right(name), num_tokens


def test_a_lease_shows_its_blocks_and_the_time_left(ends: Ends, name: str) -> None:
    ends.offer(name, 320)
    (lease,) = ends.leases()
    assert (lease.request_id, lease.num_blocks) == (name, 10)
    assert 0 < lease.left_s <= LEASE_S
    ends.release(name)


def test_release_is_idempotent_and_frees_the_blocks(ends: Ends, name: str) -> None:
    ends.offer(name)
    assert ends.release(name)
    assert not ends.release(name)
    assert not ends.release("never-offered")
    assert ends.leases() == []
    assert ends.used_blocks() == (0, 0)


def test_release_before_the_pull_fails_it(ends: Ends, name: str) -> None:
    handoff = ends.offer(name)
    ends.release(name)
    ends.reuse_source_blocks()
    pull = ends.pull(name, handoff)
    assert pull.outcome is PullOutcome.LEASE_LOST, pull
    assert ends.is_right(name)


def test_release_without_a_step_of_the_source_fails_the_pull_too(ends: Ends, name: str) -> None:
    handoff = ends.offer(name)
    ends.release(name)
    assert ends.pull(name, handoff).outcome is PullOutcome.LEASE_LOST
    assert ends.is_right(name)


def test_a_lease_that_ran_out_before_the_pull_fails_it(ends: Ends, name: str) -> None:
    handoff = ends.offer(name)
    ends.wait(LEASE_S + 0.1)
    ends.reuse_source_blocks()
    assert ends.leases() == []
    assert ends.pull(name, handoff).outcome is PullOutcome.LEASE_LOST
    assert ends.is_right(name)


def test_a_lease_that_ran_out_in_the_middle_of_the_pull_fails_it(ends: Ends, name: str) -> None:
    handoff = ends.offer(name)
    ends.begin_pull(name, handoff, deadline_s=30)
    for _ in range(100):  # the target takes no step, so no heartbeat comes after the one under way
        ends.wait(0.3)
        ends.reuse_source_blocks()
        if not ends.leases():
            break
    assert ends.end_pull(name).outcome is PullOutcome.LEASE_LOST
    assert ends.is_right(name)


def test_release_in_the_middle_of_the_pull_fails_it(ends: Ends, name: str) -> None:
    handoff = ends.offer(name)
    ends.begin_pull(name, handoff)
    ends.release(name)
    ends.reuse_source_blocks()
    assert ends.end_pull(name).outcome is PullOutcome.LEASE_LOST
    assert ends.is_right(name)


def test_another_offer_in_the_same_place_does_not_pass_for_the_first(ends: Ends) -> None:
    first, second = next(_NAMES), next(_NAMES)
    stale = ends.offer(first)
    ends.release(first)
    ends.reuse_source_blocks()
    fresh = ends.offer(second)
    assert ends.pull(first, stale).outcome is PullOutcome.LEASE_LOST
    assert ends.is_right(first)
    assert ends.pull(second, fresh).outcome is PullOutcome.PULLED
    assert ends.is_right(second)


@pytest.mark.parametrize("num_tokens", [20, 2000])
def test_kv_that_changed_after_it_was_offered_is_never_used(ends: Ends, name: str, num_tokens: int) -> None:
    handoff = ends.offer(name, num_tokens)
    ends.flip_a_bit(handoff)
    pull = ends.pull(name, handoff)
    assert pull.outcome is PullOutcome.CORRUPT, pull
    assert pull.detail
    assert ends.is_right(name)
    ends.release(name)


def test_kv_that_did_not_come_whole_is_never_used(ends: Ends, name: str) -> None:
    ends.shorten_transfers(True)
    try:
        pull = ends.pull(name, ends.offer(name))
    finally:
        ends.shorten_transfers(False)
    assert pull.outcome is PullOutcome.CORRUPT, pull
    assert ends.is_right(name)
    ends.release(name)
    again = next(_NAMES)
    assert ends.pull(again, ends.offer(again)).outcome is PullOutcome.PULLED
    assert ends.is_right(again)


def test_a_handoff_pulled_twice_is_used_once(ends: Ends, name: str) -> None:
    handoff = ends.offer(name)
    assert ends.pull(name, handoff).outcome is PullOutcome.PULLED
    assert ends.is_right(name)
    assert ends.used_blocks() == (0, 0)
    ends.reuse_source_blocks()
    again = next(_NAMES)
    assert ends.pull(again, handoff).outcome is PullOutcome.LEASE_LOST
    assert ends.is_right(again)


def test_cancel_in_the_middle_of_the_pull_gives_the_blocks_back(ends: Ends, name: str) -> None:
    handoff = ends.offer(name)
    ends.begin_pull(name, handoff)
    ends.cancel(name)
    ends.end_pull(name)
    ends.release(name)  # the node does so for whatever did not end as pulled


def test_a_deadline_that_is_over_at_once_is_late(ends: Ends, name: str) -> None:
    handoff = ends.offer(name)
    ends.stop_source()
    try:
        pull = ends.pull(name, handoff, deadline_s=0.0)
    finally:
        ends.wake_source()
    assert pull.outcome is PullOutcome.LATE, pull
    assert ends.is_right(name)
    ends.release(name)


def test_late_bytes_of_a_stopped_source_reach_no_request(ends: Ends, name: str) -> None:
    handoff = ends.offer(name)
    ends.release(name)
    ends.reuse_source_blocks()  # so that the late bytes are wrong
    ends.stop_source()
    try:
        began = time.monotonic()
        pull = ends.pull(name, handoff, deadline_s=0.7)
        assert pull.outcome in (PullOutcome.LATE, PullOutcome.LEASE_LOST), pull
        assert time.monotonic() - began < BLOCKED_S
        ends.go_on(name)
    finally:
        ends.wake_source()
    ends.wait(0.3)
    assert ends.is_right(name)


def test_a_stopped_source_makes_the_pull_late_and_its_blocks_are_kept_apart(ends: Ends, name: str) -> None:
    handoff = ends.offer(name)
    ends.stop_source()
    try:
        pull = ends.pull(name, handoff, deadline_s=0.7)
        assert pull.outcome is PullOutcome.LATE, pull
        assert 0.6 < pull.seconds < BLOCKED_S
        assert ends.held_blocks() > 0
    finally:
        ends.wake_source()
    assert ends.is_right(name)
    ends.release(name)


def test_a_stopped_source_that_wakes_up_in_time_is_pulled_from(ends: Ends, name: str) -> None:
    handoff = ends.offer(name)
    ends.stop_source()
    try:
        ends.begin_pull(name, handoff, deadline_s=10)
        ends.wait(0.3)
    finally:
        ends.wake_source()
    assert ends.end_pull(name).outcome is PullOutcome.PULLED
    assert ends.is_right(name)


def test_the_link_is_measured(ends: Ends) -> None:
    link = ends.probe()
    assert link.latency_s >= 0
    assert link.bytes_per_s > 1e6
    assert link.transfer_s(8 << 20) < 5


# The source dies in these: they come last.


def test_a_source_that_dies_before_the_pull_fails_it(ends: Ends, name: str) -> None:
    handoff = ends.offer(name)
    ends.kill_source()
    pull = ends.pull(name, handoff)
    assert pull.outcome is PullOutcome.FAILED, pull
    assert pull.detail
    assert ends.is_right(name)
    ends.restart_source()
    stale, fresh = next(_NAMES), next(_NAMES)
    assert ends.pull(stale, handoff).outcome is not PullOutcome.PULLED
    assert ends.is_right(stale)
    assert ends.pull(fresh, ends.offer(fresh)).outcome is PullOutcome.PULLED
    assert ends.is_right(fresh)


def test_a_stopped_source_that_dies_gives_the_late_blocks_back(ends: Ends, name: str) -> None:
    handoff = ends.offer(name)
    ends.stop_source()
    assert ends.pull(name, handoff, deadline_s=0.7).outcome is PullOutcome.LATE
    assert ends.held_blocks() > 0
    assert ends.is_right(name)
    ends.kill_source()
    ends.wait(0.3)
    assert ends.used_blocks() == (0, 0)
