"""`slosserve bench shift`: the mix of requests shifts half way, on real engines whose pools follow it or stay.

What `slosserve bench rebalance` simulates is served here: by one cluster, whose pools are resized between runs
as a user would do it. As many engines as it takes would share the cores of a small machine and would wait for
each other, so the model is a tiny one, and its steps are held to those of a larger one (`engine.hold_steps`),
in slow motion: all times, paces and pauses between requests are so many times as long.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import httpx
import numpy as np
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.capacity import Cache, Point, capacity
from benchmarks.cluster_facts import TIMEOUT_S, Facts
from benchmarks.hardware import SCALE_KV_TOKENS, Hardware, fitting_tpot_scale, hardware
from benchmarks.provenance import provenance
from benchmarks.real.client import Seen
from benchmarks.real.running import Running, served_model
from benchmarks.real.site import CPU
from benchmarks.real.systems import FLOORS
from benchmarks.real.window import ADMITTED, job_of, score_of, was_completed
from benchmarks.scenarios import SCENARIOS
from benchmarks.simulator.run import promises, run
from benchmarks.simulator.systems import OURS_NAME, Deployment, Tuning, roles_for
from benchmarks.startup import step
from benchmarks.studies.crew import Row, write
from benchmarks.studies.rebalance import (
    BIN_S,
    DIP_BIN_S,
    DIP_S,
    LITTLE,
    MUCH,
    RATIOS,
    REPLICAS,
    WARM_UP,
    Ratio,
    Shift,
    around,
    shift_table,
    words_of,
)
from benchmarks.studies.search import SHARE, TUNING_SEED
from benchmarks.studies.timeline import REQUEST, SEEDS_APART, Requests, Window, loads
from benchmarks.workload import Workload
from coordinator.cluster_process import ClusterProcess
from coordinator.config import ClusterConfig, load_config
from coordinator.config_layers import find_profile
from engine.errors import ConfigError, SlosserveError
from engine.profile import StepProfile
from engine.request import Slo

MODEL, PACE_OF = "tiny", "scale"
MAX_SEQS, MAX_BATCH_TOKENS = 128, 2048
KV_BYTES_PER_TOKEN = 4096  # of the tiny model
HALF_S, QUICK_HALF_S = 180.0, 30.0
SEARCH_S = 60.0
PRECISION = 0.08
GUESS_PER_S = 30.0
SETTLE_S = 60.0  # at most, until roles are as asked for and nothing is left of the run before
POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class Plan:
    """What is served: `shift` in the time of the clock, `times` as slow as the engines that it rehearses."""

    shift: Shift
    times: float
    machine: Hardware  # at its own speed

    @property
    def slow(self) -> Hardware:
        """The machine in slow motion."""
        paces = self.machine.tpot_scale * self.times
        return replace(self.machine, cost=self.machine.cost.scaled(self.times), tpot_scale=paces)

    def workload(self, windows: Sequence[Window], seed: int) -> Workload:
        """Its requests, with lengths as on real engines of this machine."""
        return loads(windows, seed, self.slow.tpot_scale, CPU.divide).clipped(self.machine.kv_tokens // 2)


def bench_shift(
    before: Annotated[str, typer.Option(help="Most requests at first.")] = "chatbot",
    after: Annotated[str, typer.Option(help="Most requests later.")] = "summarizer",
    half_s: Annotated[float, typer.Option(min=10, help="Until the shift, and from it to the end.")] = HALF_S,
    times: Annotated[float, typer.Option(min=1, help="How slow the motion is.")] = 3.0,
    seed: Annotated[int, typer.Option(min=1, help="Of the requests.")] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="Short halves: a look.")] = False,
    cache: Annotated[Path, typer.Option(help="Where searches are kept.")] = Path("out/bench/cache"),
    out: Annotated[
        Path | None, typer.Option(help="Where the figures go.", show_default="out/bench/shift.json")
    ] = None,
) -> None:
    """Shift the mix of requests on four real engines, with pools that stay and pools that follow the load.

    The engines run the tiny model, each step held to the time that the scale model takes on a core of its own.

    Example: slosserve bench shift --before chatbot --after summarizer
    """
    console = Console(width=110, highlight=False)
    out = out or Path("out/bench") / f"shift{'-quick' if quick else ''}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    columns = (TextColumn("[progress.description]{task.description}"), BarColumn(), TimeElapsedColumn())
    try:
        for name in (before, after):
            if name not in SCENARIOS:
                raise ConfigError(f"no scenario {name!r}; there are {', '.join(SCENARIOS)}")
        if before == after:
            raise ConfigError(f"the mix does not shift from {before} to {after}")
        with Progress(*columns, console=console, refresh_per_second=1) as progress:
            bar = progress.add_task("starting", total=None)

            def say(text: str) -> None:
                progress.update(bar, description=text)

            machine = hardware(PACE_OF)
            machine = replace(machine, tpot_scale=fitting_tpot_scale(machine.cost))
            plan = Plan(Shift(before, after, QUICK_HALF_S if quick else half_s), times, machine)
            held = {name: _pools(name, machine, Cache(cache), say) for name in (before, after)}
            best = {name: max(RATIOS, key=lambda ratio: rates[ratio]) for name, rates in held.items()}
            rates_per_s = {name: max(rates.values()) / times for name, rates in held.items()}
            windows = plan.shift.windows(rates_per_s)
            rows = _serve(plan, windows, best[before], seed, out.parent, say)
    except SlosserveError as error:
        Console(stderr=True).print(f"[red]error:[/red] {escape(str(error))}", highlight=False)
        raise typer.Exit(2) from error
    write(
        out,
        {
            "rows": rows,
            "pools": {
                name: {
                    "best": words_of(best[name]),
                    "per_s": {words_of(ratio): rate / times for ratio, rate in rates.items()},
                }
                for name, rates in held.items()
            },
            "method": _method(plan, windows),
            "provenance": provenance(seed),
        },
    )
    console.print(shift_table(rows, plan.shift))
    console.print(f"figures in {out}", soft_wrap=True)


def _pools(name: str, machine: Hardware, cache: Cache, say: Callable[[str], None]) -> dict[Ratio, float]:
    """Requests a second that pools of each ratio hold of a scenario alone, by the simulator."""
    found = {}
    for ratio in RATIOS:
        say(f"{words_of(ratio)}: {name}, where the simulator sees its knee")
        key = [
            "shift",
            name,
            machine.name,
            machine.tpot_scale,
            repr(machine.cost),
            list(ratio),
            SEARCH_S,
            PRECISION,
        ]
        found[ratio] = cache.kept(key, partial(_knee, name, machine, ratio))["per_s"]
    if not any(found.values()):
        raise ConfigError(f"no pools hold {SHARE:.0%} of {name} at any rate")
    return found


def _knee(name: str, machine: Hardware, ratio: Ratio) -> Row:
    roles = roles_for("disaggregated", 0, *ratio)
    tuning = Tuning(MAX_BATCH_TOKENS, max_seqs=MAX_SEQS, prefill=ratio[0], decode=ratio[1])
    deployment = Deployment(OURS_NAME, machine, roles, tuning, block_tokens=CPU.block_tokens)

    def at(rate_per_s: float) -> Point:
        window = Window(SEARCH_S, ((name, rate_per_s),))
        load = loads((window,), TUNING_SEED, machine.tpot_scale, CPU.divide).clipped(machine.kv_tokens // 2)
        served = run(load, deployment, seed=TUNING_SEED, stop_below=SHARE)
        return Point(rate_per_s, load.rate_per_s, served.attainment, served.drained, {})

    return {"per_s": capacity(at, SHARE, GUESS_PER_S, PRECISION)[0]}


def _serve(
    plan: Plan, windows: Sequence[Window], first: Ratio, seed: int, folder: Path, say: Callable[[str], None]
) -> list[Row]:
    """A row of each arrangement: pools that stay, and pools that are the best for the first mix and follow."""
    workload = plan.workload(windows, seed)
    slos = promises(workload, plan.slow)
    rows = []
    with ClusterProcess.start(
        cluster_config(plan, first, folder), None, lambda event: say(step(event))
    ) as cluster:
        url = cluster.base_url
        started = Running((url,), False, served_model(url), tuple(sorted(os.sched_getaffinity(0))))
        warm_up = plan.workload((Window(10.0, windows[0].rates_per_s),), TUNING_SEED)
        say("the first requests, not counted")
        started.ask(
            job_of(started, MODEL, warm_up, promises(warm_up, plan.slow), TUNING_SEED), folder, lambda _: None
        )
        for number, (ratio, follows) in enumerate([*((ratio, False) for ratio in RATIOS), (first, True)]):
            name = f"{words_of(ratio)}, {'follows the load' if follows else 'stays'}"
            _arrange(url, ratio, follows)
            began_s = time.time()

            def tell(at_s: float, name: str = name) -> None:
                say(f"{name}: {at_s:.0f} of {workload.duration_s:.0f} s")

            # Prompts of their own: the cache of the run before knows none of them.
            prompts = seed * SEEDS_APART + number
            seen = started.ask(job_of(started, MODEL, workload, slos, prompts), folder, tell)
            after = _cluster(url)
            rows.append(
                {
                    "arrangement": name,
                    "roles": _sizes(ratio),
                    **around(requests_of(workload, slos, seen), plan.shift.half_s, 2 * plan.shift.half_s),
                    "changes": [
                        {
                            "at_s": round(one["at_s"] - began_s, 1),
                            "before": one["before"],
                            "after": one["after"],
                        }
                        for one in after["rebalancing"]["changes"]
                        if one["at_s"] >= began_s
                    ],
                    "pools_at_the_end": after["pools"],
                    "errors": sum(one.error is not None for one in seen),
                    "client_late_p99_ms": float(np.quantile([one.late_s for one in seen], 0.99)) * 1e3,
                }
            )
    return rows


def requests_of(workload: Workload, slos: Sequence[Slo], seen: Sequence[Seen]) -> Requests:
    """What a client saw, as simulated runs tell it: NaN where nothing came."""
    requests = np.empty(len(seen), dtype=REQUEST)
    for index, one in enumerate(seen):
        times = one.token_times_s
        done = was_completed(workload, one, index)
        requests[index] = (
            workload.arrival_s[index],
            times[0] if times else np.nan,
            (times[-1] - times[0]) / (len(times) - 1) if done and len(times) > 1 else np.nan,
            times[-1] if done else np.nan,
            score_of(workload, slos[index], one, index).met,
            one.verdict == ADMITTED,
        )
    return requests


def cluster_config(plan: Plan, ratio: Ratio, folder: Path) -> ClusterConfig:
    """Four engines of the tiny model, with the KV memory of those that they stand for."""
    shipped = find_profile(PACE_OF, "")
    assert shipped is not None
    profile = StepProfile.load(shipped)
    slow = folder / f"held-{PACE_OF}.json"
    about = profile.about | {"times": f"{plan.times:g}"}
    replace(profile, cost=profile.cost.scaled(plan.times), about=about).save(slow)
    overrides: dict[str, Any] = {
        "name": "bench-shift",
        "model": MODEL,
        "endpoint.port": 0,
        "pools.prefill": ratio[0],
        "pools.decode": ratio[1],
        "engine.hold_steps": True,
        "engine.step_profile": str(slow),
        "engine.kv_cache_gib": SCALE_KV_TOKENS * KV_BYTES_PER_TOKEN / 2**30,
        "engine.max_num_seqs": MAX_SEQS,
        "engine.max_batch_tokens": MAX_BATCH_TOKENS,
        "engine.num_cpus": 0.1,
        **{f"slo_classes.{name}.ttft_floor_ms": 0.0 for name in FLOORS},
    }
    return load_config("laptop", overrides)


def _arrange(url: str, ratio: Ratio, follows: bool) -> None:
    """Resize the pools, and wait until nothing is left of what was served before."""
    _post(url, {"prefill": ratio[0], "decode": ratio[1]})
    ends_s = time.monotonic() + SETTLE_S
    while True:
        state = _cluster(url)
        left = sum(int(node["requests"]) for node in state["nodes"])
        sizes = {role: count for role, count in state["pools"].items() if count}
        if left == 0 and sizes == _sizes(ratio):
            break
        if time.monotonic() > ends_s:
            raise ConfigError(f"after {SETTLE_S:g} s {left} requests are left, and pools are {sizes}")
        time.sleep(POLL_S)
    if follows:
        _post(url, {"auto": True})


def _sizes(ratio: Ratio) -> dict[str, int]:
    return {"prefill": ratio[0], "decode": ratio[1]}


def _post(url: str, body: Mapping[str, Any]) -> None:
    httpx.post(f"{url}/cluster/pools", json=dict(body), timeout=TIMEOUT_S).raise_for_status()


def _cluster(url: str) -> Facts:
    response = httpx.get(f"{url}/cluster", timeout=TIMEOUT_S)
    response.raise_for_status()
    facts: Facts = response.json()
    return facts


def _method(plan: Plan, windows: Sequence[Window]) -> Row:
    return {
        "replicas": REPLICAS,
        "model": MODEL,
        "held_to": PACE_OF,
        "times": plan.times,
        "lengths_divided_by": CPU.divide,
        "kv_tokens": SCALE_KV_TOKENS,
        "tpot_scale": plan.slow.tpot_scale,
        "shift": {"before": plan.shift.before, "after": plan.shift.after, "half_s": plan.shift.half_s},
        "windows": [{"seconds": one.seconds, "rates_per_s": one.rates_per_s} for one in windows],
        "load": f"{MUCH:.0%} of what the best pools hold of one scenario alone, and {LITTLE:.0%} of the other",
        "before": f"from {WARM_UP:.0%} of the first half on",
        "dip": f"the worst {DIP_BIN_S:g} s of arrivals in the {DIP_S:g} s after the shift",
        "settled": f"from {DIP_S:g} s after the shift on",
        "bin_s": BIN_S,
    }
