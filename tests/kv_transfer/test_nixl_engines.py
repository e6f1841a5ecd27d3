"""Two real engines over NIXL say what one says alone, whatever becomes of the lease."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from kv_transfer.base import PullOutcome, TransferError
from tests.contracts.engine_process import EngineProcess
from tests.engine.replica import prompt
from tests.kv_transfer.real_end import LEASE_S, RealEnd

pytestmark = [pytest.mark.engines, pytest.mark.timeout(400)]

TOKENS = 8
Pair = tuple[EngineProcess, EngineProcess]


@pytest.fixture(scope="module")
def both() -> Iterator[Pair]:
    pytest.importorskip("vllm")
    pytest.importorskip("nixl")
    ends = EngineProcess(RealEnd, "p", 5751), EngineProcess(RealEnd, "d", 5752)
    for end in ends:
        end.ready()
    yield ends
    for end in ends:
        end.kill()


@pytest.fixture
def pair(both: Pair) -> Iterator[Pair]:
    for end in both:
        assert end.call("forget")
    yield both
    assert [end.call("settle") for end in both] == [0, 0]


def test_the_link_between_two_engines_is_measured(pair: Pair) -> None:
    source, target = pair
    link = target.call("probe", source.call("address"))
    assert (link.source, link.target) == ("p", "d")
    assert link.bytes_per_s > 1e7
    with pytest.raises(TransferError, match="no link to itself"):
        target.call("probe", target.call("address"))


@pytest.mark.parametrize("length", [2, 33, 100, 257, 700])
def test_a_pair_says_what_one_engine_says_alone(pair: Pair, length: int) -> None:
    source, target = pair
    tokens = prompt(length, seed=length)
    alone, _ = target.call("generate", f"alone-{length}", tokens, TOKENS)
    assert target.call("forget")
    handoff = source.call("offer", f"offered-{length}", tokens)
    assert handoff.num_tokens == length
    paired, (pull,) = target.call("generate", f"paired-{length}", tokens, TOKENS, handoff)
    assert pull.outcome is PullOutcome.PULLED, pull
    assert pull.kv_bytes == handoff.kv_bytes > 0
    assert paired == alone


def test_the_same_pair_works_the_other_way_round(pair: Pair) -> None:
    target, source = pair
    tokens = prompt(150, seed=1)
    alone, _ = target.call("generate", "alone-back", tokens, TOKENS)
    assert target.call("forget")
    paired, (pull,) = target.call(
        "generate", "paired-back", tokens, TOKENS, source.call("offer", "offered-back", tokens)
    )
    assert pull.outcome is PullOutcome.PULLED, pull
    assert paired == alone


def test_a_prefix_that_the_target_has_is_not_moved_again(pair: Pair) -> None:
    source, target = pair
    tokens = prompt(400, seed=2)
    alone, _ = target.call("generate", "first", tokens, TOKENS)
    handoff = source.call("offer", "second", tokens)
    paired, (pull,) = target.call("generate", "third", tokens, TOKENS, handoff)
    assert pull.outcome is PullOutcome.PULLED, pull
    assert 0 < pull.kv_bytes < handoff.kv_bytes / 2
    assert paired == alone


def test_a_lease_that_ran_out_gives_the_right_tokens(pair: Pair) -> None:
    source, target = pair
    tokens = prompt(300, seed=3)
    alone, _ = target.call("generate", "before", tokens, TOKENS)
    assert target.call("forget")
    handoff = source.call("offer", "expires", tokens)
    assert len(source.call("leases")) == 1
    time.sleep(LEASE_S + 0.1)
    assert source.call("settle") == 0
    source.call("compute_other_things")
    late, (pull,) = target.call("generate", "after", tokens, TOKENS, handoff)
    assert pull.outcome is PullOutcome.LEASE_LOST, pull
    assert late == alone


def test_a_source_that_is_gone_gives_the_right_tokens(both: Pair) -> None:
    source, target = both
    tokens = prompt(200, seed=4)
    alone, _ = target.call("generate", "alive", tokens, TOKENS)
    assert target.call("forget")
    handoff = source.call("offer", "dies", tokens)
    source.kill()
    paired, (pull,) = target.call("generate", "orphan", tokens, TOKENS, handoff)
    assert pull.outcome is PullOutcome.FAILED, pull
    assert paired == alone
    assert target.call("settle") == 0
