"""One window on a real system: what was sent, and what it adds up to beside the simulator's word for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.open_loop import followers
from benchmarks.parts import asked
from benchmarks.real.client import NO_ANSWER, Job, Seen
from benchmarks.real.predicted import Machine
from benchmarks.real.running import Running
from benchmarks.real.systems import RealSystem
from benchmarks.simulator.outcome import WARM_UP_SHARE
from benchmarks.simulator.run import last_due_s
from benchmarks.simulator.systems import Tuning
from benchmarks.simulator.world import DRAIN_S
from benchmarks.workload import Workload
from engine.models import THINK_END, load_recipe, token_id_of
from engine.request import Slo, StageKind
from engine.score import Score, score

ADMITTED = "admitted"
ERROR_SAMPLES = 3
Row = dict[str, Any]
Floats = npt.NDArray[np.float64]


def measure(
    started: Running,
    system: RealSystem,
    recipe: str,
    workload: Workload,
    slos: Sequence[Slo],
    seed: int,
    folder: Path,
    tell: Callable[[float], None],
) -> Row:
    """Serve a workload, by a model that never says that it has thought.

    Raises EngineError if the client fails; requests that fail are counted.
    """
    job = job_of(started, recipe, workload, slos, seed, with_slos=system.ours, hang_up=bool(system.drafts))
    before = started.nodes() if system.ours else []
    row = summary(workload, slos, started.ask(job, folder, tell))
    if system.ours:
        after = started.nodes()
        row["planning_share"] = _gain(before, after, "planning_s", "busy_s")
        row["steps_over_profile"] = _gain(before, after, "busy_s", "profiled_s")
        row["acceptance"] = _gain(before, after, "accepted_tokens", "drafted_tokens")
    return row


def job_of(
    started: Running,
    recipe: str,
    workload: Workload,
    slos: Sequence[Slo],
    seed: int,
    *,
    with_slos: bool = True,
    hang_up: bool = False,
) -> Job:
    """All requests of a workload, for a client process."""
    return Job(
        targets=list(started.targets),
        pair=started.pair,
        model=started.model,
        vocab_size=load_recipe(recipe).vocab_size,
        seed=seed,
        hang_up=hang_up,
        arrival_s=workload.arrival_s.tolist(),
        prompt_tokens=workload.prompt_tokens.tolist(),
        output_tokens=workload.output_tokens.tolist(),
        max_tokens=workload.max_tokens.tolist(),
        slos=[_field(slo) if with_slos else None for slo in slos],
        after=followers(workload),
        cut_off_s=last_due_s(workload, slos) + DRAIN_S,
        # A random model would end its thinking by chance: it is held to the pace of thinking throughout.
        never=[token_id_of(recipe, THINK_END)],
    )


def summary(workload: Workload, slos: Sequence[Slo], seen: Sequence[Seen]) -> Row:
    """What clients saw, requests of the warm-up left out."""
    counted = np.flatnonzero(workload.arrival_s >= WARM_UP_SHARE * workload.duration_s).tolist()
    scores = {index: score_of(workload, slos[index], seen[index], index) for index in counted}
    met = [scores[index].met for index in counted]
    done = [index for index in counted if was_completed(workload, seen[index], index)]
    admitted = [index for index in counted if seen[index].verdict == ADMITTED]
    others = [index for index in counted if seen[index].verdict not in (ADMITTED, None)]
    late_ms = np.array([one.late_s for one in seen]) * 1e3
    errors = [seen[index].error for index in counted if seen[index].error is not None]
    middle = len(counted) // 2
    return {
        "requests": len(workload),
        "counted": len(counted),
        "completed": len(done),
        "attainment": _mean(met),
        "attainment_by_half": [_mean(met[:middle]), _mean(met[middle:])],
        "attainment_strict": _mean([one.strict for one in scores.values()]),
        "goodput_share": _mean([one.goodput for one in scores.values()]),
        "by_stage": {
            str(kind): _mean([one.stages[kind] for one in scores.values() if kind in one.stages])
            for kind in StageKind
        },
        "admitted": len(admitted),
        "admitted_kept": _mean([scores[index].met for index in admitted]),
        "kept_per_s": sum(met) / ((1 - WARM_UP_SHARE) * workload.duration_s),
        "best_effort": len(others),
        "best_effort_completed": sum(was_completed(workload, seen[index], index) for index in others),
        "drained": all(one.error != NO_ANSWER for one in seen),
        "ttft_s": _quantiles([seen[index].token_times_s[0] for index in done]),
        "tpot_s": _quantiles([_tpot_s(seen[index]) for index in done if len(seen[index].token_times_s) > 1]),
        "errors": len(errors),
        "error_samples": errors[:ERROR_SAMPLES],
        "client_late_ms": _quantiles(late_ms.tolist()),
    }


def predicted(
    machine: Machine, system: RealSystem, tuning: Tuning, workload: Workload, seed: int
) -> dict[str, float | None]:
    """The same requests in simulated time."""
    out = machine.serve(system, tuning, workload, seed)
    return {
        "attainment": out.attainment,
        "ttft_p50_s": _quantiles(_finite(out.ttft_s[out.counted]))["p50"],
        "tpot_p50_s": _quantiles(_finite(out.tpot_s[out.counted]))["p50"],
    }


def _gain(before: Sequence[Row], after: Sequence[Row], part: str, whole: str) -> float | None:
    """How much `part` of all nodes grew, over the growth of `whole`."""
    parts, wholes = (
        sum(node["tally"][key] for node in after) - sum(node["tally"][key] for node in before)
        for key in (part, whole)
    )
    return float(parts / wholes) if wholes > 0 else None


def _field(slo: Slo) -> dict[str, Any]:
    """The promise in numbers, so that ours is held to what every system is scored by."""
    field: dict[str, Any] = {
        **asked(slo.class_name),
        "ttft_ms": slo.ttft_s * 1e3,
        "tpot_ms": slo.tpot_s * 1e3,
    }
    return field if slo.thinking_tpot_s is None else field | {"thinking_tpot_ms": slo.thinking_tpot_s * 1e3}


def score_of(workload: Workload, slo: Slo, seen: Seen, index: int) -> Score:
    """How well a promise was kept, by what the client saw."""
    thinking = int(workload.thinking_tokens[index])
    completed = was_completed(workload, seen, index)
    return score(slo, seen.token_times_s, completed=completed, thinking_tokens=thinking)


def was_completed(workload: Workload, seen: Seen, index: int) -> bool:
    """Whether all that was to be said came."""
    return seen.error is None and len(seen.token_times_s) == int(workload.output_tokens[index])


def _tpot_s(seen: Seen) -> float:
    return (seen.token_times_s[-1] - seen.token_times_s[0]) / (len(seen.token_times_s) - 1)


def _finite(values: Floats) -> list[float]:
    finite: list[float] = values[np.isfinite(values)].tolist()
    return finite


def _mean(values: Sequence[bool]) -> float | None:
    return float(np.mean(values)) if len(values) else None


def _quantiles(values: Sequence[float]) -> dict[str, float | None]:
    if not values:
        return {"p50": None, "p99": None}
    return {"p50": float(np.quantile(values, 0.5)), "p99": float(np.quantile(values, 0.99))}
