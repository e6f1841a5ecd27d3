"""`slosserve bench agents`: loops of tool calls, with sessions, without, and on stock vLLM.

The same loops for all: as many calls, as long, at the same times. Ours with sessions keeps the history of a
loop while its tools run, and places the next call where it is; without, a call is a stranger whose prefix may
still be cached somewhere; stock vLLM has its prefix cache, and its clients send a loop to one server.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.agents.client import AgentsJob, SeenLoop
from benchmarks.agents.load import Loop, busy_s, draw_loops
from benchmarks.agents.measure import Row, add_up, loop_seconds
from benchmarks.agents.simulated import LOADS as SIMULATED_LOADS
from benchmarks.agents.simulated import SIMULATED_ON, SimulatedAgents
from benchmarks.fidelity.own_profile import Here, profile_here
from benchmarks.hardware import Hardware, fitting_tpot_scale, hardware
from benchmarks.provenance import commit, provenance
from benchmarks.real.command import PROFILE_MINUTES
from benchmarks.real.running import Running, running
from benchmarks.real.site import CPU, Site
from benchmarks.real.systems import SYSTEMS, RealSystem, configuration
from benchmarks.studies.crew import write
from engine.errors import SlosserveError
from engine.models import load_recipe

CLIENT = "benchmarks.agents.client"
LOADS = (0.3, 0.5, 0.7)  # of what the engines could compute, were no history computed twice
KEEPS = 0.9  # the load that is compared at is the highest of which stock vLLM keeps so much
REUSE_TARGET, RATIO_TARGET, SLOWER = 0.9, 0.7, 1.05
SECONDS, QUICK_SECONDS, DRAIN_S, WARM_UP_S = 240.0, 40.0, 60.0, 10.0
SAMPLE_S, SAMPLE_RATE, WARM_UP_RATE = 200.0, 1.0, 0.3


@dataclass(frozen=True, slots=True)
class Way:
    """A way to serve loops. `sessions`: calls say of which session they are."""

    name: str
    label: str
    system: str
    sessions: bool

    def on(self, engines: int) -> RealSystem:
        """The system behind it, on so many engines."""
        return SYSTEMS[self.system if engines == 1 else f"{self.system}-{engines}"]


WAYS = (
    Way("sessions", "slosserve", "ours", True),
    Way("no-sessions", "slosserve, no sessions", "ours", False),
    Way("vllm", "vLLM, loops by hash", "vllm", False),
)


@dataclass(slots=True)
class Agents:
    """What windows are measured with."""

    site: Site
    model: str
    engines: int
    hardware: Hardware
    profile: Path
    folder: Path
    seconds: float
    say: Callable[[str], None]
    seen: dict[tuple[str, float, int], list[float | None]] = field(default_factory=dict)

    @property
    def device(self) -> str:
        """What it is measured on."""
        return self.site.devices()[0]

    def most_per_s(self) -> float:
        """Loops a second that the engines could compute, were no history computed twice."""
        return self.engines / busy_s(self.hardware, draw_loops(self.hardware, SAMPLE_RATE, SAMPLE_S, seed=0))

    def windows(
        self, loads: Sequence[tuple[float, float]], seeds: Sequence[int], keep: Callable[[Row], None]
    ) -> None:
        """Every way at every (load, rate) and seed; `keep` is told of each window as it ends.

        Ways that need the same system take turns on it, so that they are compared within minutes.
        """
        for system in dict.fromkeys(way.on(self.engines) for way in WAYS):
            ways = [way for way in WAYS if way.on(self.engines) == system]
            self.say(f"starting {system.label}")
            tuning = system.defaults(self.site)
            config = configuration(self.site, system, tuning, self.model, self.profile)
            with running(self.site, system, config, self.folder, self.say) as started:
                warm = draw_loops(self.hardware, WARM_UP_RATE, WARM_UP_S, seed=0)
                self._run(started, ways[0], warm, f"warm-up-{ways[0].name}", WARM_UP_S)
                for load, rate in loads:
                    for seed in seeds:
                        for way in ways:
                            keep(self._window(started, way, load, rate, seed))

    def _window(self, started: Running, way: Way, load: float, rate: float, seed: int) -> Row:
        loops = draw_loops(self.hardware, rate, self.seconds, seed)
        self.say(f"{way.label}: {rate:.3f} loops/s, seed {seed}")
        seen = self._run(started, way, loops, f"{way.name}-{load:g}-{seed}", self.seconds)
        self.seen[way.name, load, seed] = loop_seconds(loops, seen)
        row = add_up(loops, seen, self.site.block_tokens)
        about = {"way": way.name, "load": load, "rate_per_s": rate, "seed": seed, "seconds": self.seconds}
        return {**about, **row}

    def _run(self, started: Running, way: Way, loops: list[Loop], name: str, seconds: float) -> list[SeenLoop]:
        ours = way.on(self.engines).ours
        job = AgentsJob(
            targets=list(started.targets),
            sticky=not ours,
            sessions=way.sessions,
            slos=ours,
            name=name,
            model=started.model,
            vocab_size=load_recipe(self.model).vocab_size,
            loops=loops,
            cut_off_s=seconds + DRAIN_S + max((loop.tool_s for loop in loops), default=0.0),
        )
        return started.run(CLIENT, job, list[SeenLoop], self.folder, lambda _: None)


def bench_agents(
    rate: Annotated[list[float] | None, typer.Option(help="Loops a second (repeatable).")] = None,
    engines: Annotated[int, typer.Option(min=1, max=2, help="Real ones.")] = 2,
    seeds: Annotated[int, typer.Option(min=1, help="Windows at each load.")] = 3,
    seconds: Annotated[float, typer.Option(min=5, help="In which loops begin, of a window.")] = SECONDS,
    quick: Annotated[bool, typer.Option("--quick", help="One short window at one load: a look.")] = False,
    simulated: Annotated[bool, typer.Option("--simulated", help="In simulated time, on GPUs.")] = False,
    on: Annotated[str, typer.Option(help="Hardware of --simulated.")] = SIMULATED_ON,
    replicas: Annotated[int, typer.Option(min=1, help="Of --simulated.")] = 4,
    model: Annotated[str, typer.Option(help="Of `slosserve model make`.")] = CPU.model,
    step_profile: Annotated[
        str | None, typer.Option(help="Of the model here; else one that fits, or measured first.")
    ] = None,
    profile_minutes: Annotated[float, typer.Option(min=0.1, help="For measuring one.")] = PROFILE_MINUTES,
    out: Annotated[
        Path | None, typer.Option(help="Where the figures go.", show_default="out/bench/agents.json")
    ] = None,
) -> None:
    """Measure loops of 2 to 8 tool calls: how long they take, what is computed twice, and what is kept.

    On real engines, or, with --simulated, on replicas of a GPU's profile, where prompts and outputs are eight
    times as long.

    Example: slosserve bench agents --engines 1 --rate 0.2 --seeds 1
    """
    console = Console(width=110, highlight=False)
    kind = ("-simulated" if simulated else "") + ("-quick" if quick else "")
    out = out or Path("out/bench") / f"agents{kind}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    columns = (TextColumn("[progress.description]{task.description}"), BarColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=console, refresh_per_second=1) as progress:
            bar = progress.add_task("starting", total=None)

            def say(text: str) -> None:
                progress.update(bar, description=text)

            agents: Agents | SimulatedAgents
            if simulated:
                agents = SimulatedAgents(hardware(on), on, replicas, seconds, say)
            else:
                agents = _agents(model, engines, step_profile, profile_minutes, out.parent, say)
            of = SIMULATED_LOADS if simulated else LOADS
            agents.seconds = QUICK_SECONDS if quick else seconds
            chosen = tuple(range(1, (1 if quick else seeds) + 1))
            loads = _loads(agents, rate, of[:1] if quick else of)
            progress.update(bar, total=len(WAYS) * len(loads) * len(chosen))

            def keep(row: Row) -> None:
                rows.append(row)
                progress.advance(bar)
                write(out, told(rows, agents))

            agents.windows(loads, chosen, keep)
    except SlosserveError as error:
        Console(stderr=True).print(f"[red]error:[/red] {escape(str(error))}", highlight=False)
        raise typer.Exit(2) from error
    console.print(table(rows))
    for key, value in told(rows, agents).items():
        if isinstance(value, float):
            console.print(f"{key}: {value:.3f}")
    console.print(f"figures in {out}", soft_wrap=True)


def told(rows: Sequence[Row], agents: Agents | SimulatedAgents) -> Row:
    """The file of figures. What is compared stands at the top, once there is something to compare."""
    at = compared_at(rows)
    return {
        **headline(rows, at),
        "compared_at_load": at,
        "slower_than_without_sessions": slower(agents.seen),
        "targets": {"prompt_tokens_reused_share": REUSE_TARGET, "loop_p99_ratio_vs_stock": RATIO_TARGET},
        "ways": {way.name: way.label for way in WAYS},
        "engines": agents.engines,
        "tpot_scale": agents.hardware.tpot_scale,
        "simulated": isinstance(agents, SimulatedAgents),
        "measured_on": {
            "device": agents.device,
            "commit": commit(),
            "date": datetime.now(UTC).date().isoformat(),
        },
        "rows": list(rows),
        "provenance": provenance(1),
    }


def compared_at(rows: Sequence[Row]) -> float | None:
    """The highest load of which stock vLLM keeps 90 %, or, where it keeps that nowhere, the lowest."""
    kept: dict[float, list[float]] = {}
    for row in rows:
        if row["way"] == "vllm" and row["attainment"] is not None:
            kept.setdefault(row["load"], []).append(row["attainment"])
    holds = [load for load, shares in kept.items() if sum(shares) / len(shares) >= KEEPS]
    return max(holds) if holds else min(kept, default=None)


def headline(rows: Sequence[Row], load: float | None) -> dict[str, float | None]:
    """At one load, the means of its windows: what was reused, and the p99 of a loop beside stock vLLM's."""

    def mean(way: str, pick: Callable[[Row], float | None]) -> float | None:
        found = [pick(row) for row in rows if row["way"] == way and row["load"] == load]
        known = [one for one in found if one is not None]
        return sum(known) / len(known) if known else None

    ours, stock = (mean(way, lambda row: row["loop_s"]["p99"]) for way in ("sessions", "vllm"))
    return {
        "prompt_tokens_reused_share": mean("sessions", lambda row: row["reused_share"]),
        "loop_p99_ratio_vs_stock": ours / stock if ours is not None and stock else None,
    }


