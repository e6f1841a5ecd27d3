"""`slosserve bench burst`: a spike on a steady load, and how each system gets through it and over it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks.as_module import start
from benchmarks.capacity import PRECISION, Setting
from benchmarks.provenance import provenance
from benchmarks.scenarios import SCENARIOS
from benchmarks.simulator.systems import DESIGNS, OURS_NAME, Tuning, design
from benchmarks.studies.crew import Crew, Job, Row, write
from benchmarks.studies.search import SHARE, TUNING_SEED, guess, search, tuned_setting
from benchmarks.studies.timeline import Window, between, bins, figures, pooled, serve
from engine.errors import ConfigError

LOAD, SPIKE = 0.6, 3.0  # share of a capacity, and times that for as long as the spike lasts
STEADY_S, SPIKE_S = 120.0, 30.0  # before and after; the spike
QUICK_STEADY_S, QUICK_SPIKE_S, QUICK_SEARCH_S = 20.0, 10.0, 20.0
BIN_S = 5.0
SEARCH_S = 600.0
WARM_UP = 0.1  # of the time before the spike: not in the figures of that time
SAME, OWN = "same", "own"  # loads: a share of our capacity, or of the system's own
MEANING = {SAME: "of the capacity of ours, for everybody", OWN: "of the system's own capacity"}
RECOVERED_BINS = 2


@dataclass(frozen=True, slots=True)
class Shape:
    """The load over time, as seconds, and the capacity searches that set its rate."""

    scenario: str
    steady_s: float
    spike_s: float
    search_s: float

    @property
    def ends_s(self) -> float:
        """When no more requests come."""
        return 2 * self.steady_s + self.spike_s

    def windows(self, rate_per_s: float) -> tuple[Window, ...]:
        """Steady, the spike, steady again."""
        steady = Window(self.steady_s, ((self.scenario, rate_per_s),))
        return steady, Window(self.spike_s, ((self.scenario, SPIKE * rate_per_s),)), steady

    def phases(self) -> Mapping[str, tuple[float, float]]:
        """From when to when requests of each phase come, the warm-up left out."""
        spike = self.steady_s + self.spike_s
        return {
            "before": (WARM_UP * self.steady_s, self.steady_s),
            "spike": (self.steady_s, spike),
            "after": (spike, self.ends_s),
        }


def burst(
    scenario: Annotated[str, typer.Option(help=f"Of {', '.join(SCENARIOS)}; arrivals are Poisson.")] = "mixed",
    system: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(DESIGNS)} (repeatable).")] = None,
    acceptance: Annotated[
        float | None, typer.Option(min=0, max=1, help="Speculate; a draft is right with this chance.")
    ] = None,
    replicas: Annotated[int, typer.Option(min=1, help="GPUs (DistServe: those of its best ratio).")] = 2,
    seeds: Annotated[int, typer.Option(min=1, help="How many are reported, pooled.")] = 3,
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = os.cpu_count() or 2,
    quick: Annotated[bool, typer.Option("--quick", help="Short, one seed, nothing is tuned.")] = False,
    cache: Annotated[Path, typer.Option(help="Where runs are kept.")] = Path("out/bench/cache"),
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = Path("out/bench/burst.json"),
) -> None:
    """Send three times the load for half a minute, and follow every system through it.

    Example: slosserve bench burst --system ours --system sarathi-edf
    """
    console = Console()
    if scenario not in SCENARIOS:
        raise ConfigError(f"no scenario {scenario!r}; there are {', '.join(SCENARIOS)}")
    shape = Shape(scenario, STEADY_S, SPIKE_S, SEARCH_S)
    if quick:
        shape = Shape(scenario, QUICK_STEADY_S, QUICK_SPIKE_S, QUICK_SEARCH_S)
    numbers = (1,) if quick else tuple(range(1, seeds + 1))
    settings = [_setting(name, shape, replicas, acceptance) for name in _systems(system, acceptance)]
    with Crew(console, workers, len(settings) * (1 + 2 * len(numbers))) as crew:
        steady = [partial(steady_capacity, one, not quick, cache) for one in settings]
        jobs = zip(settings, steady, strict=True)
        found = crew.run([Job(f"capacity: {one.system}", measure) for one, measure in jobs])
        rates = {row["system"]: row["capacity_per_gpu"] for row in found}
        best = [Tuning(**row["settings"]) for row in found]
        tuned = [replace(one, tuning=tuning) for one, tuning in zip(settings, best, strict=True)]
        same = [Case(one, SAME, LOAD * rates[OURS_NAME]) for one in tuned]
        own = [Case(one, OWN, LOAD * rates[one.system]) for one in tuned]
        rows = through(crew, same, shape, numbers, cache) + through(crew, own, shape, numbers, cache)
    results = {
        "rows": rows,
        "capacities": found,
        "method": _method(shape, replicas, acceptance, numbers),
        "provenance": provenance(numbers[0]),
    }
    write(out, results)
    for load in (SAME, OWN):
        console.print(_table(rows, load))
    console.print(f"figures in {out}")


def steady_capacity(setting: Setting, tuning: bool, folder: Path) -> Row:
    """Of one system without a spike, on the tuning seed, at its best settings if `tuning`."""
    best = tuned_setting(setting, folder) if tuning else setting
    precision = PRECISION if tuning else 2 * PRECISION
    found = search(best, TUNING_SEED, guess(setting.scenario), folder, precision)
    return {"system": setting.system, "tuning": best.tuning.words, "settings": asdict(best.tuning), **found}


@dataclass(frozen=True, slots=True)
class Case:
    """A system at a load."""

    setting: Setting
    load: str
    rate_per_gpu: float

    def serve(self, shape: Shape, seed: int, folder: Path) -> Row:
        """One run."""
        deployment = self.setting.deployment()
        windows = shape.windows(self.rate_per_gpu * deployment.gpus)
        return serve(deployment, windows, self.setting.link_bytes_per_s, seed, folder)


def through(crew: Crew, cases: Sequence[Case], shape: Shape, seeds: Sequence[int], folder: Path) -> list[Row]:
    """A row of each case that has a load at all, its seeds pooled."""
    cases = [case for case in cases if case.rate_per_gpu > 0]
    jobs = [
        Job(f"{case.setting.system}, {case.load} load", partial(case.serve, shape, seed, folder))
        for case in cases
        for seed in seeds
    ]
    runs = iter(crew.run(jobs))
    rows = []
    for case in cases:
        mine = [next(runs) for _ in seeds]
        requests = pooled(mine)
        series = bins(requests, shape.ends_s, BIN_S)
        spans = shape.phases().items()
        rows.append(
            {
                "system": case.setting.system,
                "load": case.load,
                "rate_per_gpu": case.rate_per_gpu,
                "gpus": case.setting.deployment().gpus,
                "tuning": case.setting.tuning.words,
                "drained": all(one["drained"] for one in mine),
                "recovered_s": recovered_s(series, shape.steady_s + shape.spike_s),
                "phases": {name: figures(between(requests, *span)) for name, span in spans},
                "series": series,
            }
        )
    return rows


def recovered_s(series: Sequence[Row], end_s: float) -> float | None:
    """From the end of the spike until requests that come are met again at SHARE, for RECOVERED_BINS in turn."""
    after = [one for one in series if one["from_s"] >= end_s]
    for at, one in enumerate(after):
        following = after[at : at + RECOVERED_BINS]
        if all(each["attainment"] is None or each["attainment"] >= SHARE for each in following):
            return float(one["from_s"]) - end_s
    return None


def _systems(named: Sequence[str] | None, acceptance: float | None) -> list[str]:
    fit = [one.name for one in DESIGNS.values() if acceptance is not None or not one.drafts]
    for name in named or ():
        if design(name).name not in fit:
            raise ConfigError(f"{name} speculates: give --acceptance")
    # Ours is always among them: its capacity sets the load that is the same for all.
    return [name for name in fit if named is None or name in named or name == OURS_NAME]


def _setting(name: str, shape: Shape, replicas: int, acceptance: float | None) -> Setting:
    chosen = design(name)
    mode = "disaggregated" if chosen.disaggregated else "mixed" if name == OURS_NAME else "colocated"
    return Setting(
        shape.scenario, "paper", name, mode, replicas, chosen.defaults, acceptance,
        arrivals="poisson", duration_s=shape.search_s,
    )  # fmt: skip


def _method(shape: Shape, replicas: int, acceptance: float | None, seeds: Sequence[int]) -> Row:
    return {
        "hardware": "paper",
        "replicas": replicas,
        "acceptance": acceptance,
        "shape": asdict(shape),
        "load": LOAD,
        "spike": SPIKE,
        "loads": MEANING,
        "capacity": f"steady, at {SHARE:.0%}, seed {TUNING_SEED}, {shape.search_s:g} s",
        "bin_s": BIN_S,
        "warm_up_share_of_before": WARM_UP,
        "seeds": list(seeds),
        "quantiles": "TTFT of requests that got a token, TPOT and latency of completed ones; seeds pooled",
        "recovered_s": f"until {RECOVERED_BINS} bins in turn that come after the spike are met at {SHARE:.0%}",
    }


def _table(rows: Sequence[Row], load: str) -> Table:
    title = f"a spike of {SPIKE:g} times a load of {LOAD:.0%} {MEANING[load]}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("system", no_wrap=True)
    table.add_column("arrived")
    for column in ("met", "TTFT p50 s", "p99 s", "TPOT p99 ms", "best effort", "p99 s", "back s"):
        table.add_column(column, justify="right")
    for row in (one for one in rows if one["load"] == load):
        rate = f"{row['rate_per_gpu']:.2f}/s a GPU"
        for label, (name, phase) in zip((row["system"], rate, ""), row["phases"].items(), strict=True):
            table.add_row(
                label,
                name,
                _words(phase["attainment"], ".0%"),
                _words(phase["ttft_s"]["p50"], ".2f"),
                _words(phase["ttft_s"]["p99"], ".1f"),
                _words(phase["tpot_s"]["p99"], ".0f", 1e3),
                f"{phase['best_effort_completed']}/{phase['best_effort']}" if phase["best_effort"] else "-",
                _words(phase["best_effort_latency_s"]["p99"], ".0f"),
                _words(row["recovered_s"], ".0f") if name == "after" else "",
            )
        table.add_section()
    return table


def _words(value: float | None, form: str, times: float = 1.0) -> str:
    return "-" if value is None else format(value * times, form)


if __name__ == "__main__":
    start(burst)
