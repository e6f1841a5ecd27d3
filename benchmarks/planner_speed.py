"""How long the planner takes: one admission, one batch, what memory a call needs, and what compiling costs."""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil

from benchmarks.mixes import MAX_BATCH_TOKENS, Mix, call
from coordinator.planner.admission import Plan, solve
from coordinator.planner.instance import Instance
from engine.base import Seq
from engine.batch import Duty, Moment, compose
from engine.cost import Piece, StepCost

# The first is loose, so that 256 can run at one pace; the last two are no multiples, which spoils every grid.
TPOTS_S = (0.1, 0.05, 0.075, 0.15)
RUNNING, NEWCOMERS, TIERS = (16, 64, 256), (1, 10, 50), (1, 2, 3, 4)
WAITING = (1, 8, 32)
WARM_UP_CALLS = 20
LEAST_CALLS = 100
# A 7B model, 8 query heads a KV head: 64 KB of KV a token at 1.5 TB/s, 0.5 MFLOP a pair at 150 TFLOP/s.
ATTENTION_COST = StepCost(
    (Piece(base_s=24.8e-3, per_token_s=6.88e-5),),
    per_context_token_s=4.4e-8,
    per_prefill_work_s=3.5e-9,
    per_seq_s=1e-5,
)
MEMORY_SHAPES = ((64, 10, 3), (256, 50, 4), (16, 50, 1))  # the last needs the most labels

Input = TypeVar("Input")
Answer = TypeVar("Answer")
BatchInput = tuple[list[Seq], dict[str, Duty], Moment]


@dataclass(frozen=True, slots=True)
class Shape:
    """A row of the calls: how large its instances are."""

    running: int
    newcomers: int
    tiers: int
    memory_tight: bool


SHAPES = tuple(
    Shape(running, newcomers, tiers, tight)
    for running in RUNNING
    for newcomers in NEWCOMERS
    for tiers in TIERS
    for tight in (False, True)
)


def time_calls(mix: Mix, shape: Shape, count: int, budget_s: float, seed: int) -> dict[str, Any]:
    """A row: milliseconds of `solve` on `count` instances, fewer if they take longer than `budget_s`.

    Only instances in which the promised fit are timed: in the others nothing is searched.
    """
    instances, redrawn = draw_calls(mix, shape, count, budget_s, seed)
    bare, plans = timed(lambda instance: solve(instance, why=False), instances, budget_s)
    with_why, _ = timed(solve, instances, budget_s)
    return {
        **asdict(shape),
        "instances": len(plans),
        **bare,
        "with_why": with_why,
        "redrawn": redrawn,
        **_searched(plans),
    }


def time_compose(running: int, waiting: int, count: int, budget_s: float, seed: int) -> dict[str, Any]:
    """A row: milliseconds of `compose` on `count` batches, with an additive cost of attention."""
    rng = np.random.default_rng([seed, running, waiting])
    batches = [draw_batch(rng, running, waiting) for _ in range(count)]
    figures, plans = timed(lambda batch: compose(*batch), batches, budget_s)
    return {"running": running, "waiting": waiting, "batches": len(plans), **figures}


def call_memory(mix: Mix, running: int, newcomers: int, tiers: int, seed: int) -> dict[str, Any]:
    """Memory that one call takes at its peak: what it touches (the process grows), and what it asks for.

    Measured on the second call: the first one loads compiled code.
    """
    shape = Shape(running, newcomers, tiers, memory_tight=True)
    (instance, *_), _ = draw_calls(mix, shape, 1, 60.0, seed)
    solve(instance)
    rss_bytes = _peak_rss_growth(lambda: solve(instance))
    tracemalloc.start()
    solve(instance)
    _, traced_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return {
        **asdict(shape),
        "peak_rss_growth_mib": None if rss_bytes is None else rss_bytes / 2**20,
        "tracemalloc_peak_mib": traced_bytes / 2**20,
    }


def compile_times() -> dict[str, float]:
    """Seconds of the first call in a fresh process: with nothing compiled before, and with a cache on disk."""
    code = (
        "import time; start = time.perf_counter(); from coordinator.planner.admission import warm_up; "
        "loaded = time.perf_counter(); warm_up(); print(loaded - start, time.perf_counter() - loaded)"
    )
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "NUMBA_CACHE_DIR": cache}
        runs = [
            subprocess.run(
                [sys.executable, "-c", code],
                env=environment,
                cwd=Path(__file__).parents[1],
                capture_output=True,
                text=True,
                check=True,
            ).stdout.split()
            for _ in range(2)
        ]
    (import_s, compiled_s), (_, cached_s) = ([float(part) for part in run] for run in runs)
    return {"import_s": import_s, "compile_s": compiled_s, "load_from_cache_s": cached_s}


