"""Two real engines over NIXL say what one says alone, whatever becomes of the lease."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

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


def test_kv_that_changed_before_the_pull_gives_the_right_tokens(pair: Pair) -> None:
    source, target = pair
    tokens = prompt(300, seed=5)
    alone, _ = target.call("generate", "whole", tokens, TOKENS)
    assert target.call("forget")
    handoff = source.call("offer", "changes", tokens)
    (blocks,) = handoff.params["remote_block_ids"]
    source.call("scramble", blocks)
    paired, (pull,) = target.call("generate", "changed", tokens, TOKENS, handoff)
    assert pull.outcome is PullOutcome.CORRUPT, pull
    assert pull.kv_bytes == handoff.kv_bytes
    assert paired == alone
    source.call("release", "changes")


def test_one_flipped_bit_behind_a_cached_prefix_gives_the_right_tokens(pair: Pair) -> None:
    source, target = pair
    tokens = prompt(400, seed=6)
    alone, _ = target.call("generate", "knows-it", tokens, TOKENS)  # its full blocks stay in the cache
    handoff = source.call("offer", "flips", tokens)
    (blocks,) = handoff.params["remote_block_ids"]
    source.call("flip_a_bit", blocks[-1])
    paired, (pull,) = target.call("generate", "flipped", tokens, TOKENS, handoff)
    assert pull.outcome is PullOutcome.CORRUPT, pull
    assert pull.detail == "1 of 1 blocks are not what was offered"
    assert paired == alone
    source.call("release", "flips")


def test_a_block_that_is_not_pulled_is_not_compared(pair: Pair) -> None:
    source, target = pair
    tokens = prompt(400, seed=7)
    alone, _ = target.call("generate", "has-it", tokens, TOKENS)
    handoff = source.call("offer", "flips-first", tokens)
    (blocks,) = handoff.params["remote_block_ids"]
    source.call("flip_a_bit", blocks[0])
    paired, (pull,) = target.call("generate", "pulls-last", tokens, TOKENS, handoff)
    assert pull.outcome is PullOutcome.PULLED, pull
    assert paired == alone


@pytest.mark.parametrize("lacks", ["tokens", "blocks"])
def test_an_offer_of_less_than_the_prompt_is_not_pulled(pair: Pair, lacks: str) -> None:
    source, target = pair
    tokens = prompt(300, seed=8)
    alone, _ = target.call("generate", f"all-{lacks}", tokens, TOKENS)
    assert target.call("forget")
    handoff = source.call("offer", f"offers-{lacks}", tokens)
    params = handoff.params
    if lacks == "tokens":
        short = {"remote_num_tokens": params["remote_num_tokens"] - 1}
    else:
        short = {key: [params[key][0][:-1]] for key in ("remote_block_ids", "checksums")}
    paired, (pull,) = target.call(
        "generate", f"lacks-{lacks}", tokens, TOKENS, replace(handoff, params={**params, **short})
    )
    assert pull.outcome is PullOutcome.CORRUPT, pull
    assert f"{lacks} are on offer" in pull.detail
    assert paired == alone
    source.call("release", f"offers-{lacks}")


def test_a_source_without_checksums_is_not_trusted(pair: Pair) -> None:
    source, target = pair
    tokens = prompt(300, seed=9)
    alone, _ = target.call("generate", "trusted", tokens, TOKENS)
    assert target.call("forget")
    handoff = source.call("offer", "unchecked", tokens)
    params = {key: value for key, value in handoff.params.items() if key != "checksums"}
    paired, (pull,) = target.call("generate", "unsure", tokens, TOKENS, replace(handoff, params=params))
    assert pull.outcome is PullOutcome.FAILED, pull
    assert "transfer.checksum" in pull.detail
    assert paired == alone
    source.call("release", "unchecked")


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
