"""Speculation depth, per sequence and per batch, on an engine that drafts from n-grams."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from types import SimpleNamespace

import pytest

from engine.base import BatchPlan, Engine, Seq, Work
from engine.vllm_scheduler import _CarriedOut
from tests.engine.replica import Drive, prompt, running_engine, work

pytestmark = pytest.mark.engines

DRAFTS = 4
MAX_TOKENS = 24


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with running_engine(
        "speculative",
        max_num_seqs=4,
        max_batch_tokens=128,
        side_channel_port=5742,
        speculative={
            "method": "ngram",
            "num_speculative_tokens": DRAFTS,
            "prompt_lookup_max": 3,
            "prompt_lookup_min": 1,
        },
    ) as started:
        yield started


@pytest.fixture(scope="module")
def expected(engine: Engine) -> dict[str, list[int]]:
    """The tokens of each work when it runs alone and no draft is verified."""
    tokens: dict[str, list[int]] = {}
    for item in works():
        tokens |= Drive(engine, lambda seqs: depth(seqs, 0)).submit(item).run().tokens
    return tokens


def works() -> list[Work]:
    # A pattern that repeats, so that n-grams are found from the start.
    return [work(f"w{i}", prompt(7, seed=i) * (3 + i), MAX_TOKENS) for i in range(4)]


def depth(seqs: Sequence[Seq], drafts: int) -> BatchPlan:
    return BatchPlan(depth={seq.work_id: drafts for seq in seqs})


def test_without_a_plan_all_drafts_are_verified(engine: Engine, expected: dict[str, list[int]]) -> None:
    drive = Drive(engine).submit(*works()).run()
    assert drive.tokens == expected
    assert sum(report.drafted_tokens for report in drive.reports) > 0
    accepted = sum(report.accepted_tokens for report in drive.reports)
    decoded = sum(len(tokens) - 1 for tokens in drive.tokens.values())
    decode_steps = sum(report.decode_seqs for report in drive.reports)
    assert accepted > 0
    # Drafts accepted past a work's last token are dropped, so this may be less than their sum.
    assert decode_steps < decoded <= decode_steps + accepted


@pytest.mark.parametrize("drafts", [0, 1, 3])
def test_depth_bounds_what_is_verified(engine: Engine, expected: dict[str, list[int]], drafts: int) -> None:
    drive = Drive(engine, lambda seqs: depth(seqs, drafts)).submit(*works()).run()
    assert drive.tokens == expected
    assert all(report.drafted_tokens <= drafts * report.decode_seqs for report in drive.reports)
    assert (sum(report.drafted_tokens for report in drive.reports) > 0) == (drafts > 0)


def test_each_sequence_has_its_own_depth(engine: Engine, expected: dict[str, list[int]]) -> None:
    drive = Drive(engine).submit(*works()[:2])
    depths = {"w0": 0, "w1": 2}
    while engine.has_work():
        said = {key: len(tokens) for key, tokens in drive.tokens.items()}
        drive.step(BatchPlan(depth=depths))
        new = {key: len(tokens) - said.get(key, 0) for key, tokens in drive.tokens.items()}
        assert all(new[key] <= 1 + depths[key] for key in new)
    assert drive.tokens == {key: expected[key] for key in depths}


def test_any_mixture_of_plans_gives_the_same_tokens(engine: Engine, expected: dict[str, list[int]]) -> None:
    chance = random.Random(5)

    def whatever(seqs: Sequence[Seq]) -> BatchPlan:
        keys = [seq.work_id for seq in seqs]
        chance.shuffle(keys)
        return BatchPlan(
            order=keys,
            chunk_tokens={key: chance.randint(0, 9) for key in keys if chance.random() < 0.5},
            skip=frozenset(key for key in keys if chance.random() < 0.3),
            depth={key: chance.randint(0, DRAFTS) for key in keys if chance.random() < 0.7},
            max_tokens=chance.randint(4, 60),
            preempt=[key for key in keys if chance.random() < 0.05],
            draft_tokens=chance.choice([None, 0, 2]),
        )

    drive = Drive(engine, whatever).submit(*works()).run(max_steps=1500)
    assert drive.tokens == expected
    assert sum(report.preempted for report in drive.reports) > 0


@pytest.mark.parametrize("drafts", [0, 2])
def test_a_plan_says_how_many_to_draft_next(
    engine: Engine, expected: dict[str, list[int]], drafts: int
) -> None:
    drive = Drive(engine, lambda _: BatchPlan(draft_tokens=drafts)).submit(works()[3])
    seen = 0
    while engine.has_work():
        drive.step()
        seen = max(seen, *(seq.drafts for seq in drive.seqs.values())) if drive.seqs else seen
    assert seen == drafts
    assert drive.tokens == {"w3": expected["w3"]}


def test_one_token_left_is_one_token_in_the_batch(engine: Engine) -> None:
    """vLLM pads such a request to 1 + drafts, whatever the plan, and asserts when that is clipped."""
    tokens = prompt(65, seed=9)
    alone = Drive(engine).submit(work("first", tokens, 4)).run()
    drive = Drive(engine).submit(work("second", tokens, 4))
    report = drive.step(BatchPlan(chunk_tokens={"second": 1}))
    assert report is not None
    assert (report.tokens, report.drafted_tokens) == (1, 0)
    drive.run()
    assert drive.tokens["second"] == alone.tokens["first"]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_holding_a_request_drops_its_drafts_where_batches_overlap(asynchronous: bool) -> None:
    """On GPUs they stand for what the batch before may draft, and the worker forgets them when it is held out.

    (The CPU platform forces asynchronous scheduling off, so no engine here can show it.)
    """
    drafts = [-1] * DRAFTS
    held, other = (SimpleNamespace(request_id=key, spec_token_ids=drafts) for key in ("held", "other"))
    scheduler = SimpleNamespace(scheduler_config=SimpleNamespace(async_scheduling=asynchronous))
    carried_out = _CarriedOut(scheduler, BatchPlan(skip={"held"}), frozenset({"held"}))
    carried_out._cut_drafts([held, other])
    assert held.spec_token_ids == ([] if asynchronous else [-1] * DRAFTS)
    assert other.spec_token_ids == [-1] * DRAFTS
