"""Capacity: the highest rate per GPU at which a share of requests keeps every promise, and how it is searched.

A point is one run at one rate. It holds if enough requests were met and the queue drained. Points are kept on
disk by what goes into them and by the code that made them, so that a search that was interrupted goes on.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.hardware import hardware
from benchmarks.scenarios import make
from benchmarks.simulator.outcome import summary
from benchmarks.simulator.run import Network, run
from benchmarks.simulator.systems import OURS_NAME, Deployment, Tuning, design, roles_for, tuned

PRECISION = 0.03
FIRST_STEP = 1.3
NEAR_STEP = 1.1  # from the capacity on another seed
MOST_STEP = 3.0
LEAST_RATE = 1e-3
DIGITS = 9  # of rates after the point
# Files, and folders, of which no baseline runs a line.
OURS_ONLY = (
    "benchmarks/simulator/slosserve.py",
    "benchmarks/simulator/variants.py",
    "coordinator/decider.py",
    "coordinator/deferred.py",
    "coordinator/mirror.py",
    "coordinator/pairs.py",
    "coordinator/placement.py",
    "coordinator/planner/",
    "coordinator/pools.py",
    "coordinator/prefixes.py",
    "engine/drafting.py",
    "engine/speculation.py",
)
MOST_DOUBLINGS = 12
SECONDS = 600.0
SECONDS_OF = {"reasoning": 3000.0}  # ten times the mean residence of a request: 5,500 tokens at up to 50 ms


@dataclass(frozen=True, slots=True)
class Setting:
    """Everything that is the same at every rate of a search.

    `acceptance`: chance that a draft is right; None without speculation. `variant`: a part left out of
    ours (see benchmarks/simulator/variants.py).
    """

    scenario: str
    hardware: str
    system: str
    mode: str
    replicas: int
    tuning: Tuning
    acceptance: float | None = None
    kv_tokens: int | None = None
    link_bytes_per_s: float = Network().bytes_per_s
    arrivals: str | None = None
    duration_s: float | None = None
    variant: str = ""

    @property
    def seconds(self) -> float:
        """Simulated time in which requests arrive."""
        return self.duration_s or SECONDS_OF.get(self.scenario, SECONDS)

    def deployment(self) -> Deployment:
        """The replicas."""
        tuning = self.tuning
        chosen = hardware(self.hardware)
        if design(self.system).disaggregated or self.mode == "disaggregated":
            roles = roles_for("disaggregated", 0, tuning.prefill or 1, tuning.decode or 1)
        else:
            roles = roles_for(self.mode, self.replicas)
        return Deployment(
            self.system,
            chosen,
            roles,
            tuning,
            self.acceptance,
            self.kv_tokens,
            one_node=self.mode == "colocated",
            variant=self.variant,
        )


@dataclass(frozen=True, slots=True)
class Point:
    """One run: the rate that came (requests a second and GPU), and how it went."""

    asked_per_gpu: float
    rate_per_gpu: float
    attainment: float
    drained: bool
    facts: dict[str, Any]

    def holds(self, share: float) -> bool:
        """Whether this rate is within capacity."""
        return self.drained and self.attainment >= share


def measure(setting: Setting, rate_per_gpu: float, seed: int, stop_below: float | None = None) -> Point:
    """Run one point. With `stop_below` it may stop as soon as it cannot hold."""
    deployment = setting.deployment()
    workload = make(
        setting.scenario,
        rate_per_gpu * deployment.gpus,
        setting.seconds,
        seed,
        tpot_scale=deployment.hardware.tpot_scale,
        arrivals=setting.arrivals,
    ).clipped((setting.kv_tokens or deployment.hardware.kv_tokens) // 2)
    network = Network(bytes_per_s=setting.link_bytes_per_s)
    outcome = run(workload, deployment, network, seed=seed, stop_below=stop_below)
    facts = summary(outcome, deployment.gpus)
    return Point(rate_per_gpu, facts["rate_per_gpu_per_s"], outcome.attainment, outcome.drained, facts)


class Cache:
    """Points on disk. `folder` None keeps nothing."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def point(self, setting: Setting, rate_per_gpu: float, seed: int, stop_below: float | None) -> Point:
        """The point, run now if it never was."""
        key = [asdict(setting), rate_per_gpu, seed, stop_below]
        code = code_fingerprint(setting.system == OURS_NAME)
        return Point(**self.kept(key, lambda: asdict(measure(setting, rate_per_gpu, seed, stop_below)), code))

    def kept(self, key: Sequence[Any], make: Callable[[], dict[str, Any]], code: str = "") -> dict[str, Any]:
        """What `make` makes, of which `key` and `code` (else all of it) say all: now, if it never was made."""
        if self._folder is None:
            return make()
        text = json.dumps([*key, code or code_fingerprint()], sort_keys=True)
        name = hashlib.sha256(text.encode()).hexdigest()[:32]
        path = self._folder / name[:2] / f"{name}.json"
        if path.exists():
            found: dict[str, Any] = json.loads(path.read_text())
            return found
        made = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")
        unfinished.write_text(json.dumps(made))
        unfinished.rename(path)  # a run that is interrupted leaves no half of it
        return made


