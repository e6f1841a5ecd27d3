"""What our endpoint costs: it and vLLM's own server over the same engine, asked side by side in one run.

For each model both are up at once. Short windows of closed-loop load alternate between them, each pair of
windows with the same requests and the order swapped from pair to pair, so that a drift of the machine falls
on both.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import httpx
import numpy as np
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from benchmarks.own_server import own_server
from benchmarks.provenance import provenance
from benchmarks.startup import step
from benchmarks.window import (
    LONGEST_OUTPUT_TOKENS,
    PROMPT_WORDS,
    SHORTEST_OUTPUT_TOKENS,
    TIMEOUT_S,
    Load,
    Window,
    measure,
)
from coordinator.config import ClusterConfig, load_config
from engine.errors import ConfigError, SlosserveError

TTFT_ADDED_TARGET_MS = 2.0
TOKENS_RATIO_TARGET = 0.97
PAIRS = 16
QUICK_PAIRS = 4
OURS, DIRECT = "ours", "direct"


@dataclass(frozen=True, slots=True)
class Cell:
    """One combination that is measured. `requests` of each stream make a window of some seconds."""

    model: str
    streams: int
    requests: int


CELLS = (Cell("tiny", 1, 16), Cell("tiny", 32, 3), Cell("scale", 1, 3), Cell("scale", 32, 2))
MODELS = tuple(dict.fromkeys(cell.model for cell in CELLS))


def bench_endpoint(
    quick: Annotated[
        bool, typer.Option("--quick", help=f"{QUICK_PAIRS} pairs of windows, not {PAIRS}.")
    ] = False,
    model: Annotated[list[str] | None, typer.Option(help="Only this model (repeatable).")] = None,
    seed: Annotated[int, typer.Option(help="Seed of prompts and lengths.")] = 1,
    config: Annotated[str, typer.Option(help="Configuration with one mixed node.")] = "colocated",
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = Path("out/bench/endpoint.json"),
) -> None:
    """Compare our endpoint with the same engine asked through vLLM's own server.

    Example: python -m benchmarks.endpoint --quick
    """
    console = Console()
    pairs = QUICK_PAIRS if quick else PAIRS
    try:
        cells = _cells(model)
        with _progress(console) as progress:
            task = progress.add_task("starting", total=len(cells) * (pairs + 1))
            measured = [
                result
                for name in dict.fromkeys(cell.model for cell in cells)
                for result in _measure_model(name, cells, pairs, seed, config, out.parent, progress, task)
            ]
    except SlosserveError as error:
        Console(stderr=True).print(f"[red]error:[/red] {escape(str(error))}", highlight=False)
        raise typer.Exit(2) from error
    results = {
        **headline(measured),
        "cells": measured,
        "method": _method(pairs),
        "provenance": provenance(seed),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    console.print(_table(results))
    console.print(f"figures in {out}")


def headline(cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The worst cell for each figure, and whether it meets its target."""
    p50_ms = max(cell["ttft_added_p50_ms"] for cell in cells)
    p99_ms = max(cell["ttft_added_p99_ms"] for cell in cells)
    ratio = min(cell["tokens_per_s_ratio"] for cell in cells)
    return {
        "ttft_added_p50_ms": p50_ms,
        "ttft_added_p99_ms": p99_ms,
        "tokens_per_s_ratio": ratio,
        "worst_over": "each figure is the worst over the cells below",
        "targets": {
            "ttft_added_p50_ms": {"at_most": TTFT_ADDED_TARGET_MS, "met": p50_ms <= TTFT_ADDED_TARGET_MS},
            "ttft_added_p99_ms": {"at_most": TTFT_ADDED_TARGET_MS, "met": p99_ms <= TTFT_ADDED_TARGET_MS},
            "tokens_per_s_ratio": {"at_least": TOKENS_RATIO_TARGET, "met": ratio >= TOKENS_RATIO_TARGET},
        },
    }


def compare(cell: Cell, windows: Sequence[tuple[Window, Window]]) -> dict[str, Any]:
    """Figures of a cell from its (ours, direct) pairs of windows.

    TTFT added is the difference of the percentiles of all requests pooled; its spread is the same difference
    pair by pair. The ratio of tokens/s is the median over pairs.
    """
    ours, direct = [pair[0] for pair in windows], [pair[1] for pair in windows]
    ratios = [mine.tokens_per_s / theirs.tokens_per_s for mine, theirs in windows]
    result: dict[str, Any] = {"model": cell.model, "streams": cell.streams, "pairs": len(windows)}
    for percentile in (50, 99):
        result[f"ttft_added_p{percentile}_ms"] = _ttft_ms(ours, percentile) - _ttft_ms(direct, percentile)
    result["tokens_per_s_ratio"] = float(np.median(ratios))
    added_ms = [_ttft_ms([mine], 50) - _ttft_ms([theirs], 50) for mine, theirs in windows]
    result["spread"] = {
        "ttft_added_p50_ms_by_pair": _spread(added_ms),
        "tokens_per_s_ratio_by_pair": _spread(ratios),
    }
    result[OURS], result[DIRECT] = _side(ours), _side(direct)
    return result


def _cells(models: list[str] | None) -> list[Cell]:
    unknown = sorted(set(models or ()) - set(MODELS))
    if unknown:
        raise ConfigError(f"--model {unknown[0]}: choose from {', '.join(MODELS)}")
    return [cell for cell in CELLS if not models or cell.model in models]


