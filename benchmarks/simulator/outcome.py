"""What became of every request of a run, and what that adds up to."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.simulator.world import NOBODY, World
from engine.request import Slo, StageKind
from engine.score import Score, missed, score

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
WARM_UP_SHARE = 0.1  # of the duration: requests that come in it are served and not counted


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """Columns [requests]. `counted`: arrived after the warm-up. Times are seconds; NaN where there is none."""

    world: World
    scores: Sequence[Score]
    counted: Flags
    met: Flags
    admitted: Flags
    ttft_s: Floats
    tpot_s: Floats
    drained: bool

    @property
    def attainment(self) -> float:
        """Share of counted requests with every stage met."""
        return float(self.met[self.counted].mean()) if self.counted.any() else 1.0

    def half(self, which: int) -> float:
        """Attainment of the first (0) or the second (1) half of the counted requests."""
        counted = np.flatnonzero(self.counted)
        part = counted[: len(counted) // 2] if which == 0 else counted[len(counted) // 2 :]
        return float(self.met[part].mean()) if len(part) else 1.0


def score_request(world: World, request: int) -> Score:
    """Score one request by the one definition there is (engine/score.py)."""
    slo = world.slos[request]
    first = world.first_time[request]
    times_s = world.token_times_s[first : world.first_time[request + 1]] - world.arrived_s[request]
    completed = bool(np.isfinite(world.ended_s[request])) and not world.dropped[request]
    if not completed:
        return missed(_kinds(slo))
    thinking = int(world.workload.thinking_tokens[request])
    return score(slo, times_s, completed=True, thinking_tokens=thinking)


def outcome(world: World, scores: Sequence[Score | None], admitted: Flags | None, drained: bool) -> Outcome:
    """Add up a run that is over. What was not scored has met nothing."""
    count = len(world.workload)
    final = [one if one is not None else missed(_kinds(world.slos[i])) for i, one in enumerate(scores)]
    first = world.token_times_s[world.first_time[:-1]]
    last = world.token_times_s[world.first_time[1:] - 1]
    outputs = world.workload.output_tokens
    ttft_s = first - world.arrived_s
    with np.errstate(invalid="ignore"):
        tpot_s = np.where(outputs > 1, (last - first) / np.maximum(outputs - 1, 1), np.nan)
    begun = counted_requests(world)
    return Outcome(
        world,
        final,
        begun,
        np.array([one.met for one in final], dtype=np.bool_),
        np.ones(count, dtype=np.bool_) if admitted is None else admitted,
        ttft_s,
        tpot_s,
        drained,
    )


def counted_requests(world: World) -> Flags:
    """Requests that arrive, or whose chain begins, after the warm-up."""
    counted: Flags = world.workload.arrival_s >= WARM_UP_SHARE * world.workload.duration_s
    return counted


def summary(out: Outcome, gpus: int) -> dict[str, Any]:
    """The figures of a run as JSON takes them."""
    world, counted = out.world, out.counted
    done = counted & np.isfinite(world.ended_s) & ~world.dropped
    spare = counted & ~out.admitted & ~world.dropped
    finished_spare = spare & np.isfinite(world.ended_s)
    rate = world.workload.rate_per_s
    chosen = np.flatnonzero(counted)
    scores = [out.scores[i] for i in chosen]
    pairs = counted & (world.prefilled_on != NOBODY) & (world.decoded_on != NOBODY)
    return {
        "requests": len(world.workload),
        "counted": int(counted.sum()),
        "attainment": out.attainment,
        "attainment_first_half": out.half(0),
        "attainment_second_half": out.half(1),
        "attainment_strict": _share([one.strict for one in scores]),
        "goodput_share": _share([one.goodput for one in scores]),
        "by_class": _by_class(out, chosen),
        "by_stage": {
            str(kind): _share([one.stages[kind] for one in scores if kind in one.stages]) for kind in StageKind
        },
        "admitted": int((out.admitted & counted).sum()),
        "admitted_kept": _share(out.met[counted & out.admitted].tolist()),
        "refused": int((world.dropped & counted).sum()),
        "best_effort": int(spare.sum()),
        "best_effort_completed": int(finished_spare.sum()),
        "best_effort_latency_s": _quantiles((world.ended_s - world.arrived_s)[finished_spare]),
        "completed": int(done.sum()),
        "drained": out.drained,
        "pairs": int(pairs.sum()),
        "ttft_s": _quantiles(out.ttft_s[done]),
        "tpot_s": _quantiles(out.tpot_s[done]),
        "gpus": gpus,
        "rate_per_s": rate,
        "rate_per_gpu_per_s": rate / gpus,
        "simulated_s": world.now_s,
    }


def write_requests(out: Outcome, path: Path) -> None:
    """A row per request, as CSV."""
    world = out.world
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(
            ["request", "class", "arrival_s", "in_tokens", "out_tokens", "ttft_s", "tpot_s", "end_s",
             "placement", "admitted", "counted", "met"]
        )  # fmt: skip
        for i in range(len(world.workload)):
            writer.writerow(
                [
                    i, world.slos[i].class_name, _cell(world.arrived_s[i]), world.workload.prompt_tokens[i],
                    world.workload.output_tokens[i], _cell(out.ttft_s[i]), _cell(out.tpot_s[i]),
                    _cell(world.ended_s[i]), _placement(world, i), int(out.admitted[i]), int(out.counted[i]),
                    int(out.met[i]),
                ]
            )  # fmt: skip


def _placement(world: World, request: int) -> str:
    nodes = [int(world.prefilled_on[request]), int(world.decoded_on[request])]
    return "dropped" if world.dropped[request] else ">".join(str(node) for node in nodes if node != NOBODY)


def _cell(seconds: float) -> str:
    return "" if not np.isfinite(seconds) else f"{seconds:.6f}"


def _by_class(out: Outcome, chosen: npt.NDArray[np.int64]) -> dict[str, float]:
    world = out.world
    index = world.workload.class_index[chosen]
    return {
        name: float(out.met[chosen[index == at]].mean())
        for at, name in enumerate(world.workload.class_names)
        if (index == at).any()
    }


def _kinds(slo: Slo) -> list[StageKind]:
    thinks = [] if slo.thinking_tpot_s is None else [StageKind.THINKING]
    return [StageKind.PREFILL, *thinks, StageKind.ANSWER]


def _share(flags: Sequence[bool]) -> float | None:
    return float(np.mean(flags)) if len(flags) else None


def _quantiles(values: Floats) -> dict[str, float | None]:
    values = values[np.isfinite(values)]
    if not len(values):
        return {"p50": None, "p99": None}
    return {"p50": float(np.quantile(values, 0.5)), "p99": float(np.quantile(values, 0.99))}
