"""`slosserve bench scaling`: capacity of more and more replicas under bursts, against one replica's."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
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
from benchmarks.studies.search import SHARE, TUNING_SEED, capacities, guess, search, tuned_setting
from engine.errors import ConfigError

SCENARIO_NAMES = ("chatbot", "coder", "tool")
SYSTEM_NAMES = (OURS_NAME, "vllm", "sarathi-edf")
PAPER = {"chatbot": 4.61, "tool": 5.44, "coder": 6.2}  # SLOs-Serve: four replicas against one
PAPER_REPLICAS = 4


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured of a number of replicas. `duration_s`: of arrivals."""

    seeds: int
    duration_s: float


# The more replicas the longer a run takes, and the more requests come in a second of it.
EFFORTS: Mapping[int, Effort] = {
    1: Effort(3, 600.0),
    2: Effort(3, 600.0),
    4: Effort(3, 600.0),
    8: Effort(2, 300.0),
    16: Effort(2, 200.0),
}
QUICK_EFFORTS: Mapping[int, Effort] = {1: Effort(1, 60.0), 2: Effort(1, 60.0), 4: Effort(1, 60.0)}


@dataclass(frozen=True, slots=True)
class Cell:
    """A system with so many replicas in a scenario."""

    setting: Setting
    effort: Effort

    @property
    def text(self) -> str:
        """For the bar."""
        return f"{self.setting.scenario}: {self.setting.system} x {self.setting.replicas}"

    def jobs(self, begin: float, folder: Path, precision: float) -> list[Job]:
        """A search for each seed."""
        timed = replace(self.setting, duration_s=self.effort.duration_s)
        seeds = range(1, self.effort.seeds + 1)
        weight = _weight(self)
        return [Job(self.text, partial(search, timed, one, begin, folder, precision), weight) for one in seeds]


def scaling(
    scenario: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(SCENARIOS)} (repeatable).")] = None,
    system: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(DESIGNS)} (repeatable).")] = None,
    most: Annotated[int, typer.Option(min=1, help="Replicas, at most.")] = max(EFFORTS),
    seeds: Annotated[int, typer.Option(min=1, help="How many are reported, at most.")] = 3,
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = os.cpu_count() or 2,
    quick: Annotated[bool, typer.Option("--quick", help="One scenario, one short seed, no tuning.")] = False,
    cache: Annotated[Path, typer.Option(help="Where points are kept.")] = Path("out/bench/cache"),
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = Path("out/bench/scaling.json"),
) -> None:
    """Search the capacity of 1 to 16 replicas when requests come in bursts. Nothing is drafted.

    Example: slosserve bench scaling --scenario coder --most 4
    """
    console = Console()
    names = list(scenario or (("coder",) if quick else SCENARIO_NAMES))
    for name in names:
        if name not in SCENARIOS:
            raise ConfigError(f"no scenario {name!r}; there are {', '.join(SCENARIOS)}")
    efforts = {
        replicas: replace(effort, seeds=min(effort.seeds, seeds))
        for replicas, effort in (QUICK_EFFORTS if quick else EFFORTS).items()
        if replicas <= most
    }
    settings = [_setting(name, one) for name in names for one in system or SYSTEM_NAMES]
    cells = [Cell(replace(one, replicas=many), effort) for one in settings for many, effort in efforts.items()]
    total = sum(_weight(cell) * cell.effort.seeds for cell in cells) + (0 if quick else len(settings))
    with Crew(console, workers, total) as crew:
        tuned = _tuned(crew, settings, not quick, cache)
        best = [replace(cell.setting, tuning=tuned[_which(cell.setting)]) for cell in cells]
        cells = [replace(cell, setting=setting) for cell, setting in zip(cells, best, strict=True)]
        rows = measure(crew, cells, cache, 2 * PRECISION if quick else PRECISION)
    results: Row = {
        "scaling": summary(rows),
        "method": _method(efforts, quick),
        "rows": rows,
        "provenance": provenance(1),
    }
    write(out, results)
    console.print(_table(results["scaling"]))
    console.print(f"figures in {out}")


def measure(crew: Crew, cells: Sequence[Cell], folder: Path, precision: float) -> list[Row]:
    """A row of each cell. One replica is searched first: where its capacity is, the others begin."""
    begin = {_which(cell.setting): guess(cell.setting.scenario) for cell in cells}
    rows: list[Row] = []
    for chosen in ([c for c in cells if c.setting.replicas == 1], [c for c in cells if c.setting.replicas > 1]):
        jobs = [cell.jobs(begin[_which(cell.setting)], folder, precision) for cell in chosen]
        found = iter(crew.run([job for each in jobs for job in each]))
        new = [_row(cell, [next(found) for _ in each]) for cell, each in zip(chosen, jobs, strict=True)]
        begin |= {(row["scenario"], row["system"]): row["mean"] for row in new if row["mean"] > 0}
        rows += new
    return rows