@cache
def code_fingerprint(ours: bool = True) -> str:
    """Of the source that a point runs: figures of older code are not taken for those of this one.

    Which modules these are, a fresh interpreter says that imports what `measure` calls. Where the system is not
    `ours`, what only ours runs is left out: a change of the planner does not unmake what baselines held.
    """
    root = Path(__file__).resolve().parent.parent
    script = (
        "import sys, benchmarks.simulator.run, benchmarks.scenarios;"
        "print(*[m.__file__ for m in list(sys.modules.values()) if getattr(m, '__file__', None)], sep='\\n')"
    )
    command = [sys.executable, "-c", script]
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    sources = [Path(line) for line in listed.splitlines()]
    sources = [path for path in sources if path.is_relative_to(root) and ".venv" not in path.parts]
    if not ours:
        ours_only = tuple(str(root / name) for name in OURS_ONLY)
        sources = [path for path in sources if not str(path).startswith(ours_only)]
    digest = hashlib.sha256()
    for path in [*sorted(sources), *sorted((root / "configs" / "hardware").glob("*.json"))]:
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def capacity(
    at: Callable[[float], Point],
    share: float,
    guess: float,
    precision: float = PRECISION,
    first_step: float = FIRST_STEP,
) -> tuple[float, list[Point]]:
    """Highest rate per GPU that holds, by bracketing from `guess` and bisection. Returns it with all points.

    Rates are powers of 1 + `precision`: a search that begins where another has ended asks for the same ones.
    The bracket grows from a factor of `first_step` on, each step twice as far: small where the guess is good.

    The figure is the rate that really came at the highest point that held below the first that did not.
    """
    points: list[Point] = []

    def holds(power: int) -> bool:
        point = at(_rate(power, precision))
        points.append(point)
        return point.holds(share)

    low: int | None = None
    high: int | None = None
    power, step = _power(guess, precision), first_step
    for _ in range(MOST_DOUBLINGS):
        if holds(power):
            low = power
            if high is not None:
                break
            power += max(_power(step, precision), 1)
        else:
            high = power
            if low is not None or _rate(power, precision) < LEAST_RATE:
                break
            power -= max(_power(step, precision), 1)
        step = min(1 + 2 * (step - 1), MOST_STEP)
    while low is not None and high is not None and high - low > 1:
        middle = (low + high) // 2
        if holds(middle):
            low = middle
        else:
            high = middle
    held = [point for point in points if point.holds(share)]
    best = max(held, key=lambda point: point.asked_per_gpu, default=None)
    return (0.0 if best is None else best.rate_per_gpu), points


def _rate(power: int, precision: float) -> float:
    """Rounded, so that it is the same number wherever it is asked for."""
    return round((1 + precision) ** power, DIGITS)


def _power(rate: float, precision: float) -> int:
    """Of 1 + `precision`, the one that is nearest."""
    return round(math.log(rate) / math.log(1 + precision))


def highest_held(points: Sequence[Point], share: float) -> float:
    """The highest rate asked for that held; 0 if none did."""
    return max((point.asked_per_gpu for point in points if point.holds(share)), default=0.0)


def tune(
    setting: Setting,
    share: float,
    guess: float,
    seed: int,
    cache: Cache,
    first_step: float = FIRST_STEP,
) -> tuple[Tuning, float]:
    """The best settings on a seed of its own: one thing after another, each kept if it holds a higher rate.

    Returns them and the highest rate asked for that held. It begins with the setting's own, at `guess`. In runs
    as long as those that are reported: shorter ones choose worse where arrivals are bursty.
    """

    def at(tuning: Tuning) -> Callable[[float], Point]:
        trial = replace(setting, tuning=tuning)
        return lambda rate: cache.point(trial, rate, seed, share)

    def search(tuning: Tuning, start: float, first_step: float) -> float:
        _, points = capacity(at(tuning), share, start, PRECISION, first_step)
        return highest_held(points, share)

    best = setting.tuning
    most = search(best, guess, first_step)
    for field, values in design(setting.system).tried.items():
        if field == "ratio" and not setting.tuning.prefill:
            continue
        for value in values:
            trial = tuned(design(setting.system), field, value, best)
            if trial == best:
                continue
            next_rate = _rate(_power(max(most, LEAST_RATE), PRECISION) + 1, PRECISION)
            if at(trial)(next_rate).holds(share):
                best, most = trial, search(trial, next_rate, NEAR_STEP)
    return best, most


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, least and most."""
    return {"mean": sum(values) / len(values), "least": min(values), "most": max(values)}
