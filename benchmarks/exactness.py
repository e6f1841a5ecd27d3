"""Admission against judges of its own, over random small problems: `python -m benchmarks.exactness`.

Three judges that share no code with it (tests/planner): every plan of its family, one after another; a search
for batches tick by tick, which knows of no family; and the rule of Moore and Hodgson where that is exact.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track

from benchmarks.provenance import provenance
from coordinator.planner.admission import Plan, solve
from tests.planner import moore_hodgson, reference, step_oracle
from tests.planner.instances import (
    Case,
    at_the_edge,
    seeded_case,
    seeded_grid_case,
    seeded_saturated_case,
)

WRONG = ("differs", "cannot_be_kept")
LEAST_SHARE = 0.97  # of the most value that any batches could have


@dataclass(slots=True)
class Judged:
    """Counts over a batch of cases, and the seeds of those that went wrong, by what did."""

    counts: Counter[str]
    seeds: dict[str, list[int]]

    def note(self, what: str, seed: int) -> None:
        self.counts[what] += 1
        self.seeds.setdefault(what, []).append(seed)

    def report(self) -> dict[str, Any]:
        return {**self.counts, "seeds": self.seeds}


def bench_exactness(
    instances: Annotated[int, typer.Option(help="Random problems for each judge.")] = 2000,
    seed: Annotated[int, typer.Option(help="The first seed; the rest follow it.")] = 0,
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = Path("out/bench/exactness.json"),
) -> None:
    """How good admission is, judged by others; exits with 1 if it is worse than it should be."""
    console = Console()
    seeds = range(seed, seed + instances)
    began = time.perf_counter()
    results: dict[str, dict[str, Any]] = {
        "random": _random(track(seeds, "every plan and tick by tick", console=console)),
        "edge": _edge(track(seeds, "saturated, to the last token", console=console)),
        "moore_hodgson": _moore_hodgson(track(seeds, "Moore and Hodgson", console=console)),
    }
    facts = {"instances": instances, "wall_s": round(time.perf_counter() - began, 1)}
    out.parent.mkdir(parents=True, exist_ok=True)
    written = {**facts, **results, "provenance": provenance(seed)}
    out.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    console.print_json(data={**facts, **results})
    wrong = sum(each.get(what, 0) for each in results.values() for what in WRONG)
    if wrong or results["random"]["value_share_at_least"] < LEAST_SHARE:
        raise typer.Exit(1)


def _plan(case: Case) -> Plan:
    return solve(case.instance(), why=False)


def _admits_all(case: Case) -> bool:
    return len(_plan(case).admitted) == len(case.newcomers)


def _random(seeds: Any) -> dict[str, Any]:
    """Against every plan of the family, and against the oracle: value, and whether it can be kept."""
    judged = Judged(Counter(), {})
    for seed in seeds:
        case = seeded_case(seed)
        plan, found = _plan(case), reference.best(case)
        judged.counts["newcomers"] += len(case.newcomers)
        judged.counts["admitted"] += len(plan.admitted)
        judged.counts["kept"] += plan.kept
        judged.counts["equal"] += (plan.kept, plan.value) == (found.kept, found.value)
        if (plan.kept, plan.value) != (found.kept, found.value):
            judged.note("differs", seed)
        if not plan.exact:
            judged.note("not_exact", seed)
        if plan.kept:
            _judge_kept(judged, case, plan.admitted, seed)
        value = int(plan.value)
        judged.counts["value"] += value
        most = step_oracle.at_most(case, value)
        judged.counts["oracle_value_at_most"] += most
        judged.counts["below_oracle"] += value < most
    share = judged.counts["value"] / max(judged.counts["oracle_value_at_most"], 1)
    return {"value_share_at_least": round(share, 4), **judged.report()}


def _edge(seeds: Any) -> dict[str, Any]:
    """Where the running decodes take most of every batch, and the admitted are as long as they may be."""
    judged = Judged(Counter(), {})
    for seed in seeds:
        case = seeded_saturated_case(seed)
        admitted = _plan(case).admitted
        case = replace(case, newcomers=tuple(job for job in case.newcomers if job.id in admitted))
        if case.newcomers:
            judged.counts["judged"] += 1
            _judge_kept(judged, at_the_edge(case, _admits_all), admitted, seed)
    return judged.report()


def _moore_hodgson(seeds: Any) -> dict[str, Any]:
    judged = Judged(Counter(), {})
    for seed in seeds:
        case = seeded_grid_case(seed)
        plan, most = _plan(case), moore_hodgson.most_admitted(case)
        same = (plan.value if plan.kept else -1) == most
        judged.counts["equal"] += same
        judged.counts["with_a_declined_one"] += 0 <= most < len(case.newcomers)
        if not same:
            judged.note("differs", seed)
    return judged.report()


def _judge_kept(judged: Judged, case: Case, admitted: tuple[str, ...], seed: int) -> None:
    try:
        if not step_oracle.feasible(case, admitted):
            judged.note("cannot_be_kept", seed)
    except step_oracle.Undecided:
        judged.note("undecided", seed)


if __name__ == "__main__":
    typer.run(bench_exactness)
