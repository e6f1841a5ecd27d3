"""What DistServe's authors publish of their simulator, made again with ours: which placement, at what rate.

Their README (LLMServe/DistServe, simdistserve, Apache-2.0): OPT-13B, ShareGPT lengths, Poisson, 300 requests,
4 A100-80G at most, P90 of TTFT below 200 ms and P90 of TPOT below 100 ms; best is prefill TP2 + decode TP1 at
1.56 req/s per GPU. That figure is a step of a bisection from 0 to 5 that stops within 0.25, of one draw. So
three columns: the same search on the same draw, the crossing of that draw, and the crossing of draws of ours.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.as_module import start
from benchmarks.parts import columns, promise
from benchmarks.provenance import provenance
from benchmarks.simulator.links import SharedLinks
from benchmarks.simulator.pools import Disaggregated
from benchmarks.simulator.steps import DECODE_ALL, WHOLE_PROMPTS, Settings
from benchmarks.simulator.systems import NO_CAP
from benchmarks.simulator.world import ReplicaSpec, World
from benchmarks.traces import data_directory, read_lengths
from benchmarks.workload import Floats, Ints, Workload
from engine.coefficients import Coefficients
from engine.cost import StepCost
from engine.errors import ConfigError
from engine.request import RoleName, Slo

PUBLISHED_PER_GPU, PUBLISHED_PLACEMENT = 1.56, "TP2 + TP1"
TTFT_S, TPOT_S, SHARE = 0.2, 0.1, 0.9
REQUESTS, MOST_GPUS, TPS = 300, 4, (1, 2)
MOST_PER_GPU, COARSE, FINE = 5.0, 0.25, 0.02  # requests a second; theirs, theirs, ours
THEIR_SEED = 0
CLASS = "chatbot"
RUN_S = 1e6


@dataclass(frozen=True, slots=True)
class Placement:
    """So many prefill and decode instances, each over `tp` GPUs."""

    prefill_tp: int
    decode_tp: int
    prefills: int = 1
    decodes: int = 1

    @property
    def gpus(self) -> int:
        """GPUs of all instances."""
        return self.prefill_tp * self.prefills + self.decode_tp * self.decodes

    @property
    def name(self) -> str:
        """How people read it: prefill + decode."""
        prefills = f"{self.prefills} x " if self.prefills > 1 else ""
        decodes = f"{self.decodes} x " if self.decodes > 1 else ""
        return f"{prefills}TP{self.prefill_tp} + {decodes}TP{self.decode_tp}"


@dataclass(frozen=True, slots=True)
class Draw:
    """Requests of one run: lengths [requests, 2], and arrivals in mean gaps."""

    lengths: Ints
    at_gaps: Floats

    def workload(self, rate_per_s: float) -> Workload:
        """The same requests, at this rate."""
        arrival_s = self.at_gaps / rate_per_s
        prompt, output = self.lengths[:, 0], self.lengths[:, 1]
        return columns(
            "sharegpt", float(arrival_s[-1]), {CLASS: promise(CLASS)}, arrival_s, prompt, output, output.max()
        )


@dataclass(frozen=True, slots=True)
class Machine:
    """Step costs and KV of one instance, by TP."""

    costs: dict[tuple[int, RoleName], StepCost]
    kv_tokens: dict[int, int]

    @classmethod
    def read(cls, path: Path) -> Machine:
        """From the published coefficients. Raises ConfigError."""
        read = {tp: Coefficients.read(path, "distserve", tp) for tp in TPS}
        roles = (RoleName.PREFILL, RoleName.DECODE)
        costs = {(tp, role): read[tp].profile(role).cost for tp in TPS for role in roles}
        return cls(costs, {tp: read[tp].kv_tokens for tp in TPS})

    def replica(self, tp: int, role: RoleName) -> ReplicaSpec:
        """One instance. Theirs have no cap on a batch but the memory."""
        composer = WHOLE_PROMPTS if role is RoleName.PREFILL else DECODE_ALL
        settings = Settings(composer, NO_CAP, 0, False, 0, 0.0, 0)
        return ReplicaSpec(
            self.costs[tp, role], self.kv_tokens[tp], settings, max_seqs=NO_CAP, max_batch_tokens=NO_CAP
        )


def placements(one_of_each: bool) -> list[Placement]:
    """Those within MOST_GPUS, with one instance of each kind (as theirs) or with more."""
    most = 1 if one_of_each else MOST_GPUS
    every = (
        Placement(prefill_tp, decode_tp, prefills, decodes)
        for prefill_tp in TPS
        for decode_tp in TPS
        for prefills in range(1, most + 1)
        for decodes in range(1, most + 1)
    )
    return [one for one in every if one.gpus <= MOST_GPUS]


def their_draw(lengths: Ints, seed: int = THEIR_SEED) -> Draw:
    """The requests that their simulator draws: Python's and NumPy's old generators, the first one at 0."""
    chosen = random.Random(seed).sample(range(len(lengths)), REQUESTS)
    gaps = np.random.RandomState(seed).gamma(1.0, 1.0, REQUESTS - 1)
    return Draw(np.maximum(lengths[chosen], 1), np.concatenate([[0.0], np.cumsum(gaps)]))


def our_draw(lengths: Ints, seed: int) -> Draw:
    """Requests of another seed."""
    rng = np.random.default_rng([seed, REQUESTS])
    chosen = rng.choice(len(lengths), REQUESTS, replace=False)
    return Draw(np.maximum(lengths[chosen], 1), np.cumsum(rng.exponential(1.0, REQUESTS)))


def latencies_s(machine: Machine, placement: Placement, load: Workload) -> tuple[Floats, Floats]:
    """TTFT of each request and TPOT of each with more than one token, on DistServe with free transfers."""
    prefills, decodes = range(placement.prefills), range(placement.decodes)
    specs = [machine.replica(placement.prefill_tp, RoleName.PREFILL) for _ in prefills]
    specs += [machine.replica(placement.decode_tp, RoleName.DECODE) for _ in decodes]
    system = Disaggregated(prefills, range(placement.prefills, len(specs)))
    links = SharedLinks(len(specs), latency_s=0.0, bytes_per_s=1.0)
    slos = [Slo(CLASS, TTFT_S, TPOT_S)] * len(load)
    world = World(load, slos, specs, links, 0, system)
    if not world.run(RUN_S):
        raise RuntimeError(f"{placement.name}: not over after {RUN_S:g} simulated seconds")
    first_s = world.token_times_s[world.first_time[:-1]]
    last_s = world.token_times_s[world.first_time[1:] - 1]
    more = load.output_tokens > 1
    return first_s - world.arrived_s, (last_s - first_s)[more] / (load.output_tokens[more] - 1)


def keeps(machine: Machine, placement: Placement, draw: Draw, per_gpu: float) -> bool:
    """Whether the P90 of TTFT and that of TPOT are both within their SLO, at this rate per GPU."""
    ttft_s, tpot_s = latencies_s(machine, placement, draw.workload(per_gpu * placement.gpus))
    return bool(np.quantile(ttft_s, SHARE) < TTFT_S and np.quantile(tpot_s, SHARE) < TPOT_S)


def highest(kept: Callable[[float], bool], within: float) -> float:
    """The highest rate per GPU that bisection from 0 to MOST_PER_GPU finds kept, when it stops `within`."""
    low, high = 0.0, MOST_PER_GPU
    while high - low > within:
        middle = (low + high) / 2
        low, high = (middle, high) if kept(middle) else (low, middle)
    return low


def facts(
    machine: Machine, lengths: Ints, asked: Iterable[Placement], seeds: Sequence[int]
) -> list[dict[str, Any]]:
    """A row per placement, the best first: what their search finds on their draw, and how other draws end."""
    theirs = their_draw(lengths)
    ours = [our_draw(lengths, seed) for seed in seeds]
    rows = []
    for placement in asked:

        def crossing(draw: Draw, within: float, placement: Placement = placement) -> float:
            return highest(lambda rate: keeps(machine, placement, draw, rate), within)

        others = [crossing(draw, FINE) for draw in ours]
        rows.append(
            {
                "placement": placement.name,
                "gpus": placement.gpus,
                "one_of_each": placement.prefills == placement.decodes == 1,
                "their_search": crossing(theirs, COARSE),
                "their_draw": crossing(theirs, FINE),
                "our_draws": others,
                "mean": float(np.mean(others)),
                "least": min(others),
                "most": max(others),
            }
        )
    return sorted(rows, key=lambda row: (row["their_search"], row["their_draw"]), reverse=True)


def distserve_facts(
    data: Annotated[Path | None, typer.Option(help="Folder of the data; else SLOSSERVE_DATA.")] = None,
    out: Annotated[Path, typer.Option(help="Where the figures go, as JSON.")] = Path(
        "out/bench/distserve_facts.json"
    ),
    seeds: Annotated[int, typer.Option(help="Draws of our own beside theirs.", min=1)] = 20,
    quick: Annotated[bool, typer.Option(help="One instance of each kind, 3 draws: a few seconds.")] = False,
) -> None:
    """DistServe's published placement and rate, made again.

    Example: python -m benchmarks.distserve_facts --quick
    """
    folder = data or data_directory()
    if folder is None:
        raise ConfigError("no data: give --data, or set SLOSSERVE_DATA")
    lengths = read_lengths(folder / "traces" / "lens_sharegpt_distserve_opt_tok.csv.gz")
    machine = Machine.read(folder / "coefficients" / "distserve_opt13b_a100.json")
    chosen = range(1, 1 + (3 if quick else seeds))
    console = Console(width=112, highlight=False)
    asked = track(placements(one_of_each=quick), "placements", console=Console(stderr=True), transient=True)
    rows = facts(machine, lengths, asked, chosen)
    best = next(row for row in rows if row["one_of_each"])
    error = best["their_search"] / PUBLISHED_PER_GPU - 1
    console.print(_table(rows))
    console.print(
        f"published: {PUBLISHED_PLACEMENT} at {PUBLISHED_PER_GPU} req/s per GPU; here: {best['placement']} at "
        f"{best['their_search']:.4g} ({error:+.1%})"
    )
    result = {
        **provenance(THEIR_SEED),
        "published": {"placement": PUBLISHED_PLACEMENT, "per_gpu": PUBLISHED_PER_GPU},
        "error": error,
        "our_seeds": list(chosen),
        "placements": rows,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    console.print(f"figures: {out}", soft_wrap=True)


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    shown = Table(
        title=f"req/s per GPU, {REQUESTS} requests, P90 of TTFT < {TTFT_S} s and of TPOT < {TPOT_S} s"
    )
    headings = (
        "prefill + decode",
        "GPUs",
        "their search, their draw",
        "crossing, their draw",
        "crossing, our draws",
    )
    for heading in headings:
        shown.add_column(heading, justify="left" if heading == headings[0] else "right")
    for row in rows:
        spread = f"{row['mean']:.2f} ({row['least']:.2f} to {row['most']:.2f})"
        cells = (f"{row['their_search']:.4g}", f"{row['their_draw']:.2f}", spread)
        shown.add_row(row["placement"], str(row["gpus"]), *cells)
    return shown


if __name__ == "__main__":
    start(distserve_facts)