def _measure_model(
    model: str,
    cells: Sequence[Cell],
    pairs: int,
    seed: int,
    config: str,
    logs: Path,
    progress: Progress,
    task: Any,
) -> Iterator[dict[str, Any]]:
    progress.update(task, description=f"{model}: starting vLLM's own server")
    with _both(model, config, logs, lambda text: progress.update(task, description=text)) as urls:
        for cell in cells:
            if cell.model == model:
                progress.update(task, description=f"{model}, {cell.streams} streams")
                windows = asyncio.run(_alternate(cell, pairs, seed, urls, lambda: progress.advance(task)))
                yield compare(cell, windows)


@contextmanager
def _both(model: str, config: str, logs: Path, tell: Callable[[str], None]) -> Iterator[dict[str, str]]:
    """Base URLs of our endpoint over one mixed node, and of vLLM's own server with the same engine."""
    from coordinator.cluster_process import ClusterProcess

    overrides = {"name": "bench-endpoint", "model": model, "dtype": "auto", "endpoint.port": 0}
    resolved = load_config(config, overrides)
    with (
        own_server(_without_key(resolved), logs / f"endpoint-{model}-vllm.log") as direct_url,
        ClusterProcess.start(config, overrides, lambda event: tell(f"{model}: {step(event)}")) as cluster,
    ):
        yield {OURS: cluster.base_url, DIRECT: direct_url}


def _without_key(config: ClusterConfig) -> ClusterConfig:
    return config.model_copy(update={"endpoint": config.endpoint.model_copy(update={"api_key": None})})


async def _alternate(
    cell: Cell, pairs: int, seed: int, urls: Mapping[str, str], advance: Any
) -> list[tuple[Window, Window]]:
    """(ours, direct) windows. The first pair warms up and is dropped."""
    rng = np.random.default_rng([seed, cell.streams, len(cell.model)])
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with (
        httpx.AsyncClient(base_url=urls[OURS], timeout=TIMEOUT_S, limits=limits) as ours,
        httpx.AsyncClient(base_url=urls[DIRECT], timeout=TIMEOUT_S, limits=limits) as direct,
    ):
        names = {OURS: await _served_name(ours), DIRECT: await _served_name(direct)}
        if len(set(names.values())) > 1:
            raise ConfigError(f"the two servers serve different models: {names}")
        clients = {OURS: ours, DIRECT: direct}
        windows: list[tuple[Window, Window]] = []
        for number in range(pairs + 1):
            load = Load.draw(names[OURS], cell.streams, cell.requests, rng)
            order = (OURS, DIRECT) if number % 2 == 0 else (DIRECT, OURS)
            by_side = {side: await measure(clients[side], load) for side in order}
            windows.append((by_side[OURS], by_side[DIRECT]))
            advance()
    return windows[1:]


async def _served_name(client: httpx.AsyncClient) -> str:
    response = await client.get("/v1/models")
    response.raise_for_status()
    return str(response.json()["data"][0]["id"])


def _ttft_ms(windows: Sequence[Window], percentile: float) -> float:
    return float(np.percentile([t for window in windows for t in window.ttft_s], percentile)) * 1e3


def _side(windows: Sequence[Window]) -> dict[str, Any]:
    return {
        "ttft_p50_ms": _ttft_ms(windows, 50),
        "ttft_p99_ms": _ttft_ms(windows, 99),
        "tokens_per_s": float(np.median([window.tokens_per_s for window in windows])),
        "requests": sum(len(window.ttft_s) for window in windows),
        "seconds": sum(window.seconds for window in windows),
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    low, middle, high = np.percentile(values, (25, 50, 75))
    return {"min": min(values), "p25": low, "p50": middle, "p75": high, "max": max(values)}


def _method(pairs: int) -> dict[str, Any]:
    return {
        "pairs_of_windows": pairs,
        "warm_up_pairs_dropped": 1,
        "prompt_words": PROMPT_WORDS,
        "output_tokens": [SHORTEST_OUTPUT_TOKENS, LONGEST_OUTPUT_TOKENS],
        "requests_per_stream_and_window": {f"{c.model}/{c.streams}": c.requests for c in CELLS},
    }


def _progress(console: Console) -> Progress:
    text = TextColumn("[progress.description]{task.description}")
    return Progress(text, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console)


def _table(results: Mapping[str, Any]) -> Table:
    table = Table(title="our endpoint against vLLM's own server, same engine", title_justify="left")
    for column in (
        "model",
        "streams",
        "TTFT p50 direct",
        "added p50",
        "added p99",
        "tokens/s direct",
        "ratio",
    ):
        table.add_column(column, justify="right")
    for cell in results["cells"]:
        table.add_row(
            cell["model"],
            str(cell["streams"]),
            f"{cell[DIRECT]['ttft_p50_ms']:.1f} ms",
            f"{cell['ttft_added_p50_ms']:+.2f} ms",
            f"{cell['ttft_added_p99_ms']:+.2f} ms",
            f"{cell[DIRECT]['tokens_per_s']:.0f}",
            f"{cell['tokens_per_s_ratio']:.3f}",
        )
    return table


if __name__ == "__main__":
    typer.run(bench_endpoint)