def slower(seen: Mapping[tuple[str, float, int], Sequence[float | None]]) -> dict[str, Any]:
    """Loops that took longer by more than 5 % with sessions than without, of those that ended both ways."""
    ratios = [
        mine / other
        for (way, load, seed), loops in seen.items()
        if way == "sessions" and ("no-sessions", load, seed) in seen
        for mine, other in zip(loops, seen["no-sessions", load, seed], strict=True)
        if mine is not None and other is not None
    ]
    return {
        "loops": len(ratios),
        "slower": sum(ratio > SLOWER for ratio in ratios),
        "largest_ratio": max(ratios, default=None),
    }


def table(rows: Sequence[Row]) -> Table:
    """For people: a line of each way and load, means over seeds."""
    shown = Table(title="loops of tool calls", title_justify="left")
    headings = ("", "loops/s", "p50", "p99", "reused", "calls kept", "loops kept", "errors")
    for heading in headings:
        shown.add_column(heading, justify="left" if not heading else "right")
    labels = {way.name: way.label for way in WAYS}
    for way, load in dict.fromkeys((row["way"], row["load"]) for row in rows):
        mine = [row for row in rows if (row["way"], row["load"]) == (way, load)]
        p50, p99 = (_mean([row["loop_s"][key] for row in mine]) for key in ("p50", "p99"))
        reused, calls, loops = (
            _mean([row[key] for row in mine]) for key in ("reused_share", "attainment", "loop_attainment")
        )
        shown.add_row(
            labels[way],
            f"{mine[0]['rate_per_s']:.3f}",
            _shown(p50, ".2f", " s"),
            _shown(p99, ".2f", " s"),
            _shown(reused, ".1%"),
            _shown(calls, ".1%"),
            _shown(loops, ".1%"),
            str(sum(row["errors"] for row in mine)),
        )
    return shown


def _agents(
    model: str,
    engines: int,
    step_profile: str | None,
    profile_minutes: float,
    folder: Path,
    say: Callable[[str], None],
) -> Agents:
    site, system = CPU, SYSTEMS["ours"]
    base = configuration(site, system, system.defaults(site), model, None)
    here = Here(site.devices()[0], site.profiles(folder), folder)
    profile = profile_here(base, step_profile, here, profile_minutes, say)
    known = hardware(profile, kv_tokens=1, max_batch_tokens=base.engine.max_batch_tokens)
    kv_tokens = int(site.kv_gib * 2**30 / known.kv_bytes_per_token)
    known = replace(known, kv_tokens=kv_tokens, tpot_scale=fitting_tpot_scale(known.cost))
    return Agents(site, model, engines, known, profile, folder, SECONDS, say)


def _loads(
    agents: Agents | SimulatedAgents, rates: Sequence[float] | None, loads: Sequence[float]
) -> list[tuple[float, float]]:
    """(load, loops a second): loads are shares of what the engines can compute."""
    most_per_s = agents.most_per_s()
    if rates:
        return [(round(rate / most_per_s, 3), rate) for rate in rates]
    return [(load, load * most_per_s) for load in loads]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _shown(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"
