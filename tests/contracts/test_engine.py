"""The engine contract: what every engine must do, whatever runs behind it."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import pytest

from engine.base import BatchPlan, Engine, EngineInfo, Seq, Work
from engine.cost import StepCost
from engine.errors import EngineError, RequestError
from engine.prefix import PREFIX_BLOCK_TOKENS, prefix_hashes
from engine.virtual import VirtualEngine
from engine.virtual_tokens import VirtualSampling
from engine.vllm import VllmEngine, encode_sampling
from kv_transfer.base import Handoff, PullOutcome
from tests.engine.replica import Drive, greedy, prompt, running_engine
from tests.engine.virtual_replica import virtual_engine

pytestmark = pytest.mark.engines

MAX_TOKENS = 6


@dataclass(frozen=True, slots=True)
class Kind:
    """An engine under the contract: how it is started, its encoding of greedy sampling, and of such as ends an
    answer with the first token, which is given."""

    start: Callable[[], AbstractContextManager[VllmEngine | VirtualEngine]]
    sampling: Callable[[int], bytes]
    ending: Callable[[int], bytes]


def _ending_at(token: int) -> bytes:
    from vllm.sampling_params import SamplingParams

    return encode_sampling(SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, stop_token_ids=[token]))


KINDS = {
    "vllm": Kind(
        start=lambda: running_engine(
            "contract", max_num_seqs=4, max_batch_tokens=128, num_blocks=80, side_channel_port=5743
        ),
        sampling=greedy,
        ending=_ending_at,
    ),
    "virtual": Kind(
        start=lambda: virtual_engine(
            "contract", max_num_seqs=4, max_batch_tokens=128, kv_tokens=80 * 32, max_model_len=1024
        ),
        sampling=lambda max_tokens: VirtualSampling().encode(),
        ending=lambda token: VirtualSampling(stop_after=1).encode(),
    ),
}


@pytest.fixture(scope="module", params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


@pytest.fixture(scope="module")
def engine(kind: Kind) -> Iterator[VllmEngine | VirtualEngine]:
    with kind.start() as started:
        yield started
    with pytest.raises(EngineError, match="not running"):
        started.usage()


@pytest.fixture
def make(kind: Kind) -> Callable[..., Work]:
    def work(work_id: str, length: int, max_tokens: int = MAX_TOKENS, seed: int = 0, **more: object) -> Work:
        tokens = prompt(length, seed)
        return replace(Work(work_id, tokens, kind.sampling(max_tokens), max_tokens), **more)

    return work


@pytest.fixture(autouse=True)
def _all_comes_back(engine: VllmEngine | VirtualEngine) -> Iterator[None]:
    """Whatever a test did: no block is used after it, and nothing is left to do."""
    assert engine.reset_prefix_cache()
    yield
    Drive(engine).run()
    usage = engine.usage()
    assert (usage.used_blocks, usage.running, usage.waiting) == (0, 0, 0)


def test_info_says_what_the_engine_is(engine: VllmEngine | VirtualEngine) -> None:
    info: EngineInfo = engine.describe()
    assert info.engine
    assert info.engine_id == "contract"
    assert engine.usage().num_blocks == info.num_blocks > 0
    assert info.max_num_seqs == 4
    assert info.max_batch_tokens == 128
    assert info.max_model_len == 1024
    assert info.kv_bytes_per_token > 0


def test_a_work_gets_its_tokens_and_ends_once(engine: Engine, make: Callable[..., Work]) -> None:
    engine.submit(make("a", 50))
    outputs = []
    while engine.has_work():
        outputs += engine.step(lambda _: BatchPlan()).outputs
    assert {output.work_id for output in outputs} == {"a"}
    assert sum(len(output.token_ids) for output in outputs) == MAX_TOKENS
    assert [output.finish_reason for output in outputs if output.finish_reason] == ["length"]
    assert outputs[-1].finish_reason == "length"
    assert [output.cached_tokens for output in outputs] == [0] + [None] * (len(outputs) - 1)
    assert all(output.error is None for output in outputs)


def test_the_same_work_gets_the_same_tokens_alone_or_among_others(
    engine: Engine, make: Callable[..., Work]
) -> None:
    alone = Drive(engine).submit(make("a", 90)).run().tokens["a"]
    others = [make(f"o{i}", 20 + 30 * i, seed=i + 1) for i in range(5)]
    assert Drive(engine).submit(*others, make("a", 90)).run().tokens["a"] == alone


def test_a_prefix_is_found_again_until_it_is_forgotten(engine: Engine, make: Callable[..., Work]) -> None:
    def cached(work_id: str, **more: object) -> int | None:
        engine.submit(make(work_id, 100, **more))
        (first, *_) = [o for _ in range(20) for o in engine.step(lambda _: BatchPlan()).outputs]
        return first.cached_tokens

    assert cached("a") == 0
    assert cached("b") == 96
    assert cached("salted", cache_salt="other tenant") == 0
    assert engine.usage().used_blocks == 0, "a cached prefix that nobody holds is free"
    Drive(engine).run()
    assert engine.reset_prefix_cache()
    assert cached("c") == 0


def test_what_it_says_its_cache_holds_is_what_the_next_work_finds(
    engine: Engine, make: Callable[..., Work]
) -> None:
    """Prompts of half as much again as there is memory, in turns: the oldest give way to the others."""
    assert len(engine.prefixes) == 0
    draw, found = random.Random(3), Counter[int]()
    salts = [None, "one tenant", "another"]
    for turn in range(40):
        seed = draw.randrange(6)
        work = make(f"turn-{turn}", 680, seed=seed, cache_salt=salts[seed % 3])
        names = prefix_hashes(work.prompt_token_ids, work.cache_salt)
        held = [name in engine.prefixes for name in names]
        told = (held.index(False) if False in held else len(held)) * PREFIX_BLOCK_TOKENS
        engine.submit(work)
        (cached, *_) = [
            output.cached_tokens
            for _ in iter(engine.has_work, False)
            for output in engine.step(lambda _: BatchPlan()).outputs
        ]
        assert cached is not None
        assert told <= cached < told + PREFIX_BLOCK_TOKENS, (turn, held)
        assert all(name in engine.prefixes for name in names), "it has just been there"
        found[told] += 1
    assert len(found) > 2, "some were there, some were not, some in part"
    assert engine.reset_prefix_cache()
    assert len(engine.prefixes) == 0


# ---- what is kept for sessions: 80 blocks of 32 tokens -------------------------------------------------------


def _churn(engine: Engine, make: Callable[..., Work], works: int = 6) -> None:
    """Works that pass through all of the memory, one after another, and leave their prefixes in it."""
    for number in range(works):
        Drive(engine).submit(make(f"churn-{number}", 900, seed=100 + number)).run()


def _cached(engine: Engine, make: Callable[..., Work], length: int, **more: object) -> int | None:
    engine.submit(make("again", length, **more))
    outputs = []
    while not any(output.finish_reason for output in outputs):
        outputs += engine.step(lambda _: BatchPlan()).outputs
    return outputs[0].cached_tokens


def test_what_is_kept_for_a_session_outlasts_what_passes_through(
    engine: Engine, make: Callable[..., Work]
) -> None:
    Drive(engine).submit(make("mine", 300, session="s"), make("other", 300, seed=1)).run()
    assert engine.kept() == {"s": 288}
    assert engine.usage().used_blocks == 0, "it is free for whoever needs it"
    _churn(engine, make)
    assert _cached(engine, make, 300) == 288
    _churn(engine, make)
    assert _cached(engine, make, 300, seed=1) == 0
    engine.give_up(["s", "nobody"])
    assert engine.kept() == {}
    _churn(engine, make)
    assert _cached(engine, make, 300) == 0


def test_the_next_call_of_a_session_takes_the_place_of_the_one_before(
    engine: Engine, make: Callable[..., Work]
) -> None:
    Drive(engine).submit(make("first", 200, session="s")).run()
    Drive(engine).submit(make("second", 500, seed=3, session="s")).run()
    assert engine.kept() == {"s": 480}
    Drive(engine).submit(make("cancelled", 700, seed=4, session="s"))
    engine.step(lambda _: BatchPlan())
    engine.cancel(["cancelled"])
    assert engine.kept() == {"s": 480}, "what did not end is no history"


def test_what_is_cut_when_it_has_said_enough_is_history(engine: Engine, make: Callable[..., Work]) -> None:
    """A stop string is found by who reads the text, not by the engine."""
    drive = Drive(engine).submit(make("mine", 300, session="s"))
    while not drive.tokens.get("mine"):
        drive.step()
    engine.cancel(["mine"], ended=True)
    assert engine.kept() == {"s": 288}
    assert engine.usage().used_blocks == 0


def test_sessions_make_room_for_works_the_one_that_was_used_longest_ago_first(
    engine: Engine, make: Callable[..., Work]
) -> None:
    for number in range(4):
        Drive(engine).submit(make(f"call-{number}", 500, seed=number, session=f"s{number}")).run()
    Drive(engine).submit(make("call-again", 500, seed=0, session="s0")).run()
    assert list(engine.kept()) == ["s1", "s2", "s3", "s0"]
    alone = make("large", 1000, seed=50)
    drive = Drive(engine).submit(alone, make("large-too", 1000, seed=51))
    drive.run()
    assert {len(drive.tokens[name]) for name in ("large", "large-too")} == {MAX_TOKENS}
    left = list(engine.kept())
    assert left == ["s1", "s2", "s3", "s0"][4 - len(left) :]
    assert 0 < len(left) < 4
    assert _cached(engine, make, 500, seed=0) == 480


def test_a_thousand_idle_sessions_take_no_more_than_there_is(engine: Engine, make: Callable[..., Work]) -> None:
    for number in range(200):
        Drive(engine).submit(make(f"call-{number}", 70, 1, seed=number, session=f"s{number}")).run()
    kept = engine.kept()
    assert sum(kept.values()) <= engine.usage().num_blocks * 32
    assert "s199" in kept
    assert "s0" not in kept
    assert engine.usage().used_blocks == 0


def test_offered_kv_of_a_session_is_kept_when_its_lease_ends(engine: Engine, make: Callable[..., Work]) -> None:
    drive = Drive(engine).submit(make("a", 300, offer_kv=True, session="s"))
    while "a" not in drive.finished:
        drive.step()
    assert engine.kv.release("a")
    drive.run()
    assert engine.kept() == {"s": 288}
    _churn(engine, make)
    assert _cached(engine, make, 300) == 288


def test_the_composer_sees_each_sequence_as_it_stands(engine: Engine, make: Callable[..., Work]) -> None:
    drive = Drive(engine).submit(make("a", 50))
    drive.step(BatchPlan(max_tokens=30))
    assert drive.seqs["a"] == Seq("a", 50, 0, 0, running=False)
    drive.step(BatchPlan())
    assert drive.seqs["a"] == Seq("a", 50, 30, 0, running=True)
    assert drive.seqs["a"].prefill_left == 19
    drive.step(BatchPlan())
    assert drive.seqs["a"] == Seq("a", 50, 50, 1, running=True)
    assert drive.seqs["a"].decoding


def test_a_step_with_nothing_to_do_returns_at_once(engine: Engine) -> None:
    Drive(engine).run()
    assert not engine.has_work()
    result = engine.step(lambda _: BatchPlan())
    assert (list(result.outputs), result.report) == ([], None)


def test_a_plan_decides_who_is_in_a_batch(engine: Engine, make: Callable[..., Work]) -> None:
    drive = Drive(engine).submit(make("a", 40), make("b", 40, seed=1), make("c", 40, seed=2))
    report = drive.step(
        BatchPlan(order=["c", "b"], chunk_tokens={"c": 25}, skip=frozenset({"a", "gone"}), max_tokens=50)
    )
    assert report is not None
    assert (report.tokens, report.seqs, report.decode_seqs) == (50, 2, 0)
    drive.step(BatchPlan(skip=frozenset({"a", "b", "c"})))
    assert [drive.seqs[key].computed_tokens for key in "abc"] == [0, 25, 25]
    drive.run()
    assert {key: len(tokens) for key, tokens in drive.tokens.items()} == dict.fromkeys("abc", MAX_TOKENS)


def test_a_preempted_work_goes_on_where_it_was(engine: Engine, make: Callable[..., Work]) -> None:
    alone = Drive(engine).submit(make("a", 60)).run().tokens["a"]
    drive = Drive(engine).submit(make("a", 60))
    for _ in range(3):
        drive.step()
    drive.step(BatchPlan(preempt=["a"]))
    assert engine.usage().used_blocks == 0
    assert drive.run().tokens["a"] == alone


def test_a_work_goes_on_after_what_was_said_of_it_elsewhere(engine: Engine, make: Callable[..., Work]) -> None:
    item = make("whole", 90)
    whole = Drive(engine).submit(item).run().tokens["whole"]
    for said in (1, MAX_TOKENS - 1):
        rest = replace(item, work_id=f"after {said}", said_token_ids=whole[:said])
        drive = Drive(engine).submit(rest).run()  # what is cached goes beyond the prompt
        assert [*whole[:said], *drive.tokens[rest.work_id]] == whole
        assert drive.finished[rest.work_id].finish_reason == "length"


def test_a_work_that_goes_on_computes_what_was_said_behind_kv_that_did_not_come(
    engine: Engine, make: Callable[..., Work]
) -> None:
    item = make("whole", 90)
    whole = Drive(engine).submit(item).run().tokens["whole"]
    offered = _taken_back(engine, make("offer", 90, offer_kv=True))
    rest = replace(item, work_id="rest", said_token_ids=whole[:3], pull_deadline_s=0.5)
    drive = Drive(engine).submit(replace(rest, handoff=_from_nowhere(offered)))
    while engine.has_work():
        drive.step()
    engine.kv.take_pulls()
    assert [*whole[:3], *drive.tokens["rest"]] == whole


@pytest.mark.parametrize("phase", ["waiting", "prefill", "decode", "held", "preempted", "offered"])
def test_cancel_frees_all_in_every_phase(engine: Engine, make: Callable[..., Work], phase: str) -> None:
    drive = Drive(engine).submit(make("a", 300, max_tokens=50, offer_kv=phase == "offered"))
    steps = {"waiting": 0, "prefill": 1, "decode": 5, "held": 5, "preempted": 5, "offered": 4}
    for _ in range(steps[phase]):
        drive.step()
    if phase == "held":
        drive.step(BatchPlan(skip=frozenset({"a"})))
    if phase == "preempted":
        drive.step(BatchPlan(preempt=["a"]))
    said = len(drive.tokens.get("a", []))
    assert (said > 0) == (phase in ("decode", "held", "preempted", "offered"))
    assert (engine.usage().used_blocks > 0) == (phase not in ("waiting", "preempted"))
    engine.cancel(["a", "unknown"])
    engine.cancel(["a"])
    drive.run()
    assert engine.usage().used_blocks == 0
    assert len(drive.tokens.get("a", [])) == said, "nothing is said after a cancel"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_token_ids": []}, "empty"),
        ({"prompt_token_ids": [1] * 1024}, "1024 tokens.*shorten"),
        ({"prompt_token_ids": [10**9]}, "vocabulary"),
        ({"prompt_token_ids": [-1]}, "vocabulary"),
        ({"work_id": "taken"}, "already"),
    ],
)
def test_what_could_never_run_is_refused(
    engine: Engine, make: Callable[..., Work], change: dict[str, object], message: str
) -> None:
    drive = Drive(engine).submit(make("taken", 10))
    with pytest.raises(RequestError, match=message):
        engine.submit(replace(make("new", 10), **change))
    drive.run()
    assert set(drive.finished) == {"taken"}


def test_offered_kv_stays_until_it_is_released(engine: Engine, make: Callable[..., Work]) -> None:
    whole = Drive(engine).submit(make("whole", 100)).run().tokens["whole"]
    assert engine.reset_prefix_cache()
    drive = Drive(engine).submit(make("a", 100, offer_kv=True))
    while "a" not in drive.finished:
        drive.step()
    output = drive.finished["a"]
    assert output.handoff is not None
    assert (output.finish_reason, list(output.token_ids), output.error) == ("length", whole[:1], None)
    assert (output.handoff.source, output.handoff.num_tokens) == ("contract", 100)
    assert output.handoff.kv_bytes > 0
    for _ in range(3):
        drive.step()
    assert engine.has_work()
    assert engine.usage().used_blocks == 4
    assert [(lease.request_id, lease.num_blocks) for lease in engine.kv.leases()] == [("a", 4)]
    assert engine.kv.release("a")
    drive.run()
    assert engine.kv.leases() == []
    assert not engine.kv.release("a")


def test_an_answer_that_ends_with_its_first_token_is_not_offered(
    engine: Engine, make: Callable[..., Work], kind: Kind
) -> None:
    first = Drive(engine).submit(make("whole", 100)).run().tokens["whole"][0]
    drive = Drive(engine).submit(make("a", 100, offer_kv=True, sampling=kind.ending(first))).run()
    output = drive.finished["a"]
    assert (output.finish_reason, list(output.token_ids), output.handoff) == ("stop", [first], None)


def test_an_offer_of_an_answer_that_has_begun_needs_no_sampling(
    engine: Engine, make: Callable[..., Work]
) -> None:
    drive = Drive(engine).submit(make("a", 100, offer_kv=True, sampling=b""))
    while "a" not in drive.finished:
        drive.step()
    assert drive.finished["a"].handoff is not None
    assert engine.kv.release("a")


def test_a_handoff_that_cannot_be_pulled_is_computed_anew(engine: Engine, make: Callable[..., Work]) -> None:
    alone = Drive(engine).submit(make("alone", 100)).run().tokens["alone"]
    offered = _taken_back(engine, make("a", 100, offer_kv=True))
    gone = _from_nowhere(offered)
    drive = Drive(engine).submit(make("b", 100, handoff=gone, pull_deadline_s=0.5))
    while engine.has_work():
        drive.step()
    assert drive.tokens["b"] == alone
    (pull,) = engine.kv.take_pulls()
    assert pull.request_id == "b"
    assert pull.outcome in (PullOutcome.FAILED, PullOutcome.LATE)


def _taken_back(engine: Engine, work: Work) -> Handoff:
    """An offer whose lease is over, and of which no KV is left."""
    drive = Drive(engine).submit(work)
    while work.work_id not in drive.finished:
        drive.step()
    offered = drive.finished[work.work_id].handoff
    assert offered is not None
    engine.cancel([work.work_id])
    drive.run()
    assert engine.reset_prefix_cache()
    return offered


def _from_nowhere(offered: Handoff) -> Handoff:
    """The same offer, of an engine that does not exist at a port where nobody listens."""
    params = {**offered.params, "remote_engine_id": "nowhere", "remote_port": 1}
    return replace(offered, source="nowhere", params=params)


def test_profile_leaves_the_engine_clean(engine: VllmEngine | VirtualEngine) -> None:
    reports = engine.profile_step_times()
    assert engine.usage().used_blocks == 0
    assert not engine.has_work()
    assert {report.seqs for report in reports} == {1, 4}
    assert max(report.tokens for report in reports) == 128
    cost = StepCost.fit(reports)
    assert 0 < cost.predict(1) <= cost.predict(128) < 60


def test_profile_needs_an_idle_engine(engine: VllmEngine | VirtualEngine, make: Callable[..., Work]) -> None:
    engine.submit(make("a", 10))
    with pytest.raises(EngineError, match="idle"):
        engine.profile_step_times()


def test_the_composer_is_asked_in_every_step_about_what_is_not_over(
    engine: Engine, make: Callable[..., Work]
) -> None:
    asked: list[Sequence[Seq]] = []

    def compose(seqs: Sequence[Seq]) -> BatchPlan:
        asked.append(seqs)
        return BatchPlan()

    drive = Drive(engine, compose).submit(make("a", 10, max_tokens=2), make("b", 10, max_tokens=4, seed=1))
    drive.run()
    assert [len(seqs) for seqs in asked[:4]] == [2, 2, 1, 1]
