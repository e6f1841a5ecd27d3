"""`slosserve bench ablation`: what each part of ours adds, as capacity with it over capacity without."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.as_module import start
from benchmarks.capacity import FIRST_STEP, NEAR_STEP, PRECISION, Cache, Setting
from benchmarks.provenance import provenance
from benchmarks.scenarios import SCENARIOS
from benchmarks.simulator.systems import OURS_NAME, Tuning
from benchmarks.simulator.variants import KNOWN_LENGTHS, NO_ADMISSION, NO_BURSTS, NO_PRICE, NO_ROUTING
from benchmarks.studies.crew import Crew, Job, Row, write
from benchmarks.studies.search import SHARE, capacities, geometric_mean, guess, ratio, search
from engine.errors import ConfigError

FULL = "ours in full"
NO_SPECULATION, COLOCATED, DISAGGREGATED = "no speculation", "no mixed placement", "disaggregated"
# What is other than in FULL: fields of the Setting.
PARTS: Mapping[str, Mapping[str, Any]] = {
    FULL: {},
    NO_ROUTING: {"variant": NO_ROUTING},
    NO_SPECULATION: {"acceptance": None},
    NO_BURSTS: {"variant": NO_BURSTS},
    NO_ADMISSION: {"variant": NO_ADMISSION},
    NO_PRICE: {"variant": NO_PRICE},
    COLOCATED: {"mode": "colocated"},
    DISAGGREGATED: {"mode": "disaggregated"},
    KNOWN_LENGTHS: {"variant": KNOWN_LENGTHS},
}
MEANING = {
    NO_ROUTING: "each request is offered to one replica alone, by turns",
    NO_SPECULATION: "nothing is drafted",
    NO_BURSTS: "a request that does not fit is refused at once, and never waits as best effort",
    NO_ADMISSION: "everybody is promised at the least loaded replica; one with 256 waiting still declines",
    NO_PRICE: "whoever fits is admitted, however dear",
    COLOCATED: "no request is prefilled on one replica and decoded on another",
    DISAGGREGATED: "half of the replicas prefill, the others decode",
    KNOWN_LENGTHS: "max_tokens is the true output length: a bound on better forecasts, not a part",
}
PAPER = {NO_ROUTING: 1.19, NO_SPECULATION: 1.66, NO_BURSTS: 1.34}  # SLOs-Serve, four replicas
SCENARIO_NAMES = ("chatbot", "coder", "tool", "mixed")
QUICK_NAMES = ("chatbot", "coder")
ACCEPTANCE = 0.7
ORDERS = ("arrival order", "density")  # how a planner without the DP would choose
FRACTIONS = (1.25,)  # of the capacity in full: at these rates attainment is given too
FACTS = ("counted", "admitted", "admitted_kept", "refused", "pairs")
SECONDS, QUICK_SECONDS = 600.0, 15.0
DRAFTING_GIVES = 1.3  # about; where the search in full begins
PLANNER_RESULTS = Path(__file__).parent.parent / "results" / "planner.json"


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured."""

    duration_s: float
    seeds: tuple[int, ...]
    precision: float
    folder: Path


