"""Loads that change over time, and what became of requests by when they came."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.capacity import Cache
from benchmarks.parts import in_turn, joined
from benchmarks.scenarios import make
from benchmarks.simulator.outcome import Outcome
from benchmarks.simulator.run import Network, run
from benchmarks.simulator.systems import Deployment
from benchmarks.studies.crew import Row
from benchmarks.workload import Workload

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
SEEDS_APART = 1000  # windows of one run draw from seeds of their own


@dataclass(frozen=True, slots=True)
class Window:
    """Some seconds of load: streams of scenarios at a rate each, requests a second on all replicas."""

    seconds: float
    rates_per_s: tuple[tuple[str, float], ...]

    def load(self, seed: int, tpot_scale: float, divide: float = 1.0) -> Workload:
        """Its requests, Poisson: what is not steady is meant to be the change from window to window."""
        parts = [
            make(name, rate, self.seconds, seed, divide=divide, arrivals="poisson", tpot_scale=tpot_scale)
            for name, rate in self.rates_per_s
        ]
        return joined("+".join(name for name, _ in self.rates_per_s), parts)


def loads(windows: Sequence[Window], seed: int, tpot_scale: float, divide: float = 1.0) -> Workload:
    """Windows in turn, each drawn from a seed of its own."""
    parts = [window.load(seed * SEEDS_APART + at, tpot_scale, divide) for at, window in enumerate(windows)]
    return in_turn("timeline", parts)


# A request of a run: NaN where there is no time. `promised` counts what was promised in the end.
REQUEST = np.dtype(
    [
        ("arrived_s", np.float64),
        ("ttft_s", np.float64),
        ("tpot_s", np.float64),
        ("latency_s", np.float64),
        ("met", np.bool_),
        ("promised", np.bool_),
    ]
)
Requests = npt.NDArray[np.void]


def pooled(runs: Sequence[Row]) -> Requests:
    """REQUEST rows of all runs, which are as `serve` returns them."""
    requests = np.empty(sum(len(one["met"]) for one in runs), dtype=REQUEST)
    for name in REQUEST.names or ():
        column = [value for one in runs for value in one[name]]
        requests[name] = np.array(column, dtype=REQUEST[name])
    return requests


def between(requests: Requests, begin_s: float, end_s: float) -> Requests:
    """Those that came in [begin_s, end_s)."""
    return requests[(requests["arrived_s"] >= begin_s) & (requests["arrived_s"] < end_s)]


def figures(requests: Requests) -> Row:
    """Shares of all; quantiles of what there is: of requests that got a token, or were completed.

    `best_effort`: what was not promised in the end, refused or not.
    """
    spare, completed = ~requests["promised"], np.isfinite(requests["latency_s"])
    return {
        "requests": len(requests),
        "attainment": _share(requests["met"]),
        "completed": _share(completed),
        "ttft_s": _quantiles(requests["ttft_s"]),
        "tpot_s": _quantiles(requests["tpot_s"]),
        "promised": int(requests["promised"].sum()),
        "promised_kept": _share(requests["met"][requests["promised"]]),
        "best_effort": int(spare.sum()),
        "best_effort_completed": int((spare & completed).sum()),
        "best_effort_latency_s": _quantiles(requests["latency_s"][spare]),
    }


def bins(requests: Requests, end_s: float, width_s: float) -> list[Row]:
    """Figures by time of arrival, from 0 to `end_s`."""
    starts = np.arange(0.0, end_s, width_s).tolist()
    return [{"from_s": at, **figures(between(requests, at, min(at + width_s, end_s)))} for at in starts]


def serve(
    deployment: Deployment, windows: Sequence[Window], bytes_per_s: float, seed: int, folder: Path | None
) -> Row:
    """Serve windows in turn: columns of all requests, as lists. Kept on disk, as points are."""
    key = [
        "timeline",
        _own_code(),
        repr(deployment),
        [asdict(window) for window in windows],
        bytes_per_s,
        seed,
    ]
    return Cache(folder).kept(key, lambda: _columns(_served(deployment, windows, bytes_per_s, seed)))


def _served(deployment: Deployment, windows: Sequence[Window], bytes_per_s: float, seed: int) -> Outcome:
    scale = deployment.hardware.tpot_scale
    load = loads(windows, seed, scale).clipped((deployment.kv_tokens or deployment.hardware.kv_tokens) // 2)
    return run(load, deployment, Network(bytes_per_s=bytes_per_s), seed=seed)


def _columns(served: Outcome) -> Row:
    world = served.world
    latency_s = np.where(world.dropped, np.nan, world.ended_s - world.arrived_s)
    times = {
        "arrived_s": world.arrived_s,
        "ttft_s": served.ttft_s,
        "tpot_s": served.tpot_s,
        "latency_s": latency_s,
    }
    flags = {"met": served.met, "promised": served.admitted & ~world.dropped}
    return {
        **{name: [_number(value) for value in column.tolist()] for name, column in times.items()},
        **{name: column.tolist() for name, column in flags.items()},
        "drained": served.drained,
    }


def _number(value: float) -> float | None:
    return round(value, 5) if np.isfinite(value) else None


def _own_code() -> str:
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]


def _share(flags: Flags) -> float | None:
    return float(flags.mean()) if len(flags) else None


def _quantiles(values: Floats) -> dict[str, float | None]:
    known = values[np.isfinite(values)]
    if not len(known):
        return {"p50": None, "p99": None}
    return {"p50": float(np.quantile(known, 0.5)), "p99": float(np.quantile(known, 0.99))}