def _row(cell: Cell, found: Sequence[Row]) -> Row:
    setting = cell.setting
    return {
        "scenario": setting.scenario,
        "system": setting.system,
        "replicas": setting.replicas,
        "tuning": setting.tuning.words,
        "duration_s": cell.effort.duration_s,
        **capacities(found),
        "per_seed": list(found),
    }


def summary(rows: Iterable[Row]) -> list[Row]:
    """By scenario, system and replicas: capacity per GPU and in all, and how many times one replica's."""
    one = {(row["scenario"], row["system"]): row["mean"] for row in rows if row["replicas"] == 1}
    found = []
    for row in rows:
        alone = one.get((row["scenario"], row["system"]))
        in_all = {key: row[key] * row["replicas"] for key in ("mean", "least", "most")}
        found.append(
            {
                **{key: row[key] for key in ("scenario", "system", "replicas")},
                "per_gpu": {key: row[key] for key in ("mean", "least", "most")},
                "in_all": in_all,
                "times_one": {key: value / alone for key, value in in_all.items()} if alone else None,
                "paper": PAPER.get(row["scenario"]) if row["replicas"] == PAPER_REPLICAS else None,
            }
        )
    return found


def _tuned(
    crew: Crew, settings: Sequence[Setting], tuning: bool, folder: Path
) -> dict[tuple[str, str], Tuning]:
    if not tuning:
        return {_which(one): one.tuning for one in settings}
    # One replica, for as long as one replica is measured.
    timed = [replace(one, duration_s=EFFORTS[1].duration_s) for one in settings]
    jobs = [Job(f"{one.scenario}: tuning {one.system}", partial(_tuning, one, folder)) for one in timed]
    found = crew.run(jobs)
    return {_which(one): Tuning(**row) for one, row in zip(settings, found, strict=True)}


def _tuning(setting: Setting, folder: Path) -> Row:
    return asdict(tuned_setting(setting, folder).tuning)


def _which(setting: Setting) -> tuple[str, str]:
    return setting.scenario, setting.system


def _weight(cell: Cell) -> float:
    """About how long a search takes: as many replicas, seconds; ours plans besides."""
    ours = cell.setting.system == OURS_NAME
    return cell.setting.replicas * cell.effort.duration_s / 600.0 * (10 if ours else 1)


def _setting(name: str, system: str) -> Setting:
    chosen = design(system)
    if chosen.disaggregated or chosen.drafts:
        raise ConfigError(f"{system} does not run on one replica without speculation")
    mode = "mixed" if system == OURS_NAME else "colocated"
    return Setting(name, "paper", system, mode, 1, chosen.defaults, arrivals="bursty")


def _method(efforts: Mapping[int, Effort], quick: bool) -> Row:
    return {
        "hardware": "paper",
        "arrivals": "gamma, CV 3",
        "acceptance": None,
        "share": SHARE,
        "efforts": {str(replicas): asdict(effort) for replicas, effort in efforts.items()},
        "fewer_seeds_and_shorter_runs_from": 8,
        "tuning": "as it comes" if quick else f"baselines on one replica, seed {TUNING_SEED}; ours as it comes",
        "routing": "ours plans; the others: the fewest requests outstanding",
        "times_one": "mean of all replicas / mean of one; least and most: of a seed, over the mean of one",
        "paper": f"SLOs-Serve, {PAPER_REPLICAS} replicas against one, with speculation",
    }


def _table(rows: Sequence[Row]) -> Table:
    title = f"requests a second under bursts, {SHARE:.0%} met"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for column in ("scenario", "system", "replicas", "per GPU", "in all", "times one", "paper"):
        table.add_column(column, justify="left" if column in ("scenario", "system") else "right")
    order = {key: at for at, key in enumerate(dict.fromkeys((row["scenario"], row["system"]) for row in rows))}
    for row in sorted(rows, key=lambda row: (order[row["scenario"], row["system"]], row["replicas"])):
        table.add_row(
            row["scenario"],
            row["system"],
            str(row["replicas"]),
            _spread(row["per_gpu"]),
            f"{row['in_all']['mean']:.1f}",
            "-" if row["times_one"] is None else _spread(row["times_one"]),
            "" if row["paper"] is None or row["system"] != OURS_NAME else f"{row['paper']:.2f}",
        )
    return table


def _spread(found: Mapping[str, float]) -> str:
    if found["least"] == found["most"]:
        return f"{found['mean']:.2f}"
    return f"{found['mean']:.2f} ({found['least']:.2f} to {found['most']:.2f})"


if __name__ == "__main__":
    start(scaling)