def ablation(
    scenario: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(SCENARIOS)} (repeatable).")] = None,
    part: Annotated[list[str] | None, typer.Option(help="Only without this part (repeatable).")] = None,
    replicas: Annotated[int, typer.Option(min=2, help="GPUs.")] = 2,
    seeds: Annotated[int, typer.Option(min=1, help="How many are reported.")] = 3,
    duration_s: Annotated[float, typer.Option(min=1, help="Of arrivals, simulated.")] = SECONDS,
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = os.cpu_count() or 2,
    quick: Annotated[bool, typer.Option("--quick", help="Two scenarios, one short seed: a look.")] = False,
    cache: Annotated[Path, typer.Option(help="Where points are kept.")] = Path("out/bench/cache"),
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = Path("out/bench/ablation.json"),
) -> None:
    """Measure ours without each of its parts. What was measured before is not measured again.

    Example: slosserve bench ablation --scenario coder --part "no routing"
    """
    console = Console()
    names = _chosen("scenario", scenario or (QUICK_NAMES if quick else SCENARIO_NAMES), SCENARIOS)
    parts = [FULL, *_chosen("part", part or [one for one in PARTS if one != FULL], PARTS)]
    numbers = (1,) if quick else tuple(range(1, seeds + 1))
    effort = Effort(
        QUICK_SECONDS if quick else duration_s, numbers, 2 * PRECISION if quick else PRECISION, cache
    )
    total = len(names) * len(numbers) * (1 + len(parts))
    with Crew(console, workers, total) as crew:
        rows = measure(crew, names, parts, replicas, effort)
    results: Row = {
        "parts": {one: summary(one, rows, names) for one in parts},
        "greedy instead of the DP": greedy(),
        "method": _method(replicas, effort),
        "rows": rows,
        "provenance": provenance(numbers[0]),
    }
    write(out, results)
    console.print(_table(results["parts"], names))
    console.print(f"greedy instead of the DP: {results['greedy instead of the DP']['note']}", highlight=False)
    console.print(f"figures in {out}")


def measure(crew: Crew, names: Sequence[str], parts: Sequence[str], replicas: int, effort: Effort) -> list[Row]:
    """Ours in full first: where its capacity is, the searches without a part begin."""
    keys = [(name, seed) for name in names for seed in effort.seeds]
    first = []
    for name, seed in keys:
        full = setting(name, FULL, replicas, effort)
        once = partial(search, full, seed, DRAFTING_GIVES * guess(name), effort.folder, effort.precision)
        first.append(Job(f"{FULL}: {name}", once))
    found = dict(zip(keys, crew.run(first), strict=True))
    jobs = []
    for name in names:
        usual = capacities([found[name, seed] for seed in effort.seeds])["mean"] or guess(name)
        for one in parts:
            for seed in effort.seeds:
                begin = DRAFTING_GIVES * guess(name) if one == FULL else usual
                once = partial(without, name, one, seed, replicas, effort, begin, usual)
                jobs.append(Job(f"{one}: {name}", once))
    return crew.run(jobs)


def without(name: str, part: str, seed: int, replicas: int, effort: Effort, begin: float, usual: float) -> Row:
    """A row: capacity without a part, and attainment at fixed rates. `usual`: capacity in full, per GPU."""
    chosen = setting(name, part, replicas, effort)
    step = FIRST_STEP if part == FULL else NEAR_STEP
    found = search(chosen, seed, begin, effort.folder, effort.precision, step)
    points = [Cache(effort.folder).point(chosen, fraction * usual, seed, None) for fraction in FRACTIONS]
    return {
        "scenario": name,
        "part": part,
        **found,
        "at_fractions": [
            {
                "fraction_of_full": fraction,
                "rate_per_gpu": point.rate_per_gpu,
                "attainment": point.attainment,
                **{key: point.facts[key] for key in FACTS},
            }
            for fraction, point in zip(FRACTIONS, points, strict=True)
        ],
    }


