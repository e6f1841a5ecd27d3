"""What a virtual engine promises beside the engine contract: time, tokens, memory, transfers."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.base import BatchPlan, StepReport, Work
from engine.cost import StepCost
from engine.errors import EngineStartError, RequestError
from engine.virtual import FIRST_ROWS, VirtualEngine, warm_up
from engine.virtual_tokens import VirtualSampling
from kv_transfer.base import Handoff, PullOutcome
from tests.engine.replica import Drive, prompt
from tests.engine.virtual_replica import BLOCK_TOKENS, Stage, virtual_config

COST = StepCost.line(base_s=0.010, per_token_s=0.0001)
BYTES_PER_TOKEN = 1024


@pytest.fixture
def stage() -> Stage:
    return Stage(latency_s=0.001, bytes_per_s=1e6)


def work(work_id: str, length: int = 50, max_tokens: int = 6, seed: int = 0, **more: object) -> Work:
    return replace(Work(work_id, prompt(length, seed), b"", max_tokens), **more)


def run(engine: VirtualEngine, *works: Work, stage: Stage | None = None) -> Drive:
    """To the end. On a clock that stands still, transfers need it to be moved."""
    drive = Drive(engine).submit(*works)
    for _ in range(2000):
        if not engine.has_work():
            return drive
        if drive.step() is None and stage is not None:
            stage.clock.advance(max(engine.wake_s() - stage.clock(), 0.0))
    raise AssertionError(f"not done: {engine.usage()}")


def offer(engine: VirtualEngine, work_id: str = "offer", length: int = 100) -> Handoff:
    drive = Drive(engine).submit(work(work_id, length, offer_kv=True))
    while work_id not in drive.finished:
        drive.step()
    handoff = drive.finished[work_id].handoff
    assert handoff is not None
    return handoff


# ---- time ------------------------------------------------------------------------------------------------


def test_a_batch_takes_what_it_costs_and_reports_it(stage: Stage) -> None:
    engine = stage.engine("e", cost=COST, max_batch_tokens=128)
    drive = Drive(engine).submit(work("a", 100), work("b", 40, seed=1))
    began_s = stage.clock()
    report = drive.step()
    assert report == StepReport(
        seconds=pytest.approx(0.010 + 128 * 0.0001),  # type: ignore[arg-type]
        tokens=128,
        seqs=2,
        decode_seqs=0,
        decode_context_tokens=0,
        prefill_work=100 * 50 + 28 * 14,
    )
    assert stage.clock() - began_s == pytest.approx(report.seconds)
    report = drive.step()
    assert report is not None
    assert (report.tokens, report.decode_seqs, report.decode_context_tokens) == (13, 1, 100)
    assert report.prefill_kv_tokens == 28


def test_nothing_waits_when_no_batch_runs(stage: Stage) -> None:
    engine = stage.engine("e", cost=COST)
    began_s = stage.clock()
    assert Drive(engine).step() is None
    Drive(engine).submit(work("a")).step(BatchPlan(skip=frozenset({"a"})))
    assert stage.clock() == began_s


def test_a_host_may_begin_a_batch_and_finish_it_later(stage: Stage) -> None:
    engine = stage.engine("e", cost=COST)
    engine.submit(work("a", 50, max_tokens=1))
    ends_s = engine.begin(lambda _: BatchPlan())
    assert ends_s == pytest.approx(stage.clock() + 0.015)
    stage.clock.advance(0.015)
    (output,) = engine.finish().outputs
    assert output.finish_reason == "length"


def test_a_batch_that_ends_late_took_longer(stage: Stage) -> None:
    engine = stage.engine("e", cost=COST)
    engine.submit(work("a", 50))
    engine.begin(lambda _: BatchPlan())
    stage.clock.advance(0.115)
    report = engine.finish().report
    assert report is not None
    assert report.seconds == pytest.approx(0.115)


# ---- tokens ----------------------------------------------------------------------------------------------


def test_tokens_go_on_from_what_was_said_wherever_the_work_goes_on(stage: Stage) -> None:
    first, second = stage.engine("first"), stage.engine("second")
    alone = run(first, work("a", 90, max_tokens=12)).tokens["a"]
    assert len(set(alone)) > 6
    resumed = [*prompt(90, 0), *alone[:5]]
    rest = run(second, replace(work("b", max_tokens=7), prompt_token_ids=resumed)).tokens["b"]
    assert rest == alone[5:]


def test_a_handed_over_work_says_the_same(stage: Stage) -> None:
    source, target = stage.engine("source"), stage.engine("target")
    alone = run(source, work("alone", 100)).tokens["alone"]
    drive = run(target, work("a", 100, handoff=offer(source)), stage=stage)
    assert drive.tokens["a"] == alone
    assert drive.finished["a"].finish_reason == "length"


def test_drafts_change_the_pace_and_never_the_tokens(stage: Stage) -> None:
    plain, drafting = stage.engine("plain"), stage.engine("drafting", max_draft_tokens=3, acceptance=0.7)
    asked = [work(str(seed), 40, max_tokens=60, seed=seed) for seed in range(4)]
    said, drafted = run(plain, *asked), run(drafting, *asked)
    assert drafted.tokens == said.tokens
    assert len(drafted.reports) < 0.7 * len(said.reports)
    tried = sum(report.drafted_tokens for report in drafted.reports)
    accepted = sum(report.accepted_tokens for report in drafted.reports)
    assert 0.3 < accepted / tried < 0.7, "three drafts at 0.7: about half of them count"
    assert all(report.drafted_tokens == 0 for report in said.reports)


def test_depth_and_the_drafts_of_the_next_batch_follow_the_plan(stage: Stage) -> None:
    engine = stage.engine("e", max_draft_tokens=4, acceptance=1.0)
    drive = Drive(engine).submit(work("a", 20, max_tokens=50))
    drive.step(BatchPlan(draft_tokens=2))
    report = drive.step(BatchPlan(depth={"a": 1}))
    assert drive.seqs["a"].drafts == 2
    assert report is not None
    assert (report.tokens, report.drafted_tokens, report.accepted_tokens) == (2, 1, 1)


def test_an_answer_ends_by_itself_where_the_sampling_says_so(stage: Stage) -> None:
    sampling = VirtualSampling(stop_after=3).encode()
    drive = run(stage.engine("e"), work("a", max_tokens=9, sampling=sampling), work("b", max_tokens=2, seed=1))
    assert [len(drive.tokens[key]) for key in "ab"] == [3, 2]
    assert [drive.finished[key].finish_reason for key in "ab"] == ["stop", "length"]


def test_sampling_that_is_garbled_is_refused_and_vllms_own_is_not_read(stage: Stage) -> None:
    engine = stage.engine("e")
    with pytest.raises(RequestError, match="sampling"):
        engine.submit(work("a", sampling=VirtualSampling().encode()[:-1]))
    run(engine, work("a", sampling=b"\x93whatever"))


def test_tokens_are_those_that_a_vocabulary_spells_out(stage: Stage, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 800, "max_position_embeddings": 256}))
    engine = stage.engine("e", model=str(tmp_path), max_model_len=None)
    assert engine.describe().max_model_len == 256
    tokens = run(engine, work("a", max_tokens=150, prompt_token_ids=[1, 2, 799])).tokens["a"]
    assert min(tokens) >= 100
    assert max(tokens) < 700
    with pytest.raises(RequestError, match="vocabulary of 800"):
        engine.submit(work("b", prompt_token_ids=[800]))


def test_the_context_bounds_an_answer(stage: Stage) -> None:
    drive = run(stage.engine("e", max_model_len=64), work("a", 60, max_tokens=50))
    assert len(drive.tokens["a"]) == 4
    assert drive.finished["a"].finish_reason == "length"


# ---- memory ----------------------------------------------------------------------------------------------


def test_kv_that_holds_no_context_is_refused_at_the_start(stage: Stage) -> None:
    with pytest.raises(EngineStartError, match="raise kv_tokens or lower max_model_len"):
        stage.engine("e", kv_tokens=512, max_model_len=1024)


def test_more_works_than_rows_are_taken(stage: Stage) -> None:
    engine = stage.engine("e", max_num_seqs=8)
    works = [work(str(seed), 20 + seed, max_tokens=3, seed=seed) for seed in range(3 * FIRST_ROWS)]
    drive = run(engine, *works)
    assert {len(tokens) for tokens in drive.tokens.values()} == {3}
    assert len(drive.finished) == len(works)


def test_memory_that_runs_out_preempts_the_last_and_it_goes_on_later(stage: Stage) -> None:
    engine = stage.engine("e", kv_tokens=8 * BLOCK_TOKENS, max_model_len=256)
    alone = run(engine, work("b", 100, max_tokens=60, seed=1)).tokens["b"]
    engine.reset_prefix_cache()
    drive = run(engine, work("a", 100, max_tokens=60), work("b", 100, max_tokens=60, seed=1))
    assert drive.tokens["b"] == alone
    assert sum(report.preempted for report in drive.reports) > 0
    assert engine.usage().used_blocks == 0


def test_the_least_recently_used_prefix_is_forgotten_first(stage: Stage) -> None:
    engine = stage.engine("e", kv_tokens=10 * BLOCK_TOKENS, max_model_len=256)

    def cached(work_id: str, seed: int) -> int | None:
        engine.submit(work(work_id, 4 * BLOCK_TOKENS + 1, max_tokens=1, seed=seed))
        (output,) = engine.step(lambda _: BatchPlan()).outputs
        return output.cached_tokens

    assert [cached("a1", 1), cached("b1", 2)] == [0, 0]
    assert cached("a2", 1) == 4 * BLOCK_TOKENS
    assert cached("c1", 3) == 0  # 5 blocks, and no more than 10 in all: b goes, its end first
    assert cached("a3", 1) == 4 * BLOCK_TOKENS
    assert cached("b2", 2) == BLOCK_TOKENS


def test_no_cache_where_it_is_turned_off(stage: Stage) -> None:
    engine = stage.engine("e", enable_prefix_caching=False)
    run(engine, work("a", 100))
    drive = Drive(engine).submit(work("b", 100))
    report = drive.step()
    assert report is not None
    assert report.tokens == 100


# ---- transfers -------------------------------------------------------------------------------------------


def test_a_pull_takes_its_link_and_transfers_share_it(stage: Stage) -> None:
    source = stage.engine("source")
    targets = [stage.engine("t0"), stage.engine("t1")]
    handoffs = [offer(source, f"offer-{at}") for at in range(2)]
    began_s = stage.clock()
    drives = [
        Drive(target).submit(work("a", 100, max_tokens=1, handoff=handoff))
        for target, handoff in zip(targets, handoffs, strict=True)
    ]
    for drive in drives:
        assert drive.step() is None
    alone_s = 100 * BYTES_PER_TOKEN / 1e6
    assert [target.wake_s() - began_s for target in targets] == [
        pytest.approx(alone_s + 0.001),
        pytest.approx(2 * alone_s + 0.001),
    ]
    assert source.usage().used_blocks == 8
    stage.clock.advance(alone_s + 0.001 + 1e-9)
    assert drives[0].step() is not None
    (pull,) = targets[0].kv.take_pulls()
    assert (pull.outcome, pull.kv_bytes) == (PullOutcome.PULLED, 100 * BYTES_PER_TOKEN)
    assert pull.seconds == pytest.approx(alone_s + 0.001)
    Drive(source).step()
    assert source.usage().used_blocks == 4, "the first lease is over"
    source.kv.release("offer-1")
    run(targets[1], stage=stage)
    assert targets[1].kv.take_pulls()[0].outcome is PullOutcome.LEASE_LOST


def test_a_notified_source_is_stirred(stage: Stage) -> None:
    source, target = stage.engine("source"), stage.engine("target")
    stirred: list[str] = []
    source.kv.stirred = lambda: stirred.append("source")
    run(target, work("a", 100, handoff=offer(source)), stage=stage)
    assert stirred == ["source"]
    assert source.wake_s() <= stage.clock()


def test_what_the_target_has_cached_does_not_move(stage: Stage) -> None:
    source, target = stage.engine("source"), stage.engine("target")
    run(target, work("before", 4 * BLOCK_TOKENS))
    handoff = offer(source, length=4 * BLOCK_TOKENS)
    run(target, work("a", 4 * BLOCK_TOKENS, handoff=handoff), stage=stage)
    (pull,) = target.kv.take_pulls()
    assert (pull.outcome, pull.kv_bytes) == (PullOutcome.CACHED, 0)
    assert source.kv.leases() == []


def test_a_source_of_another_fabric_is_not_found_and_the_prompt_is_recomputed(stage: Stage) -> None:
    elsewhere = Stage()
    handoff = offer(elsewhere.engine("source"))
    target = stage.engine("target")
    drive = run(target, work("a", 100, handoff=handoff))
    assert len(drive.tokens["a"]) == 6
    (pull,) = target.kv.take_pulls()
    assert pull.outcome is PullOutcome.FAILED
    assert "another process" in pull.detail


def test_a_pull_that_waits_for_memory_is_late_at_its_deadline(stage: Stage) -> None:
    source = stage.engine("source")
    target = stage.engine("target", kv_tokens=8 * BLOCK_TOKENS, max_model_len=256)
    handoff = offer(source, length=200)
    drive = Drive(target).submit(work("long", 100, max_tokens=100, seed=5))
    drive.step()
    drive.submit(work("a", 200, handoff=handoff, pull_deadline_s=0.001))
    run(target, stage=stage)
    assert target.kv.take_pulls()[0].outcome is PullOutcome.LATE
    assert target.kv.held_blocks() == 0


# ---- whatever is asked -----------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6))
def test_blocks_are_conserved_whatever_is_asked(seed: int) -> None:
    """Works, plans, cancels, offers and pulls at random: in the end every block is free and no work is left."""
    draw = random.Random(seed)
    stage = Stage(latency_s=0.0005, bytes_per_s=1e7)
    sizes = {"kv_tokens": 24 * BLOCK_TOKENS, "max_model_len": 512, "max_num_seqs": 4, "max_batch_tokens": 128}
    engines = [stage.engine(name, lease_s=0.05, max_draft_tokens=2, **sizes) for name in ("x", "y")]
    drives = [Drive(engine) for engine in engines]
    handoffs: list[tuple[Handoff, int]] = []
    for turn in range(60):
        at = draw.randrange(2)
        engine, drive = engines[at], drives[at]
        kind = draw.random()
        if kind < 0.4:
            length, seed_of = draw.randrange(1, 300), draw.randrange(3)
            offers = draw.random() < 0.4
            engine.submit(work(f"w{turn}", length, draw.randrange(1, 20), seed_of, offer_kv=offers))
        elif kind < 0.5 and handoffs:
            handoff, length = draw.choice(handoffs)
            deadline_s = draw.choice([0.0, 0.002, 1.0])
            engine.submit(work(f"w{turn}", length, 5, handoff=handoff, pull_deadline_s=deadline_s))
        elif kind < 0.6:
            engine.cancel([f"w{draw.randrange(turn + 1)}"])
        keys = list(engine._works)
        plan = BatchPlan(
            order=draw.sample(keys, min(len(keys), 3)),
            skip=frozenset(draw.sample(keys, min(len(keys), draw.randrange(2)))),
            chunk_tokens={key: draw.randrange(1, 200) for key in draw.sample(keys, min(len(keys), 2))},
            preempt=draw.sample(keys, min(len(keys), draw.random() < 0.1)),
        )
        drive.step(draw.choice([plan, BatchPlan()]))
        offered = [output.handoff for output in drive.finished.values() if output.handoff is not None]
        handoffs += [(handoff, handoff.num_tokens) for handoff in offered]
        usage = engine.usage()
        assert 0 <= usage.used_blocks <= usage.num_blocks
        assert len(engine._prefixes._idle) <= usage.num_blocks - usage.used_blocks
        stage.clock.advance(draw.choice([0.0, 0.001, 0.02]))
    for _ in range(3):
        for engine in engines:
            run(engine, stage=stage)
    for engine in engines:
        assert engine.usage().used_blocks == 0
        assert engine.usage().waiting == engine.usage().running == 0
        assert engine.kv.held_blocks() == 0
        assert not engine._prefixes._holders
        assert len(engine._spare_rows) == len(engine._rows)
        assert engine.reset_prefix_cache()


def test_warming_up_leaves_nothing_behind() -> None:
    warm_up()


def test_the_configuration_is_what_an_actor_is_told() -> None:
    from engine.actor import build_engine

    config = virtual_config("e")
    settings = {name: getattr(config, name) for name in ("model", "cost", "kv_tokens", "kv_bytes_per_token")}
    engine = build_engine({"kind": "virtual", "engine_id": "e", **settings})
    assert isinstance(engine, VirtualEngine)
    assert engine.start().engine_id == "e"
    engine.stop()
