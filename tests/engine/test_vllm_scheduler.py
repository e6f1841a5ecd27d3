"""What a plan says is what vLLM does, and no plan changes a token. Each trap of its scheduler has a test."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from transformers import AutoTokenizer
from vllm.sampling_params import SamplingParams, StructuredOutputsParams

from engine.base import BatchPlan, Engine, Seq, Work
from engine.batch import Duty, Moment
from engine.batch import compose as compose_batch
from engine.cost import StepCost
from engine.errors import MissingHook, RequestError
from engine.models import make_model
from engine.vllm import decode_output, encode_sampling
from kv_transfer.base import PullOutcome
from tests.engine.replica import Drive, prompt, running_engine, vllms_own, work

pytestmark = pytest.mark.engines

SLOTS = 4
LENGTHS = (5, 40, 130, 33, 70, 12)
MAX_TOKENS = 16


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with running_engine(
        "planned",
        max_num_seqs=SLOTS,
        max_batch_tokens=128,
        num_blocks=40,
        enable_prefix_caching=False,
        side_channel_port=5741,
        reasoning_parser="deepseek_r1",
    ) as started:
        yield started


@pytest.fixture(autouse=True)
def _nothing_is_left(engine: Engine) -> Iterator[None]:
    yield
    assert engine.usage().used_blocks == 0
    assert not engine.has_work()


@pytest.fixture(scope="module")
def expected(engine: Engine) -> dict[str, list[int]]:
    """The tokens of each work when it runs alone."""
    tokens: dict[str, list[int]] = {}
    for item in works():
        tokens |= Drive(engine).submit(item).run().tokens
    return tokens


def works() -> list[Work]:
    return [work(f"w{i}", prompt(length, seed=i), MAX_TOKENS) for i, length in enumerate(LENGTHS)]


def test_an_empty_plan_is_vllms_default(engine: Engine, expected: dict[str, list[int]]) -> None:
    drive = Drive(engine).submit(*works()).run()
    assert drive.tokens == expected
    assert {output.finish_reason for output in drive.finished.values()} == {"length"}
    assert max(report.tokens for report in drive.reports) == 128
    assert max(report.seqs for report in drive.reports) == SLOTS


def test_skipped_sequences_wait_and_say_the_same(engine: Engine, expected: dict[str, list[int]]) -> None:
    turn = 0

    def every_other(seqs: Sequence[Seq]) -> BatchPlan:
        nonlocal turn
        turn += 1
        return BatchPlan(skip=frozenset(seq.work_id for i, seq in enumerate(seqs) if (i + turn) % 2))

    drive = Drive(engine, every_other).submit(*works())
    while engine.has_work():
        before = {key: list(tokens) for key, tokens in drive.tokens.items()}
        drive.step()
        skipped = every_other_skips(drive.seqs.values(), turn)
        assert all(drive.tokens.get(key) == before.get(key) for key in skipped)
    assert drive.tokens == expected


def every_other_skips(seqs: Sequence[Seq], turn: int) -> list[str]:
    return [seq.work_id for i, seq in enumerate(seqs) if (i + turn) % 2]


def test_order_of_the_plan_decides_who_is_first(engine: Engine, expected: dict[str, list[int]]) -> None:
    finished_prefill: list[str] = []

    def last_first(seqs: Sequence[Seq]) -> BatchPlan:
        return BatchPlan(order=[seq.work_id for seq in reversed(seqs)], max_tokens=60)

    drive = Drive(engine, last_first).submit(*works()[:SLOTS])
    while engine.has_work():
        drive.step()
        finished_prefill += [key for key in drive.tokens if key not in finished_prefill]
    assert drive.tokens == {key: expected[key] for key in drive.tokens}
    assert finished_prefill[0] == "w3"
    assert finished_prefill.index("w2") < finished_prefill.index("w0")


def test_a_pull_that_is_late_when_it_may_begin_makes_no_batch_longer(
    engine: Engine, expected: dict[str, list[int]]
) -> None:
    """vLLM would compute the whole prompt at once, in a batch in which nobody has planned it."""
    offering = Drive(engine).submit(work("offered", prompt(130, seed=2), 1, offer_kv=True))
    while "offered" not in offering.finished:
        offering.step()
    handoff = offering.finished["offered"].handoff
    assert handoff is not None
    engine.cancel(["offered"])
    offering.run()
    drive = Drive(engine).submit(works()[0])
    while "w0" not in drive.tokens:
        drive.step()
    drive.submit(work("w2", prompt(130, seed=2), MAX_TOKENS, handoff=handoff, pull_deadline_s=0.0))
    report = drive.step(BatchPlan(order=["w0", "w2"], chunk_tokens={"w0": 1}))
    assert report is not None
    assert report.tokens == 1
    drive.run()
    assert drive.tokens == {key: expected[key] for key in ("w0", "w2")}
    (pull,) = engine.kv.take_pulls()
    assert pull.outcome is PullOutcome.LATE


def test_a_seeded_request_says_the_same_however_its_prompt_is_cut(engine: Engine) -> None:
    params = SamplingParams(temperature=1.0, seed=7, max_tokens=8, ignore_eos=True, detokenize=False)
    seeded = Work("seeded", prompt(100, seed=5), encode_sampling(params), max_tokens=8)
    whole = Drive(engine).submit(seeded).run().tokens
    cut = Drive(engine, lambda _: BatchPlan(chunk_tokens={"seeded": 9})).submit(seeded).run().tokens
    assert cut == whole


def test_chunks_are_capped_one_by_one(engine: Engine, expected: dict[str, list[int]]) -> None:
    caps = {"w1": 7, "w2": 50}
    drive = Drive(engine, lambda _: BatchPlan(chunk_tokens=caps)).submit(*works()[:3])
    drive.step()
    computed = {}
    for _ in range(3):
        drive.step()
        computed = {key: seq.computed_tokens for key, seq in drive.seqs.items()}
    assert computed["w1"] == 3 * 7
    assert computed["w2"] == LENGTHS[2]
    drive.run()
    assert drive.tokens == {key: expected[key] for key in drive.tokens}


def test_a_batch_holds_no_more_than_the_plan_says(engine: Engine, expected: dict[str, list[int]]) -> None:
    drive = Drive(engine, lambda _: BatchPlan(max_tokens=16)).submit(*works()).run()
    assert drive.tokens == expected
    assert max(report.tokens for report in drive.reports) == 16


def test_a_preempted_sequence_stays_out_of_that_batch_and_comes_back(
    engine: Engine, expected: dict[str, list[int]]
) -> None:
    drive = Drive(engine).submit(*works()[:2])
    for _ in range(3):
        drive.step()
    said = len(drive.tokens["w1"])
    report = drive.step(BatchPlan(preempt=["w1"]))
    assert report is not None
    assert (report.preempted, report.seqs) == (1, 1)
    assert len(drive.tokens["w1"]) == said
    drive.step()
    assert not drive.seqs["w1"].running
    assert drive.seqs["w1"].computed_tokens == 0
    assert drive.seqs["w1"].output_tokens == said
    drive.run()
    assert drive.tokens == {key: expected[key] for key in drive.tokens}


def test_held_sequences_keep_their_slots(engine: Engine, expected: dict[str, list[int]]) -> None:
    drive = Drive(engine).submit(*works())
    while engine.usage().running < SLOTS:
        drive.step()
    held = frozenset(key for key, seq in drive.seqs.items() if seq.running) | {"w0", "w1", "w2", "w3"}
    for _ in range(4):
        assert drive.step(BatchPlan(skip=held)) is None
        assert (engine.usage().running, engine.usage().waiting) == (SLOTS, len(LENGTHS) - SLOTS)
    drive.run()
    assert drive.tokens == expected


@pytest.mark.parametrize("held", [BatchPlan(skip=frozenset({"w0"})), BatchPlan(chunk_tokens={"w0": 0})])
def test_a_waiting_work_that_is_held_blocks_nobody(
    engine: Engine, expected: dict[str, list[int]], held: BatchPlan
) -> None:
    drive = Drive(engine).submit(*works()[:3])
    while len(drive.finished) < 2:
        drive.step(held)
    assert set(drive.finished) == {"w1", "w2"}
    assert "w0" not in drive.tokens
    drive.run()
    assert drive.tokens == {key: expected[key] for key in drive.tokens}


def test_queues_keep_their_order_when_a_plan_is_over(engine: Engine) -> None:
    drive = Drive(engine).submit(*works())
    for _ in range(3):
        drive.step(BatchPlan(order=["w5", "w3", "w1"], skip=frozenset({"w0", "w4"}), max_tokens=8))
    drive.step(BatchPlan(max_tokens=0))
    waiting = [key for key, seq in drive.seqs.items() if not seq.running]
    assert waiting == sorted(waiting)
    engine.cancel(list(drive.seqs))
    drive.run()


def test_a_plan_about_nothing_that_exists_does_no_harm(engine: Engine, expected: dict[str, list[int]]) -> None:
    nonsense = BatchPlan(
        order=["gone", "w0", "w0", "gone"],
        chunk_tokens={"gone": 3, "w1": -4},
        skip=frozenset({"gone"}),
        depth={"gone": 2, "w0": -1},
        max_tokens=10**9,
        preempt=["gone", "w0", "w1"],
    )
    drive = Drive(engine).submit(*works()[:2])
    for _ in range(3):
        drive.step(nonsense)
    assert drive.step(BatchPlan(max_tokens=-5)) is None
    drive.run()
    assert drive.tokens == {key: expected[key] for key in drive.tokens}


def test_when_memory_is_short_those_that_are_held_give_it(engine: Engine) -> None:
    first, held = work("first", prompt(600, seed=2), 24), work("held", prompt(620, seed=1), 8)
    alone = Drive(engine).submit(first).run().submit(held).run()
    drive = Drive(engine).submit(held, first)
    while "held" not in drive.tokens:
        drive.step()
    while "first" not in drive.finished:
        drive.step(BatchPlan(skip=frozenset({"held"})))
    assert sum(report.preempted for report in drive.reports) == 1
    assert drive.run().tokens == alone.tokens


def test_a_promise_gets_the_slots_and_the_memory_of_best_effort(
    engine: Engine, expected: dict[str, list[int]]
) -> None:
    duties = {"promised": Duty("promised", first_token_due_s=0.0, tpot_s=1.0)}

    def compose(seqs: Sequence[Seq]) -> BatchPlan:
        return compose_batch(seqs, duties, Moment(0.0, StepCost.line(1e-3, 1e-5), 128))

    best_effort = works()[:SLOTS]
    drive = Drive(engine, compose).submit(*best_effort)
    while len(drive.tokens) < SLOTS:
        drive.step()
    drive.submit(work("promised", prompt(1000, seed=3), 2))
    while "promised" not in drive.finished:
        drive.step()
    assert sum(report.preempted for report in drive.reports) >= 1
    assert not all(item.work_id in drive.finished for item in best_effort)
    drive.run()
    assert all(drive.tokens[item.work_id] == expected[item.work_id] for item in best_effort)


def test_a_grammar_is_kept_under_any_plan(engine: Engine) -> None:
    turns = itertools.count()

    def every_third(seqs: Sequence[Seq]) -> BatchPlan:
        held = next(turns) % 3 == 0 and any(seq.decoding for seq in seqs)
        return BatchPlan(skip=frozenset(seq.work_id for seq in seqs if held), chunk_tokens={"json": 9})

    drive = Drive(engine, every_third).submit(json_work("json"))
    drive.run()
    assert json.loads(text_of(drive.tokens["json"])) in ({"tool": "search"}, {"tool": "open"})
    assert drive.finished["json"].finish_reason == "stop"
    drive.compose = vllms_own
    assert drive.submit(json_work("again")).run().tokens["again"] == drive.tokens["json"]


def test_a_grammar_holds_from_the_end_of_thinking_on_also_where_it_goes_on_elsewhere(engine: Engine) -> None:
    whole = Drive(engine).submit(json_work("whole", thinks=True)).run().tokens["whole"]
    assert whole[0] == think_end_id(), "what is thought is under no grammar"
    assert json.loads(text_of(whole[1:])) in ({"tool": "search"}, {"tool": "open"})
    for count in (1, 4):
        rest = replace(json_work(f"after {count}", thinks=True), said_token_ids=whole[:count])
        assert [*whole[:count], *Drive(engine).submit(rest).run().tokens[rest.work_id]] == whole


def test_a_grammar_that_does_not_compile_ends_its_work_alone(
    engine: Engine, expected: dict[str, list[int]]
) -> None:
    drive = Drive(engine)
    with contextlib.suppress(RequestError):  # vLLM may see it at once, or when it has compiled it
        drive.submit(json_work("broken", schema={"type": "no such type"}))
    drive.submit(works()[0]).run()
    assert drive.tokens["w0"] == expected["w0"]
    if "broken" in drive.finished:
        assert drive.finished["broken"].finish_reason == "error"
        assert drive.finished["broken"].error


def test_logprobs_come_with_the_tokens(engine: Engine, expected: dict[str, list[int]]) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True, logprobs=2, prompt_logprobs=1)
    engine.submit(replace(works()[0], sampling=encode_sampling(params)))
    outputs = [decode_output(output, "request") for _ in range(5) for output in engine.step(vllms_own).outputs]
    assert [output.new_token_ids for output in outputs] == [[token] for token in expected["w0"][:3]]
    for output in outputs:
        assert output.new_logprobs is not None
        assert output.new_logprobs.logprob_token_ids[0][0] == output.new_token_ids[0]
    assert outputs[0].new_prompt_logprobs_tensors is not None
    assert len(outputs[0].new_prompt_logprobs_tensors.logprobs) == LENGTHS[0] - 1


def json_work(work_id: str, schema: dict[str, Any] | None = None, *, thinks: bool = False) -> Work:
    """An answer under a grammar; one that `thinks` is made to say that it has thought enough, over and over."""
    tools: dict[str, Any] = {"type": "object", "required": ["tool"]}
    tools["properties"] = {"tool": {"enum": ["search", "open"]}}
    params = SamplingParams(temperature=0.0, max_tokens=60)
    params.structured_outputs = StructuredOutputsParams(json=schema or {**tools, "additionalProperties": False})
    params.structured_outputs._backend = "xgrammar"  # as vLLM's input processor leaves it
    params.update_from_generation_config({}, tokenizer().eos_token_id)
    params.logit_bias = {think_end_id(): 100.0} if thinks else None
    reasoning = {"reasoning_ended": not thinks}
    return Work(work_id, prompt(20, seed=8), encode_sampling(params, reasoning), max_tokens=60)


def think_end_id() -> int:
    return int(tokenizer().get_vocab()["</think>"])


def text_of(tokens: Sequence[int]) -> str:
    return str(tokenizer().decode(tokens, skip_special_tokens=True))


@cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(make_model("tiny"))


# ---- going on where another engine was ---------------------------------------------------------------------

SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "penalties": {"temperature": 0.0, "presence_penalty": 1.5, "repetition_penalty": 1.3},
    "seeded": {"temperature": 1.0, "seed": 7},
    "seeded, of few": {"temperature": 0.8, "seed": 8, "top_p": 0.9, "top_k": 40},
    "seeded, with penalties": {"temperature": 1.0, "seed": 9, "frequency_penalty": 1.0},
}


@pytest.mark.parametrize("sampling", list(SAMPLINGS))
def test_what_goes_on_elsewhere_says_what_it_would_have_said(engine: Engine, sampling: str) -> None:
    params = SamplingParams(max_tokens=24, ignore_eos=True, detokenize=False, **SAMPLINGS[sampling])
    item = Work("whole", prompt(60, seed=4), encode_sampling(params), max_tokens=24)
    whole = Drive(engine).submit(item).run().tokens["whole"]
    parts = {f"after {count}": count for count in (1, 8, 23)}
    others = [replace(item, work_id=key, said_token_ids=whole[:count]) for key, count in parts.items()]
    drive = Drive(engine, lambda seqs: BatchPlan(chunk_tokens={seq.work_id: 25 for seq in seqs}))
    drive.submit(*others).run()
    for key, count in parts.items():
        assert [*whole[:count], *drive.tokens[key]] == whole
    assert {drive.finished[key].finish_reason for key in parts} == {"length"}


def test_what_goes_on_elsewhere_may_not_stop_before_its_least_length(engine: Engine) -> None:
    first = Drive(engine).submit(work("first", prompt(30, seed=6), 12)).run().tokens["first"]
    stop = next(token for at, token in enumerate(first) if token not in first[:at] and at >= 5)
    params = SamplingParams(temperature=0.0, max_tokens=12, min_tokens=9, stop_token_ids=[stop])
    params.update_from_generation_config({}, tokenizer().eos_token_id)
    item = Work("whole", prompt(30, seed=6), encode_sampling(params), max_tokens=12)
    whole = Drive(engine).submit(item).run().tokens["whole"]
    assert len(whole) >= 9
    rest = Drive(engine).submit(replace(item, work_id="rest", said_token_ids=whole[:3])).run().tokens["rest"]
    assert [*whole[:3], *rest] == whole


def test_a_grammar_goes_on_elsewhere_where_it_was(engine: Engine) -> None:
    whole = Drive(engine).submit(json_work("whole")).run().tokens["whole"]
    for count in (1, len(whole) // 2, len(whole) - 1):
        rest = replace(json_work(f"after {count}"), said_token_ids=whole[:count])
        drive = Drive(engine).submit(rest).run()
        assert [*whole[:count], *drive.tokens[rest.work_id]] == whole
        assert drive.finished[rest.work_id].finish_reason == "stop"


def test_what_goes_on_elsewhere_may_be_preempted_there(engine: Engine, expected: dict[str, list[int]]) -> None:
    rest = replace(works()[2], said_token_ids=expected["w2"][:5])
    drive = Drive(engine).submit(rest)
    for _ in range(4):
        drive.step()
    drive.step(BatchPlan(preempt=["w2"]))
    drive.run()
    assert [*expected["w2"][:5], *drive.tokens["w2"]] == expected["w2"]


def test_one_that_is_cancelled_before_it_goes_on_leaves_nothing(
    engine: Engine, expected: dict[str, list[int]]
) -> None:
    engine.submit(replace(works()[2], said_token_ids=expected["w2"][:5]))
    engine.cancel(["w2"])
    assert Drive(engine).submit(works()[2]).run().tokens["w2"] == expected["w2"]


def test_a_report_counts_what_the_batch_held(engine: Engine) -> None:
    drive = Drive(engine).submit(work("a", prompt(10, seed=1), 5), work("b", prompt(100, seed=2), 5))
    first = drive.step(BatchPlan(chunk_tokens={"b": 60}))
    second = drive.step(BatchPlan(chunk_tokens={"b": 20}))
    assert first is not None
    assert second is not None
    assert (first.tokens, first.seqs, first.decode_seqs, first.prefill_work) == (
        70,
        2,
        0,
        10**2 / 2 + 60**2 / 2,
    )
    assert (second.tokens, second.decode_seqs, second.decode_context_tokens) == (21, 1, 10)
    assert second.prefill_work == 20 * (60 + 10)
    assert 0 < second.planning_s < second.seconds < 10
    drive.compose = vllms_own
    drive.run()


@pytest.mark.parametrize("name", ["_reserve_prefill_lookahead", "_preempt_request", "update_from_output"])
def test_a_missing_hook_is_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    from vllm.v1.core.sched.scheduler import Scheduler

    from engine.vllm_scheduler import check_hooks

    check_hooks()
    monkeypatch.delattr(Scheduler, name)
    with pytest.raises(MissingHook, match=rf"vLLM \d.* has no Scheduler.{name}.*Install vLLM"):
        check_hooks()


def test_a_hook_with_another_signature_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.core.sched.scheduler import Scheduler

    from engine.vllm_scheduler import check_hooks

    monkeypatch.setattr(Scheduler, "_preempt_request", lambda self, request: None)
    with pytest.raises(MissingHook, match=r"Scheduler._preempt_request without the parameter timestamp"):
        check_hooks()


def test_a_hook_that_is_no_longer_called_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.core.sched.scheduler import Scheduler

    from engine.vllm_scheduler import check_hooks

    def schedule(self: object, throttle_prefills: bool = False) -> None:
        """Calls nothing that we override."""

    monkeypatch.setattr(Scheduler, "schedule", schedule)
    with pytest.raises(MissingHook, match=r"Scheduler.schedule that does not use _reserve_prefill_lookahead"):
        check_hooks()
