"""`slosserve bench rebalance`: the mix of requests shifts half way, and roles do or do not shift with it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks.as_module import start
from benchmarks.capacity import PRECISION, Setting
from benchmarks.hardware import LINKS, hardware
from benchmarks.provenance import provenance
from benchmarks.scenarios import SCENARIOS
from benchmarks.simulator.slosserve import Resize
from benchmarks.simulator.systems import OURS_NAME, Deployment, Tuning, roles_for
from benchmarks.studies.crew import Crew, Job, Row, write
from benchmarks.studies.search import SHARE, TUNING_SEED, guess, search
from benchmarks.studies.timeline import Requests, Window, between, bins, figures, pooled, serve
from engine.errors import ConfigError
from engine.request import RoleName

REPLICAS = 4
Ratio = tuple[int, int]
RATIOS: tuple[Ratio, ...] = ((3, 1), (2, 2), (1, 3))  # prefill and decode nodes
MUCH, LITTLE = 0.8, 0.1  # of the capacity for it: what comes of either scenario, before and after
HALF_S, SEARCH_S, QUICK_HALF_S, QUICK_SEARCH_S = 180.0, 180.0, 25.0, 15.0
LATE_S = 10.0  # until somebody has noticed the shift
BIN_S, DIP_BIN_S, DIP_S = 5.0, 10.0, 60.0
WARM_UP = 0.1  # of the first half


@dataclass(frozen=True, slots=True)
class Shift:
    """The load: which scenario comes much at first, which later, and for how long."""

    before: str
    after: str
    half_s: float

    def windows(self, rates_per_s: Mapping[str, float]) -> tuple[Window, Window]:
        """`rates_per_s`: what the best pools for a scenario hold of it alone."""
        shares = ((MUCH, LITTLE), (LITTLE, MUCH))
        first, later = (
            ((self.before, a * rates_per_s[self.before]), (self.after, b * rates_per_s[self.after]))
            for a, b in shares
        )
        return Window(self.half_s, first), Window(self.half_s, later)


@dataclass(frozen=True, slots=True)
class Arrangement:
    """Four replicas: their roles at first, and as they change."""

    name: str
    roles: tuple[RoleName, ...]
    resizes: tuple[Resize, ...] = ()
    one_node: bool = False
    follows_load: bool = False

    def serve(self, windows: Sequence[Window], bytes_per_s: float, seed: int, folder: Path) -> Row:
        """One run."""
        deployment = Deployment(
            OURS_NAME,
            hardware("paper"),
            self.roles,
            Tuning(),
            one_node=self.one_node,
            resizes=self.resizes,
            follows_load=self.follows_load,
        )
        return serve(deployment, windows, bytes_per_s, seed, folder)


def rebalance(
    before: Annotated[str, typer.Option(help="Most requests at first: short outputs.")] = "coder",
    after: Annotated[str, typer.Option(help="Most requests later: longer outputs.")] = "chatbot",
    link: Annotated[str, typer.Option(help=f"Between replicas: {', '.join(LINKS)}.")] = "nvlink",
    seeds: Annotated[int, typer.Option(min=1, help="How many are reported, pooled.")] = 3,
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = os.cpu_count() or 2,
    quick: Annotated[bool, typer.Option("--quick", help="Short, one seed: a look.")] = False,
    cache: Annotated[Path, typer.Option(help="Where runs are kept.")] = Path("out/bench/cache"),
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = Path("out/bench/rebalance.json"),
) -> None:
    """Shift the mix of requests on four replicas, with roles that stay, roles that follow, and none.

    Example: slosserve bench rebalance --before summarizer --after chatbot
    """
    console = Console()
    _check(before, after, link)
    shift = Shift(before, after, QUICK_HALF_S if quick else HALF_S)
    bytes_per_s = LINKS[link].bytes_per_s
    numbers = (1,) if quick else tuple(range(1, seeds + 1))
    with Crew(console, workers, 2 * len(RATIOS) + 8 * len(numbers)) as crew:
        searched = search_pools(crew, (before, after), bytes_per_s, quick, cache)
        best = {name: max(RATIOS, key=lambda ratio: rates[ratio]) for name, rates in searched.items()}
        rates_per_s = {name: REPLICAS * max(rates.values()) for name, rates in searched.items()}
        if not all(rates_per_s.values()):
            raise ConfigError(f"no pools hold {SHARE:.0%} of {before} or {after} at any rate over {link}")
        windows = shift.windows(rates_per_s)
        listed = arrangements(best[before], best[after], shift.half_s)
        rows = measure(crew, listed, windows, bytes_per_s, numbers, cache)
    results = {
        "rows": rows,
        "pools": {
            name: {
                "best": words_of(best[name]),
                "per_gpu": {words_of(one): rate for one, rate in rates.items()},
            }
            for name, rates in searched.items()
        },
        "method": _method(shift, windows, link, quick, numbers),
        "provenance": provenance(numbers[0]),
    }
    write(out, results)
    console.print(shift_table(rows, shift))
    console.print(f"figures in {out}")


def search_pools(
    crew: Crew, names: Sequence[str], bytes_per_s: float, quick: bool, folder: Path
) -> dict[str, dict[Ratio, float]]:
    """Capacity per GPU by scenario and ratio, each scenario alone, on the tuning seed."""
    precision = 2 * PRECISION if quick else PRECISION
    keys = [(name, ratio) for name in names for ratio in RATIOS]
    jobs = []
    for name, (prefill, decode) in keys:
        setting = Setting(
            name, "paper", OURS_NAME, "disaggregated", REPLICAS, Tuning(prefill=prefill, decode=decode),
            link_bytes_per_s=bytes_per_s, arrivals="poisson", duration_s=QUICK_SEARCH_S if quick else SEARCH_S,
        )  # fmt: skip
        once = partial(search, setting, TUNING_SEED, guess(name) / 2, folder, precision)
        jobs.append(Job(f"{words_of((prefill, decode))}: {name}", once))
    found: dict[str, dict[Ratio, float]] = {name: {} for name in names}
    for (name, ratio), row in zip(keys, crew.run(jobs), strict=True):
        found[name][ratio] = row["capacity_per_gpu"]
    return found


def arrangements(before: Ratio, after: Ratio, shift_s: float) -> list[Arrangement]:
    """Pools that stay, replicas without pools, pools that are told to change from what is best for `before` to
    what is best for `after`, and pools that follow the load by themselves."""
    mixed = roles_for("mixed", REPLICAS)
    first = roles_for("disaggregated", 0, *before)
    return [
        *(Arrangement(f"{words_of(one)}, stays", roles_for("disaggregated", 0, *one)) for one in RATIOS),
        Arrangement("colocated", mixed, one_node=True),
        Arrangement("mixed", mixed),
        *(
            Arrangement(
                f"{words_of(before)} to {words_of(after)}, {words}",
                first,
                (Resize(shift_s + late_s, *after),),
            )
            for late_s, words in ((0.0, "at the shift"), (LATE_S, f"{LATE_S:g} s late"))
        ),
        Arrangement(f"{words_of(before)}, follows the load", first, follows_load=True),
    ]


def measure(
    crew: Crew,
    listed: Sequence[Arrangement],
    windows: Sequence[Window],
    bytes_per_s: float,
    seeds: Sequence[int],
    folder: Path,
) -> list[Row]:
    """A row of each arrangement, its seeds pooled."""
    pairs = [(one, seed) for one in listed for seed in seeds]
    jobs = [Job(one.name, partial(one.serve, windows, bytes_per_s, seed, folder)) for one, seed in pairs]
    runs = iter(crew.run(jobs))
    shift_s, end_s = windows[0].seconds, sum(window.seconds for window in windows)
    rows = []
    for one in listed:
        mine = [next(runs) for _ in seeds]
        rows.append(
            {
                "arrangement": one.name,
                "roles": [str(role) for role in one.roles],
                "resizes": [asdict(each) for each in one.resizes],
                **around(pooled(mine), shift_s, end_s),
                "drained": all(each["drained"] for each in mine),
            }
        )
    return rows


def around(requests: Requests, shift_s: float, end_s: float) -> Row:
    """What became of requests before a shift, right after it, and since then."""
    dips = [row for row in bins(requests, end_s, DIP_BIN_S) if shift_s <= row["from_s"] < shift_s + DIP_S]
    return {
        "before": figures(between(requests, WARM_UP * shift_s, shift_s)),
        "after": figures(between(requests, shift_s, end_s)),
        "settled": figures(between(requests, min(shift_s + DIP_S, end_s - BIN_S), end_s)),
        "dip": min((row["attainment"] for row in dips if row["requests"]), default=None),
        "series": bins(requests, end_s, BIN_S),
    }


def _check(before: str, after: str, link: str) -> None:
    for name in (before, after):
        if name not in SCENARIOS:
            raise ConfigError(f"no scenario {name!r}; there are {', '.join(SCENARIOS)}")
    if before == after:
        raise ConfigError(f"the mix does not shift from {before} to {after}")
    if link not in LINKS:
        raise ConfigError(f"no link {link!r}; there are {', '.join(LINKS)}")


def _method(shift: Shift, windows: Sequence[Window], link: str, quick: bool, seeds: Sequence[int]) -> Row:
    return {
        "hardware": "paper",
        "replicas": REPLICAS,
        "acceptance": None,
        "link": link,
        "shift": asdict(shift),
        "windows": [asdict(window) for window in windows],
        "load": f"{MUCH:.0%} of what the best pools hold of one scenario alone, and {LITTLE:.0%} of the other",
        "pools": f"searched at {SHARE:.0%}, seed {TUNING_SEED}, {QUICK_SEARCH_S if quick else SEARCH_S:g} s",
        "roles": "change at once, busy or not: new requests go by them, what runs ends where it is",
        "before": f"from {WARM_UP:.0%} of the first half on",
        "dip": f"the worst {DIP_BIN_S:g} s of arrivals in the {DIP_S:g} s after the shift, seeds pooled",
        "settled": f"from {DIP_S:g} s after the shift on",
        "bin_s": BIN_S,
        "seeds": list(seeds),
    }


def words_of(ratio: Ratio) -> str:
    """As people write it: 3P1D."""
    return f"{ratio[0]}P{ratio[1]}D"


def shift_table(rows: Sequence[Row], shift: Shift) -> Table:
    """Promises kept, for people."""
    title = f"requests met while most are {shift.before}, then {shift.after}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("four replicas", no_wrap=True)
    for column in ("before", "dip", "after", "settled", "TTFT p99 s", "TPOT p99 ms"):
        table.add_column(column, justify="right")
    for row in rows:
        late = row["after"]
        table.add_row(
            row["arrangement"],
            *(_share(value) for value in (row["before"]["attainment"], row["dip"], late["attainment"])),
            _share(row["settled"]["attainment"]),
            "-" if late["ttft_s"]["p99"] is None else f"{late['ttft_s']['p99']:.1f}",
            "-" if late["tpot_s"]["p99"] is None else f"{late['tpot_s']['p99'] * 1e3:.0f}",
        )
    return table


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


if __name__ == "__main__":
    start(rebalance)