def setting(name: str, part: str, replicas: int, effort: Effort) -> Setting:
    """Ours on the paper's machine, without `part`."""
    pools = Tuning(prefill=replicas // 2, decode=replicas - replicas // 2)
    full = Setting(name, "paper", OURS_NAME, "mixed", replicas, pools, ACCEPTANCE, duration_s=effort.duration_s)
    return replace(full, **PARTS[part])


def summary(part: str, rows: Sequence[Row], names: Sequence[str]) -> Row:
    """Of one part: capacity and ratio by scenario, and the geometric mean of the ratios."""
    by_scenario: dict[str, Row] = {}
    for name in names:
        full, mine = (
            [row for row in rows if (row["scenario"], row["part"]) == (name, one)] for one in (FULL, part)
        )
        by_scenario[name] = {
            "capacity_per_gpu": capacities(mine),
            "full_over_this": ratio(*([row["capacity_per_gpu"] for row in each] for each in (full, mine))),
            "attainment_at_fractions": [
                sum(row["at_fractions"][at]["attainment"] for row in mine) / len(mine)
                for at in range(len(FRACTIONS))
            ],
        }
    ratios = [one["full_over_this"]["mean"] for one in by_scenario.values()]
    return {
        "meaning": MEANING.get(part, ""),
        "geometric_mean": geometric_mean(ratios),
        "paper": PAPER.get(part),
        "scenarios": by_scenario,
    }


def greedy(results: Path = PLANNER_RESULTS) -> Row:
    """What a choice by density loses against the DP where there is something to choose (bench planner)."""
    note = "nil by construction: live, one request is asked about at a time"
    if not results.is_file():
        return {"note": f"{note}; `python -m benchmarks.planner` measures several at once"}
    values = json.loads(results.read_text(encoding="utf-8"))["value"]
    lost = [
        {
            **{key: row[key] for key in ("scenario", "value", "kv", "newcomers_mean")},
            **{order: row["orders"][order]["value_lost_percent"] for order in ORDERS},
        }
        for row in values
    ]
    words = [
        f"{_range(lost, order, 'uniform')} if all count the same, {_range(lost, order, 'tokens')} by tokens"
        for order in ORDERS
    ]
    return {
        "note": f"{note}. Asked about some ten at once, value lost against the DP: in order of arrival "
        f"{words[0]}; by density {words[1]}",
        "source": "benchmarks/results/planner.json (`python -m benchmarks.planner`)",
        "value_lost_percent": lost,
    }


def _range(lost: Sequence[Row], order: str, value: str) -> str:
    found = [row[order] for row in lost if row["value"] == value]
    return f"{min(found):.1f} to {max(found):.1f} %"


def _method(replicas: int, effort: Effort) -> Row:
    return {
        "hardware": "paper",
        "replicas": replicas,
        "acceptance": ACCEPTANCE,
        "share": SHARE,
        "duration_s": effort.duration_s,
        "seeds": list(effort.seeds),
        "precision": effort.precision,
        "fractions": list(FRACTIONS),
        "full_over_this": "capacity in full / capacity without the part: above 1, the part adds capacity",
        "paper": "SLOs-Serve's own figures, four replicas; its burst handling is best effort too",
    }


def _chosen(what: str, named: Sequence[str], known: Mapping[str, Any]) -> list[str]:
    for name in named:
        if name not in known:
            raise ConfigError(f"no {what} {name!r}; there are {', '.join(known)}")
    return [name for name in named if name != FULL]


def _table(parts: Mapping[str, Row], names: Sequence[str]) -> Table:
    table = Table(
        "", *names, "geo. mean", "paper",
        title=f"capacity in full over capacity without (least to most of a seed), {SHARE:.0%} met; the first "
        "row: requests a second and GPU",
    )  # fmt: skip
    for part, found in parts.items():
        cells = [_cell(part, found["scenarios"][name]) for name in names]
        mean = "" if part == FULL else _times(found["geometric_mean"])
        table.add_row(part, *cells, mean, "" if found["paper"] is None else _times(found["paper"]))
    return table


def _cell(part: str, found: Row) -> str:
    capacity = found["capacity_per_gpu"]
    if part == FULL:
        return f"{capacity['mean']:.2f}" + _between(capacity)
    over = found["full_over_this"]
    if over["mean"] is None:
        return "held none"
    return f"{over['mean']:.2f}" + _between(over)


def _between(found: Row) -> str:
    if found["least"] == found["most"]:
        return ""
    return f"\n{_times(found['least'])} to {_times(found['most'])}"


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    start(ablation)
