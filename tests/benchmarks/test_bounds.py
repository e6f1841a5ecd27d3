"""The bounds: published figures, exact optima of small problems, and schedules that never beat them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from benchmarks.bounds.blind import blind_capacity, groups, least_s, segments
from benchmarks.bounds.bound import bound, clairvoyant, clairvoyant_capacity
from benchmarks.bounds.paced import most_paced
from benchmarks.bounds.windows import Windows, faster, most_placed
from benchmarks.bounds.work import Demand, Price, cheapest_s, request_work_s, tightest
from benchmarks.traffic import APPLICATIONS, Lengths
from benchmarks.workload import Workload
from coordinator.config import PAPER_SLO_CLASSES, SloClass
from engine.cost import Piece, StepCost
from engine.request import Slo
from engine.score import score

PAPER, KV_TOKENS = StepCost.line(24.8e-3, 6.88e-5), 40_000
DRAFTING = StepCost((Piece(24.8e-3, 6.88e-5, 1.2e-6), Piece(3.0e-3, 7.52e-5, 3.46e-3)))
RICH = StepCost(
    (Piece(0.02, 1e-5), Piece(0.012, 8e-5)),
    per_context_token_s=3e-7,
    per_prefill_work_s=3e-9,
    per_seq_s=2e-5,
    per_prefill_kv_token_s=1e-7,
    drift=1.1,
)
# Requests per second and replica: everybody served, 90 % clairvoyant, 90 % length-blind.
PUBLISHED = {"chatbot": (4.45, 6.04, 5.49), "summarizer": (3.39, 4.99, 4.03), "coder": (13.9, 18.8, 18.1)}


def _workload(
    arrival_s: list[float],
    prompt: list[int],
    output: list[int],
    promised: SloClass,
    **columns: list[int] | list[float] | float,
) -> Workload:
    """One class, no chains, nothing cached, but for `columns`; all of it counts."""
    count = len(arrival_s)
    none = [0] * count
    given_: Mapping[str, object] = {
        "thinking_tokens": none,
        "prefix_tokens": none,
        "parent": [-1] * count,
    } | columns
    tokens = {
        name: np.array(given_[name], dtype=np.int64) for name in ("thinking_tokens", "prefix_tokens", "parent")
    }
    return Workload(
        name="made",
        duration_s=float(columns.get("duration_s", 0.0)),  # type: ignore[arg-type]
        arrival_s=np.array(arrival_s, dtype=float),
        prompt_tokens=np.array(prompt, dtype=np.int64),
        output_tokens=np.array(output, dtype=np.int64),
        max_tokens=np.array(output, dtype=np.int64),
        class_index=np.zeros(count, dtype=np.int64),
        class_names=("only",),
        slo_classes={"only": promised},
        delay_s=np.array(columns.get("delay_s", [0.0] * count), dtype=float),
        **tokens,
    )


def _drawn(name: str, rate_per_s: float, duration_s: float, seed: int) -> Workload:
    rng = np.random.default_rng(seed)
    count = rng.poisson(rate_per_s * duration_s)
    app = APPLICATIONS[name]
    return _workload(
        np.sort(rng.uniform(0, duration_s, count)).tolist(),
        app.prompt.draw(rng, count).tolist(),
        app.output.draw(rng, count).tolist(),
        SloClass(**PAPER_SLO_CLASSES[name]),
        duration_s=duration_s,
    )


def _slos(workload: Workload, cost: StepCost) -> list[Slo]:
    promised = workload.slo_classes["only"]
    return [
        Slo("only", promised.ttft_scale * cost.prefill_alone_s(prompt, 2048), promised.tpot_ms / 1e3)
        for prompt in workload.prompt_tokens.tolist()
    ]


# ---- published figures -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_steady_rates_are_those_published(name: str) -> None:
    rng, app = np.random.default_rng(0), APPLICATIONS[name]
    prompt, output = app.prompt.draw(rng, 20_000), app.output.draw(rng, 20_000)
    work_s = request_work_s(Demand.alone(prompt, output), PAPER, KV_TOKENS)
    blind = blind_capacity(prompt, output, PAPER, KV_TOKENS)
    found = (1 / cheapest_s(work_s, 1.0), 1 / cheapest_s(work_s, 0.9), blind)
    assert found == pytest.approx(PUBLISHED[name], rel=0.03)


def test_a_long_steady_run_comes_near_the_steady_rate() -> None:
    workload = _drawn("coder", 18.0, 200.0, seed=1)
    found = clairvoyant_capacity(workload, PAPER, KV_TOKENS, 1)
    assert found == pytest.approx(PUBLISHED["coder"][1], rel=0.05)


# ---- work ------------------------------------------------------------------------------------------------


def test_a_line_costs_what_the_formula_says() -> None:
    demand = Demand.alone(np.array([763]), np.array([266]))
    tokens, steps = 763 + 266 - 1, 266 * (763 + 265 / 2) / KV_TOKENS
    assert request_work_s(demand, PAPER, KV_TOKENS) == pytest.approx(6.88e-5 * tokens + 24.8e-3 * steps)


def test_the_mix_of_pieces_is_the_best_there_is() -> None:
    rng = np.random.default_rng(0)
    demand = Demand.alone(Lengths(700, 400).draw(rng, 300), Lengths(200, 150).draw(rng, 300))
    one, other = RICH.pieces

    def worth(weight: float) -> float:
        piece = Piece(
            *(
                weight * a + (1 - weight) * b
                for a, b in ((one.base_s, other.base_s), (one.per_token_s, other.per_token_s))
            )
        )
        return cheapest_s(Price.of(RICH, piece, KV_TOKENS, 4096, None).work_s(demand), 0.9)

    found = cheapest_s(tightest(demand, RICH, KV_TOKENS, share=0.9).work_s(demand), 0.9)
    assert found == pytest.approx(max(worth(weight) for weight in np.linspace(0, 1, 101)), rel=1e-4)
    assert found >= max(worth(0.0), worth(1.0))


def test_without_a_base_the_work_is_what_a_request_takes_alone() -> None:
    cost = replace(RICH, pieces=(Piece(0.0, 5e-5),))
    workload = _workload([0.0], [300], [40], SloClass())
    whole = _serve(workload, cost, KV_TOKENS, None)
    assert request_work_s(Demand.of(workload), cost, KV_TOKENS) == pytest.approx(whole.busy_s)
    demand = Demand(*(np.array([tokens]) for tokens in (300, 1, 200, 0)))
    cached_s = cost.predict(100, seqs=1, prefill_work=100 * 250, prefill_kv_tokens=200)
    assert request_work_s(demand, cost, KV_TOKENS) == pytest.approx(cached_s)


def test_a_prefix_that_was_computed_spares_its_tokens_but_not_its_memory() -> None:
    whole = Demand.alone(np.array([1000]), np.array([50]))
    spared = request_work_s(whole, PAPER, KV_TOKENS) - request_work_s(
        replace(whole, cached_tokens=np.array([400])), PAPER, KV_TOKENS
    )
    assert spared == pytest.approx(6.88e-5 * 400)


def test_only_calls_that_part_share_the_memory_of_their_prefix() -> None:
    calls = {"parent": [-1, 0, 1, 1, 2], "prefix_tokens": [0, 10, 20, 20, 30]}
    workload = _workload([0.0] * 5, [10, 20, 30, 30, 40], [5] * 5, SloClass(), **calls)
    assert Demand.of(workload).shared_tokens.tolist() == [0, 0, 20, 20, 30]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), rich=st.booleans(), tight=st.booleans())
def test_no_batching_takes_less_than_the_work_of_what_it_served(seed: int, rich: bool, tight: bool) -> None:
    rng, cost = np.random.default_rng(seed), RICH if rich else PAPER
    kv_tokens = 400 if tight else 4000
    prompt, output = rng.integers(1, 250, 20), rng.integers(1, 60, 20)
    workload = _workload(np.sort(rng.uniform(0, 2, 20)).tolist(), prompt.tolist(), output.tolist(), SloClass())
    ran = _serve(workload, cost, kv_tokens, rng)
    work_s = request_work_s(Demand.of(workload), cost, kv_tokens)
    assert work_s.sum() <= ran.busy_s * (1 + 1e-9)


def test_speculation_takes_no_less_than_its_work_in_the_mean() -> None:
    """As many residents as memory holds, at each depth, by chance: 300 outputs of 40 tokens."""
    rng, kv_tokens, prompt, output = np.random.default_rng(0), 2000, 100, 40
    demand = Demand.alone(np.array([prompt]), np.array([output]))
    price = Price.of(DRAFTING, DRAFTING.pieces[0], kv_tokens, prompt + output, 0.7)
    decode_s = float((price.work_s(demand) - price.prefill_s(demand).sum(axis=0))[0])
    for depth in (1, 2, 4, 8):
        spent_s = []
        for _ in range(300):
            made, total_s = 1, 0.0
            while made < output:
                held = prompt + made + depth - 1
                beside = kv_tokens / held  # requests as long as this one, in the same step
                total_s += DRAFTING.pieces[0].base_s / beside + DRAFTING.pieces[0].per_token_s * depth
                total_s += DRAFTING.pieces[0].per_draft_step_s * (depth - 1) / beside
                made += 1 + int((np.cumprod(rng.random(depth - 1) < 0.7)).sum())
            spent_s.append(total_s)
        assert np.mean(spent_s) > decode_s * 0.98


# ---- windows ---------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), jobs=st.integers(1, 30), capacity=st.sampled_from((0.5, 1.0, 3.0)))
def test_placing_the_cheapest_first_is_the_optimum_of_the_program(
    seed: int, jobs: int, capacity: float
) -> None:
    rng, buckets = np.random.default_rng(seed), 12
    begin = rng.integers(0, buckets, jobs)
    end = rng.integers(begin + 1, buckets + 1)
    begin[0], end[0] = 0, buckets
    work_s, gain = rng.exponential(1.5, jobs), rng.choice([1.0, 0.5, 0.2], jobs)
    placed = most_placed(begin.astype(float), end.astype(float), work_s, gain, capacity, buckets)
    inside = (np.arange(buckets) >= begin[:, None]) & (np.arange(buckets) < end[:, None])
    # Variables [jobs * buckets]: seconds of a job in a bucket.
    found = linprog(
        -np.repeat(gain / work_s, buckets),
        A_ub=np.vstack([np.tile(np.eye(buckets), jobs), np.repeat(np.eye(jobs), buckets, axis=1)]),
        b_ub=np.concatenate([np.full(buckets, capacity), work_s]),
        bounds=[(0, None if open_ else 0) for open_ in inside.ravel().tolist()],
    )
    assert placed @ gain == pytest.approx(-found.fun, abs=1e-6)
    assert ((placed >= 0) & (placed <= 1 + 1e-12)).all()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_wider_buckets_never_place_less(seed: int) -> None:
    rng = np.random.default_rng(seed)
    begin_s = rng.uniform(0, 5, 40)
    end_s, work_s = begin_s + rng.exponential(0.8, 40), rng.exponential(0.5, 40)
    coarse, fine = (most_placed(begin_s, end_s, work_s, np.ones(40), 1.0, buckets).sum() for buckets in (7, 70))
    assert coarse >= fine - 1e-6


def test_windows_are_those_of_the_score() -> None:
    promised = SloClass(ttft_ms=1000, tpot_ms=100, thinking_tpot_ms=50)
    workload = _workload([5.0], [10], [30], promised, thinking_tokens=[20])
    windows = Windows.of(workload, PAPER)
    slo, last_s = Slo("only", 1.0, 0.1, 0.05), float(windows.end_s[0]) - 5.0
    times_s = [min(1.05 + 0.04 * n, last_s) for n in range(29)]
    for late_s, met in ((-1e-6, True), (1e-6, False)):
        assert score(slo, [*times_s, last_s + late_s], completed=True, thinking_tokens=20).met == met
    assert windows.prefill_end_s[0] == pytest.approx(5.0 + 1.05)


def test_a_call_of_a_chain_may_come_late_but_not_early() -> None:
    chain = {"parent": [-1, 0, 1], "delay_s": [0.0, 2.0, 3.0]}
    workload = _workload([1.0] * 3, [10] * 3, [10] * 3, SloClass(ttft_ms=1000), **chain)
    windows = Windows.of(workload, PAPER)
    assert windows.begin_s.tolist() == [1.0, 3.0, 6.0]
    assert windows.end_s[1] == windows.end_s[2] > windows.end_s[0] + 20


# ---- length-blind ----------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), share=st.floats(0.2, 1.0))
def test_giving_up_by_the_hull_is_the_best_chance_policy(seed: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    demand = Demand.alone(rng.integers(1, 900, 12), rng.geometric(0.02, 12))
    price = tightest(demand, PAPER, KV_TOKENS)
    group = np.repeat([0, 1], 6)
    costs, served, of_group = [], [], []
    for index in (0, 1):
        rows = demand[group == index]
        for most in [0, *rows.output_tokens.tolist()]:
            made = replace(rows, output_tokens=np.minimum(rows.output_tokens, most))
            costs.append(float(price.work_s(made).sum()) / 12 if most else 0.0)
            served.append(float((rows.output_tokens <= most).sum()) / 12)
            of_group.append(index)
    chosen = np.array([np.equal(of_group, index) for index in (0, 1)], dtype=float)
    found = linprog(costs, A_ub=[-np.array(served)], b_ub=[-share], A_eq=chosen, b_eq=[1, 1])
    hulls = segments(demand, price, group)
    assert least_s(hulls, np.array([6, 6]), share) == pytest.approx(found.fun, rel=1e-6)
    below = segments(demand, price, group, most=2)
    assert least_s(below, np.array([6, 6]), share) <= found.fun * (1 + 1e-9)


def test_groups_are_of_one_class_and_of_like_prompts() -> None:
    rng = np.random.default_rng(0)
    prompt, class_index = rng.integers(1, 1000, 400), rng.integers(0, 2, 400)
    found = groups(prompt, class_index)
    assert set(found.tolist()) == set(range(found.max() + 1))
    for index in range(found.max() + 1):
        assert len(set(class_index[found == index].tolist())) == 1
        assert np.ptp(prompt[found == index]) < 500


# ---- no schedule is better -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Ran:
    times_s: list[list[float]]
    busy_s: float

    def met(self, workload: Workload, cost: StepCost) -> int:
        rows = zip(_slos(workload, cost), workload.arrival_s.tolist(), self.times_s, strict=True)
        return sum(score(slo, [t - at for t in times], completed=True).met for slo, at, times in rows)


def _serve(workload: Workload, cost: StepCost, kv_tokens: int, rng: np.random.Generator | None) -> _Ran:
    """In order of arrival as memory holds them to their ends, prompts whole or in chunks by chance."""
    prompt, output = workload.prompt_tokens.tolist(), workload.output_tokens.tolist()
    waiting, running = list(range(len(workload))), list[int]()
    computed, times = [0] * len(workload), [list[float]() for _ in prompt]
    now_s = busy_s = 0.0
    while waiting or running:
        now_s = now_s if running else max(now_s, float(workload.arrival_s[waiting[0]]))
        while waiting and workload.arrival_s[waiting[0]] <= now_s:
            held = sum(prompt[i] + output[i] for i in (*running, waiting[0]))
            if held > kv_tokens:
                break
            running.append(waiting.pop(0))
        chunks = {i: prompt[i] - computed[i] for i in running if computed[i] < prompt[i]}
        if rng is not None:
            chunks = {i: int(rng.integers(1, left + 1)) for i, left in chunks.items()}
        decodes = [i for i in running if i not in chunks]
        seconds = cost.predict(
            sum(chunks.values()) + len(decodes),
            seqs=len(running),
            context_tokens=sum(prompt[i] + len(times[i]) - 1 for i in decodes),
            prefill_work=sum(chunk * (computed[i] + chunk / 2) for i, chunk in chunks.items()),
            prefill_kv_tokens=sum(computed[i] for i in chunks),
        )
        now_s, busy_s = now_s + seconds, busy_s + seconds
        for i, chunk in chunks.items():
            computed[i] += chunk
        for i in list(running):
            if computed[i] == prompt[i]:
                times[i].append(now_s)
            if len(times[i]) == output[i]:
                running.remove(i)
    return _Ran(times, busy_s)


@pytest.mark.parametrize("cost", [PAPER, RICH], ids=["line", "rich"])
@pytest.mark.parametrize(
    ("name", "rate"), [("chatbot", 3.5), ("coder", 8.0), ("coder", 16.0), ("summarizer", 3.0)]
)
def test_a_simple_server_never_beats_the_bounds(cost: StepCost, name: str, rate: float) -> None:
    workload = replace(_drawn(name, rate, 12.0, seed=3), duration_s=0.0)
    met = _serve(workload, cost, KV_TOKENS, np.random.default_rng(0)).met(workload, cost)
    paced = name == "coder"
    most = clairvoyant(workload, cost, KV_TOKENS, 1, ttft=paced)
    assert 0 < met <= most + 1e-6
    assert most <= clairvoyant(workload, cost, KV_TOKENS, 1)


TINY = StepCost.line(0.02, 0.005)


def _schedules(workload: Workload, slos: list[Slo], kv_tokens: int) -> Iterator[int]:
    """How many requests each schedule of one replica meets, with all batches of prompts, halves and decodes."""
    prompt, output = workload.prompt_tokens.tolist(), workload.output_tokens.tolist()
    arrival = workload.arrival_s.tolist()
    ends = [
        at + (slo.ttft_s + (o - 1) * slo.tpot_s) * 1.05
        for at, slo, o in zip(arrival, slos, output, strict=True)
    ]
    seen = set()
    start = (0.0, tuple((0, ()) for _ in prompt))
    stack: list[tuple[float, tuple[tuple[int, tuple[float, ...]], ...]]] = [start]
    while stack:
        now_s, state = stack.pop()
        key = (round(now_s, 9), state)
        if key in seen:
            continue
        seen.add(key)
        yield sum(
            len(times) == o and score(slo, [t - at for t in times], completed=True).met
            for (_, times), o, at, slo in zip(state, output, arrival, slos, strict=True)
        )
        moves = []
        for i, (computed, times) in enumerate(state):
            left = prompt[i] - computed
            open_ = arrival[i] <= now_s and len(times) < output[i] and now_s < ends[i]
            moves.append(sorted({0, left, (left + 1) // 2} if left else {0, 1}) if open_ else [0])
        later = [at for at in arrival if at > now_s]
        if later:
            stack.append((min(later), state))
        for move in itertools.product(*moves):
            held = sum(
                max(c, prompt[i] + len(t) - 1 if t else 0) + n
                for i, ((c, t), n) in enumerate(zip(state, move, strict=True))
                if n
            )
            if not any(move) or held > kv_tokens:
                continue
            end_s = now_s + TINY.predict(sum(move))
            after = []
            for i, ((computed, times), n) in enumerate(zip(state, move, strict=True)):
                grown = computed + n if computed < prompt[i] else computed
                after.append((grown, (*times, end_s) if n and grown == prompt[i] else times))
            stack.append((end_s, tuple(after)))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_no_schedule_at_all_beats_the_bounds(seed: int) -> None:
    rng = np.random.default_rng(seed)
    promised = SloClass(ttft_scale=float(rng.choice([1.0, 1.5, 2.0])), tpot_ms=float(rng.choice([30, 45])))
    workload = _workload(
        np.sort(rng.uniform(0, 0.06, 3)).tolist(),
        rng.integers(1, 6, 3).tolist(),
        rng.integers(1, 4, 3).tolist(),
        promised,
    )
    kv_tokens = int(rng.integers(8, 16))
    best = max(_schedules(workload, _slos(workload, TINY), kv_tokens))
    assert best <= clairvoyant(workload, TINY, kv_tokens, 1) + 1e-6
    assert best <= clairvoyant(workload, TINY, kv_tokens, 1, ttft=True) + 1e-6


@pytest.mark.parametrize("requests", [1, 2])
def test_the_paced_bound_is_met_by_what_just_fits(requests: int) -> None:
    """All at once, in batches that fill the memory and end when they are due; not with a tenth less time."""
    cost = replace(RICH, pieces=(Piece(0.02, 1e-4),), per_context_token_s=2e-4, drift=1.0)
    prompt, output = 50, 2
    ttft_s = cost.predict(requests * prompt, seqs=requests, prefill_work=requests * prompt**2 / 2)
    tpot_s = cost.predict(requests, seqs=requests, context_tokens=requests * prompt)
    served = []
    for scale in (1.0, 0.9):
        promised = SloClass(ttft_ms=ttft_s * scale / 1.05 * 1e3, tpot_ms=tpot_s * scale / 1.05 * 1e3)
        workload = _workload([0.0] * requests, [prompt] * requests, [output] * requests, promised)
        windows = Windows.of(workload, cost)
        demand, kv_tokens = Demand.of(workload), requests * (prompt + 1)
        served.append(most_paced(demand, windows, cost, kv_tokens, 1, bucket_s=float(windows.end_s[0]) / 200))
    assert served[0] == pytest.approx(requests)
    assert served[1] < 0.97 * requests


def test_the_pace_binds_where_few_share_a_step() -> None:
    """More steps to do, each of its own, than there is time for: no memory is short, and few are the tokens."""
    promised = SloClass(ttft_ms=30, tpot_ms=30)
    workload = _workload([0.0, 0.01], [1, 1], [10, 10], promised)
    slow = StepCost.line(0.04, 1e-4)
    assert clairvoyant(workload, slow, 10**6, 1) == pytest.approx(2)
    assert clairvoyant(workload, slow, 10**6, 1, ttft=True) < 1.8


# ---- what must hold between bounds -----------------------------------------------------------------------


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000))
def test_more_time_memory_or_replicas_never_serve_less(seed: int) -> None:
    workload = _drawn("chatbot", 9.0, 30.0, seed)
    loose = replace(workload, slo_classes={"only": SloClass(ttft_scale=10, tpot_ms=200)})
    most = clairvoyant(workload, PAPER, KV_TOKENS, 1)
    slack = 1.0  # request: buckets differ with the longest window
    assert most < len(workload)
    assert clairvoyant(loose, PAPER, KV_TOKENS, 1) >= most - slack
    assert clairvoyant(workload, PAPER, KV_TOKENS // 2, 1) <= most
    assert clairvoyant(workload, PAPER, KV_TOKENS, 2) >= most
    assert clairvoyant(workload, PAPER.scaled(2.0), KV_TOKENS, 1) <= most + slack


def test_all_bounds_of_a_workload() -> None:
    workload = _drawn("summarizer", 5.0, 200.0, seed=2)
    found = bound(workload, PAPER, KV_TOKENS, 1)
    assert found.served_clairvoyant is not None
    assert found.capacity_clairvoyant_per_s is not None
    assert found.served_blind <= found.served_clairvoyant <= found.offered < len(workload)
    assert found.capacity_blind_per_s <= found.capacity_clairvoyant_per_s
    assert found.everybody_per_s < found.steady_blind_per_s < found.steady_clairvoyant_per_s
    assert sum(found.parts.values()) == pytest.approx(1)
    assert found.limit.startswith("floor 0.6")
    at_capacity = faster(workload, found.capacity_clairvoyant_per_s / workload.rate_per_s)
    share = clairvoyant(at_capacity, PAPER, KV_TOKENS, 1) / found.offered
    assert share == pytest.approx(0.9, abs=0.01)
    assert share < 0.9
    blind_alone = bound(workload, PAPER, KV_TOKENS, 1, clairvoyant_too=False)
    assert (blind_alone.served_clairvoyant, blind_alone.capacity_clairvoyant_per_s) == (None, None)


def test_speculation_raises_every_bound() -> None:
    workload = _drawn("chatbot", 6.0, 60.0, seed=2)
    plain, drafted = (bound(workload, DRAFTING, KV_TOKENS, 1, acceptance=a) for a in (None, 0.7))
    assert drafted.everybody_per_s > 1.3 * plain.everybody_per_s
    assert drafted.steady_blind_per_s > 1.3 * plain.steady_blind_per_s
    assert drafted.served_blind >= plain.served_blind


def test_what_has_no_bound_says_why() -> None:
    workload = _drawn("chatbot", 1.0, 10.0, seed=2)
    with pytest.raises(ValueError, match="without speculation"):
        clairvoyant(workload, PAPER, KV_TOKENS, 1, acceptance=0.7, ttft=True)
    with pytest.raises(ValueError, match="none comes after its first tenth"):
        clairvoyant(replace(workload, duration_s=1000.0), PAPER, KV_TOKENS, 1)
