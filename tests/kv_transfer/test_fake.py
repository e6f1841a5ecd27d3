"""The fake: any order of events conserves blocks, frees none twice, and never passes on wrong bytes."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kv_transfer.base import Handoff, PullOutcome, TransferError
from kv_transfer.fake import FakeFabric, FakePort, Faults, ManualClock

BLOCKS = 24


def _pair(bytes_per_s: float = 1e9) -> tuple[ManualClock, FakePort, FakePort]:
    clock = ManualClock()
    fabric = FakeFabric(clock, latency_s=1e-3, bytes_per_s=bytes_per_s)
    return clock, fabric.port("p", BLOCKS, lease_s=5.0), fabric.port("d", BLOCKS)


def _offer(port: FakePort, name: str, blocks: int = 4) -> Handoff:
    port.compute(name, [f"{name}:{block}".encode() for block in range(blocks)])
    return port.offer(name)


@pytest.mark.parametrize(
    ("faults", "outcome"),
    [
        (Faults(), PullOutcome.PULLED),
        (Faults(delay_s=0.5), PullOutcome.PULLED),
        (Faults(delay_s=2.0), PullOutcome.LATE),
        (Faults(fail_at=0.5), PullOutcome.FAILED),
        (Faults(lease_ends=True), PullOutcome.LEASE_LOST),
        (Faults(corrupt=True), PullOutcome.CORRUPT),
        (Faults(short=True), PullOutcome.CORRUPT),
        (Faults(source_dead=True), PullOutcome.FAILED),
        (Faults(stalled=True), PullOutcome.LATE),
    ],
)
def test_each_fault_has_its_outcome(faults: Faults, outcome: PullOutcome) -> None:
    clock, source, target = _pair()
    handoff = _offer(source, "a")
    source.faults = faults
    target.start_pull("a", handoff, deadline_s=1.0)
    for _ in range(100):
        clock.advance(0.02)
        source.step()
        target.step()
    (pull,) = target.take_pulls()
    assert pull.outcome is outcome
    # Pulled blocks are the request's; late ones wait for their bytes; the others are free.
    holds = faults.stalled or outcome is PullOutcome.PULLED
    for _ in range(100):
        clock.advance(0.02)
        target.step()
    assert target.used_blocks == (4 if holds else 0)
    assert target.held_blocks() == (4 if faults.stalled else 0)


def test_a_pull_takes_the_time_of_its_link() -> None:
    clock, source, target = _pair(bytes_per_s=16 * 4096 / 0.1)  # a block in 0.1 s
    target.start_pull("a", _offer(source, "a"), deadline_s=10)
    for _ in range(100):
        clock.advance(0.01)
        target.step()
        if pulls := target.take_pulls():
            break
    assert pulls[0].seconds == pytest.approx(0.4, abs=0.03)
    assert pulls[0].kv_bytes == 4 * 16 * 4096


def test_cached_blocks_are_not_moved() -> None:
    clock, source, target = _pair()
    target.start_pull("a", _offer(source, "a"), deadline_s=1, cached_blocks=3)
    clock.advance(0.1)
    target.step()
    assert target.kv("a") == [b"a:3"]
    target.start_pull("b", _offer(source, "b"), deadline_s=1, cached_blocks=4)
    assert [pull.outcome for pull in target.take_pulls()] == [PullOutcome.PULLED, PullOutcome.CACHED]
    source.step()
    assert source.used_blocks == 0


def test_only_blocks_that_are_moved_are_compared() -> None:
    clock, source, target = _pair()
    handoff = _offer(source, "a")
    source.blocks[0] = b"what the target has of it"
    target.start_pull("a", handoff, deadline_s=1, cached_blocks=1)
    clock.advance(0.1)
    target.step()
    assert target.take_pulls()[0].outcome is PullOutcome.PULLED


def test_a_dead_peer_cannot_be_probed() -> None:
    _, source, target = _pair()
    assert target.probe(source.address()).bytes_per_s == 1e9
    source.faults = Faults(source_dead=True)
    with pytest.raises(TransferError, match="does not answer"):
        target.probe(source.address())


class Ends(RuleBasedStateMachine):
    """A source and a target, and anything that can happen to them."""

    def __init__(self) -> None:
        super().__init__()
        self.clock, self.source, self.target = _pair(bytes_per_s=16 * 4096 / 0.1)
        self.names = (f"r{number}" for number in itertools.count())
        self.handoffs: dict[str, Handoff] = {}
        self.open: set[str] = set()
        self.pulled: dict[str, str] = {}

    @rule(blocks=st.integers(1, 8))
    def offer(self, blocks: int) -> None:
        if len(self.source.blocks) - self.source.used_blocks >= blocks:
            name = next(self.names)
            self.handoffs[name] = _offer(self.source, name, blocks)

    @rule(data=st.data(), deadline_s=st.floats(0.05, 3.0))
    def pull(self, data: st.DataObject, deadline_s: float) -> None:
        if not self.handoffs:
            return
        offered = data.draw(st.sampled_from(sorted(self.handoffs)))
        if len(self.target.blocks) - self.target.used_blocks >= 8:
            name = next(self.names)
            self.target.start_pull(name, self.handoffs[offered], deadline_s)
            self.pulled[name] = offered
            self.open.add(name)

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if self.handoffs:
            self.source.release(data.draw(st.sampled_from(sorted(self.handoffs))))

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        if self.pulled:
            self.target.free(data.draw(st.sampled_from(sorted(self.pulled))))

    @rule(
        faults=st.builds(Faults, **dict.fromkeys(("stalled", "lease_ends", "corrupt", "short"), st.booleans()))
    )
    def fault(self, faults: Faults) -> None:
        self.source.faults = faults

    @rule(seconds=st.floats(0.0, 1.0))
    def run(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.source.step()
        self.target.step()
        for pull in self.target.take_pulls():
            assert pull.request_id in self.open, "ended twice"
            self.open.discard(pull.request_id)
            if pull.outcome is PullOutcome.PULLED:
                content = self.target.kv(pull.request_id)
                assert content == [f"{self.pulled[pull.request_id]}:{i}".encode() for i in range(len(content))]

    @invariant()
    def no_block_is_free_twice(self) -> None:
        for port in (self.source, self.target):
            assert len(set(port._free)) == len(port._free)

    def teardown(self) -> None:
        self.source.faults = Faults()
        for name in self.pulled:
            self.target.free(name)
        for _ in range(10):
            self.run(1.0)
        assert self.source.used_blocks == 0
        assert self.target.used_blocks == 0
        assert not self.open


TestEnds = Ends.TestCase
TestEnds.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