def draw_calls(mix: Mix, shape: Shape, count: int, budget_s: float, seed: int) -> tuple[list[Instance], int]:
    """Different instances of a shape in which the promised fit, and how many in which they did not."""
    rng = np.random.default_rng([seed, *asdict(shape).values()])
    instances: list[Instance] = []
    redrawn = 0
    end_s = time.perf_counter() + budget_s
    while len(instances) < count and (len(instances) < LEAST_CALLS or time.perf_counter() < end_s):
        instance = call(
            mix,
            rng,
            running=shape.running,
            newcomers=shape.newcomers,
            tpots_s=TPOTS_S[: shape.tiers],
            tight=shape.memory_tight,
        )
        if _kept(instance):
            instances.append(instance)
        else:
            redrawn += 1
    return instances, redrawn


def draw_batch(rng: np.random.Generator, running: int, waiting: int) -> BatchInput:
    """What a composer sees: `running` decodes and `waiting` prompts, an eighth of each best effort."""
    seqs, duties = [], {}
    for at in range(running + waiting):
        decodes, prompt = at < running, int(rng.integers(16, 2048))
        made = int(rng.integers(1, 400)) if decodes else 0
        computed = prompt + made - 1 if decodes else int(rng.integers(2) * rng.integers(prompt))
        seqs.append(Seq(f"w{at}", prompt, computed, made, running=computed > 0))
        tpot_s = TPOTS_S[int(rng.integers(3))]
        due_s = rng.uniform(0.03, 0.03 + tpot_s) if decodes else rng.uniform(0.05, 1.0)
        duties[f"w{at}"] = Duty(
            f"w{at}", due_s, tpot_s, due_s if decodes else None, best_effort=bool(rng.integers(8) == 0)
        )
    return (
        [seqs[at] for at in rng.permutation(len(seqs))],
        duties,
        Moment(0.0, ATTENTION_COST, MAX_BATCH_TOKENS),
    )


def timed(
    once: Callable[[Input], Answer], inputs: Sequence[Input], budget_s: float
) -> tuple[dict[str, float], list[Answer]]:
    """Milliseconds of one call, by the wall and by this thread's own time, and the answers.

    The garbage collector runs as it does in any process; what was drawn before is kept out of its sight. Stops
    after `budget_s`, but not before LEAST_CALLS calls.
    """
    for one in inputs[:WARM_UP_CALLS]:
        once(one)
    wall_ms, own_ms, answers = [], [], []
    with _collector_as_it_is():
        end_s = time.perf_counter() + budget_s
        for one in inputs:
            own, wall = time.thread_time_ns(), time.perf_counter_ns()
            answer = once(one)
            wall_ms.append((time.perf_counter_ns() - wall) / 1e6)
            own_ms.append((time.thread_time_ns() - own) / 1e6)
            answers.append(answer)
            if len(answers) >= LEAST_CALLS and time.perf_counter() > end_s:
                break
    p50_ms, p99_ms = np.percentile(wall_ms, (50, 99)).tolist()
    figures = {"p50_ms": p50_ms, "p99_ms": p99_ms, "max_ms": max(wall_ms)}
    return {**figures, "thread_p99_ms": float(np.percentile(own_ms, 99))}, answers


def _kept(instance: Instance) -> bool:
    return solve(replace(instance, newcomers=()), why=False).kept


def _searched(plans: Sequence[Plan]) -> dict[str, Any]:
    return {
        "exact_share": sum(plan.exact for plan in plans) / len(plans),
        "peak_labels": max(plan.labels for plan in plans),
        "admitted_mean": sum(len(plan.admitted) for plan in plans) / len(plans),
        "methods": dict(Counter(plan.method for plan in plans)),
    }


@contextmanager
def _collector_as_it_is() -> Iterator[None]:
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _peak_rss_growth(once: Callable[[], object]) -> int | None:
    """Bytes by which the process grew at its peak; None where the system does not tell."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # else memory that was freed and kept would be used unseen
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # sets the peak to what is held now
    except (OSError, AttributeError):
        return None
    before = psutil.Process().memory_info().rss
    once()
    status = Path("/proc/self/status").read_text(encoding="ascii")
    peak_kib = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    return max(peak_kib * 1024 - before, 0)
