"""What it costs not to know output lengths: memory admission by learned quantiles, on recorded lengths.

The first half of each trace tunes z, the second is reported. The same requests are offered to each way of
admission on a replica where KV memory alone binds (see kv_replay); lengths are learned from the start of the
half, and its first tenth is left out of the figures.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from benchmarks.kv_replay import (
    CAPACITY_TOKENS,
    TICK_S,
    Admission,
    ByOutlook,
    ByPrompt,
    ByReserve,
    Request,
    Tally,
    prefill_ticks,
    replay,
)
from benchmarks.provenance import provenance
from benchmarks.traces import data_directory, read_lengths, read_trace
from coordinator.planner.memory import OVERFLOW_AIM, OVERFLOW_Z
from engine.errors import ConfigError, SlosserveError

BASE_S, PER_TOKEN_S = 24.8e-3, 6.88e-5  # OPT-7B on an A100-40G, the paper's own fit
TIERS = ((1, 3.0), (2, 5.0))  # (ticks a token, TTFT as a multiple of T0): tight 50 ms, loose 100 ms
LOAD = 1.5  # offered, as a multiple of the rate that fills memory on average
WARM_UP = 0.1
MOST_REQUESTS = 2500  # of each half of a trace
TARGET_OVERFLOWED = 0.01
TUNED_Z = (1.0, 1.25, 1.5)
TUNED_AIM = (0.01, 0.007, 0.005)
COUNTS = ("offered", "admitted", "overflowed", "kept", "kept_tokens")
SHARES = ("overflowed_share", "value_lost", "value_lost_by_tokens")
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Trace:
    """A recorded trace. `max_tokens`: what clients are taken to ask for; the files do not say."""

    file: str
    max_tokens: int
    prompt_divisor: int = 1
    own_arrivals: bool = True


TRACES: Mapping[str, Trace] = {
    "azure conv": Trace("azure2023_conv", 1024),
    "azure code": Trace("azure2023_code_first30min", 2048),
    "servegen reasoning": Trace("servegen_reason_deepseekr1_4rps", 16384),
    "agent sessions / 32": Trace("agent_sessions_even", 8192, prompt_divisor=32, own_arrivals=False),
    "mooncake": Trace("mooncake_synthetic", 1024),
    "sharegpt": Trace("lens_sharegpt_distserve_opt_tok", 2048, own_arrivals=False),
    "arxiv": Trace("lens_arxiv_summarization_llama2tok", 4096, own_arrivals=False),
}
ORACLE, OURS = "oracle", "quantiles"
WAYS: Mapping[str, Callable[[], Admission]] = {
    ORACLE: lambda: ByOutlook(0.0, known=True),
    OURS: lambda: ByOutlook(OVERFLOW_Z, aim=OVERFLOW_AIM),
    "quantiles, fixed z": lambda: ByOutlook(OVERFLOW_Z),
    "max_tokens": lambda: ByReserve(lambda request: request.prompt_tokens + request.max_tokens),
    "prompt only": ByPrompt,
}
SETTINGS: Mapping[str, Callable[[], Admission]] = {
    **{f"z {z}": partial(ByOutlook, z) for z in TUNED_Z},
    **{f"aim {aim}": partial(ByOutlook, OVERFLOW_Z, aim=aim) for aim in TUNED_AIM},
}


def bench_lengths(
    data: Annotated[Path | None, typer.Option(help="Folder of the data; else SLOSSERVE_DATA.")] = None,
    trace: Annotated[list[str] | None, typer.Option(help="Only this trace (repeatable).")] = None,
    seed: Annotated[int, typer.Option(help="First of the seeds reported; tuning uses the one before.")] = 1,
    seeds: Annotated[int, typer.Option(help="How many seeds are reported.", min=1)] = 3,
    tune: Annotated[bool, typer.Option(help="Also try other settings on the first halves.")] = True,
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = Path("out/bench/lengths.json"),
) -> None:
    """Compare memory admission by learned output lengths with the true lengths and with max_tokens.

    Example: python -m benchmarks.lengths --trace sharegpt
    """
    console = Console()
    try:
        folder, names = _data(data), _names(trace)
        with _progress(console) as progress:
            steps = len(names) * (seeds * len(WAYS) + tune * (len(SETTINGS) + 1))
            task = progress.add_task("", total=steps)

            def run(name: str, half: int, seed: int, ways: Mapping[str, Callable[[], Admission]]) -> Row:
                progress.update(task, description=f"{name}, seed {seed}")
                requests = load(TRACES[name], folder, half, seed)
                tallies = {}
                for way, make in ways.items():
                    tallies[way] = replay(requests, make())
                    progress.advance(task)
                return {"trace": name, "seed": seed, "ways": _figures(tallies)}

            tuned = [run(name, 0, seed - 1, {ORACLE: WAYS[ORACLE], **SETTINGS}) for name in names if tune]
            rows = [run(name, 1, seed + index, WAYS) for name in names for index in range(seeds)]
    except SlosserveError as error:
        Console(stderr=True).print(f"[red]error:[/red] {escape(str(error))}", highlight=False)
        raise typer.Exit(2) from error
    results = {
        **headline(rows),
        "traces": {name: summary([row for row in rows if row["trace"] == name]) for name in names},
        "tuning": {name: summary([row for row in tuned if row["trace"] == name]) for name in names if tune},
        "method": _method(),
        "rows": rows,
        "provenance": provenance(seed),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    console.print(_table(results["traces"], WAYS))
    if tune:
        console.print(_table(results["tuning"], SETTINGS))
    console.print(f"figures in {out}")


def headline(rows: Sequence[Row]) -> dict[str, Any]:
    """Of our way: the worst trace's share that overflowed, and the value it lost; seeds pooled."""
    by_trace = [summary([row for row in rows if row["trace"] == name])[OURS] for name in _traces(rows)]
    overflowed = max(way["overflowed_share"] for way in by_trace)
    lost = [way["value_lost"] for way in by_trace]
    return {
        "overflowed_share_worst_trace": overflowed,
        "value_lost_mean": float(np.mean(lost)),
        "value_lost_worst_trace": max(lost),
        "targets": {
            "overflowed_share_worst_trace": {
                "at_most": TARGET_OVERFLOWED,
                "met": overflowed <= TARGET_OVERFLOWED,
            }
        },
    }


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Seeds of one trace pooled, by way; `per_seed` are the least and most of a seed."""
    found = {}
    for way in rows[0]["ways"]:
        seeds = [row["ways"][way] for row in rows]
        counts = {key: sum(seed[key] for seed in seeds) for key in COUNTS}
        best = {key: sum(row["ways"][ORACLE][key] for row in rows) for key in COUNTS}
        found[way] = {
            **counts,
            **_shares(counts, best),
            "held_share": float(np.mean([seed["held_share"] for seed in seeds])),
            "per_seed": {
                key: [min(seed[key] for seed in seeds), max(seed[key] for seed in seeds)] for key in SHARES
            },
        }
    return found


def _figures(tallies: Mapping[str, Tally]) -> dict[str, dict[str, Any]]:
    counts = {way: {key: getattr(tally, key) for key in COUNTS} for way, tally in tallies.items()}
    return {
        way: {
            **counts[way],
            **_shares(counts[way], counts[ORACLE]),
            "held_share": float(np.mean(tally.held_share)),
        }
        for way, tally in tallies.items()
    }


def _shares(counts: Mapping[str, int], best: Mapping[str, int]) -> dict[str, float]:
    """Overflowed of those admitted; value lost against the oracle, a request counted as 1 or by its tokens."""
    return {
        "overflowed_share": counts["overflowed"] / max(counts["admitted"], 1),
        "value_lost": 1 - counts["kept"] / max(best["kept"], 1),
        "value_lost_by_tokens": 1 - counts["kept_tokens"] / max(best["kept_tokens"], 1),
    }


def load(trace: Trace, data: Path, half: int, seed: int) -> list[Request]:
    """Half 0 or 1 of a trace as a replay, at LOAD times the rate that its mean residence can hold.

    Lengths without arrivals of their own are drawn from the half (with replacement) and arrive as Poisson.
    """
    path = data / "traces" / f"{trace.file}.csv.gz"
    rng = np.random.default_rng(seed)
    arrivals = read_trace(path) if trace.own_arrivals else []
    own = [(arrival.in_tokens, arrival.out_tokens) for arrival in arrivals]
    lengths = np.array(own) if arrivals else read_lengths(path)
    start = half * (len(lengths) // 2)
    rows = np.arange(start, start + len(lengths) // 2)
    if arrivals:
        rows = rows[:MOST_REQUESTS]
        at_s = np.array([arrivals[row].at_s for row in rows.tolist()])
    else:
        rows = rng.choice(rows, MOST_REQUESTS)
        at_s = np.cumsum(rng.exponential(1.0, len(rows)))
    prompts = np.clip(lengths[rows, 0] // trace.prompt_divisor, 1, CAPACITY_TOKENS - trace.max_tokens)
    outputs = np.clip(lengths[rows, 1], 1, trace.max_tokens)
    return _requests(at_s, prompts, outputs, trace.max_tokens, rng)


def _requests(
    at_s: np.ndarray, prompts: np.ndarray, outputs: np.ndarray, max_tokens: int, rng: np.random.Generator
) -> list[Request]:
    tiers = np.array(TIERS)[rng.integers(0, len(TIERS), len(at_s))]
    prefills = np.array([prefill_ticks(prompt, BASE_S, PER_TOKEN_S) for prompt in prompts.tolist()])
    residence = prefills + outputs * tiers[:, 0]
    ticks_per_request = (residence * (prompts + outputs / 2)).mean() / CAPACITY_TOKENS / LOAD
    at = (at_s - at_s[0]) / max(at_s[-1] - at_s[0], 1e-9) * (len(at_s) * ticks_per_request)
    slack = ((BASE_S + PER_TOKEN_S * prompts) * tiers[:, 1] / TICK_S).astype(int) - prefills
    columns = (at.astype(int), prompts, outputs, tiers[:, 0].astype(int), prefills, np.maximum(slack, 0))
    return [
        Request(
            at, prompt, output, max_tokens, pace, prefill, at + slack, measured=index >= WARM_UP * len(at_s)
        )
        for index, (at, prompt, output, pace, prefill, slack) in enumerate(
            zip(*(column.tolist() for column in columns), strict=True)
        )
    ]


def _traces(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["trace"] for row in rows))


def _data(named: Path | None) -> Path:
    found = named if named is not None else data_directory()
    if found is None or not (found / "traces").is_dir():
        raise ConfigError(
            f"no folder traces in {found}; give the folder of the data by --data or SLOSSERVE_DATA"
        )
    return found


def _names(named: Sequence[str] | None) -> list[str]:
    for name in named or ():
        if name not in TRACES:
            raise ConfigError(f"no trace {name!r}; there are {', '.join(TRACES)}")
    return list(named or TRACES)


def _method() -> dict[str, Any]:
    return {
        "capacity_tokens": CAPACITY_TOKENS,
        "offered_load_of_memory": LOAD,
        "warm_up_share_dropped": WARM_UP,
        "most_requests_of_a_half": MOST_REQUESTS,
        "tpot_s": [ticks * TICK_S for ticks, _ in TIERS],
        "z": OVERFLOW_Z,
        "aim": OVERFLOW_AIM,
        "halves": "tuning on the first half of each trace and a seed of its own, figures on the second half",
        "choice": "z starts at the mean; the highest aim at which no trace overflows more than 1 % in tuning",
        "overflowed": "admitted, then preempted because the KV held passed the capacity (last in, first out)",
        "value_lost": "1 - requests that were admitted and ended / the same with true lengths",
        "left_out": "prefill and decode speed do not bind; a preempted request is not resumed",
        "max_tokens": {name: trace.max_tokens for name, trace in TRACES.items()},
        "prompt_divisor": {name: trace.prompt_divisor for name, trace in TRACES.items()},
        "poisson": [name for name, trace in TRACES.items() if not trace.own_arrivals],
    }


def _progress(console: Console) -> Progress:
    text = TextColumn("[progress.description]{task.description}")
    return Progress(text, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console)


def _table(traces: Mapping[str, Any], ways: Iterable[str]) -> Table:
    table = Table("trace", *ways, title="overflowed of those admitted / value lost against true lengths")
    for name, found in traces.items():
        cells = [
            f"{way['overflowed_share']:.2%} / {way['value_lost']:.1%}" for way in map(found.__getitem__, ways)
        ]
        table.add_row(name, *cells)
    return table


if __name__ == "__main__":
    typer.run(bench_lengths)
