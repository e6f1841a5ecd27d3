"""`slosserve bench goodput`: vLLM's own benchmark client against our endpoint, and our scorecard beside it.

`vllm.benchmarks.serve --goodput` runs as it ships, on a live cluster. It calls a request good by its TTFT and
the mean of its time per output token, without tolerance, as it saw them; the scorecard reads the same
definition at the endpoint. Both should count the same.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.cluster_facts import TIMEOUT_S, Facts, fetch_facts
from benchmarks.open_loop import PATH
from benchmarks.provenance import provenance
from benchmarks.real.running import served_model
from benchmarks.startup import step
from benchmarks.studies.crew import write
from coordinator.config import ClusterConfig, load_config
from engine.errors import EngineError, SlosserveError
from engine.models import resolve_model

Row = dict[str, Any]
# vLLM's console script looks for a distribution named vllm, which a build for CPUs is not.
CLIENT = (
    "from vllm.benchmarks.serve import add_cli_args, main; "
    "from vllm.utils.argparse_utils import FlexibleArgumentParser as Parser; "
    "parser = Parser(); add_cli_args(parser); main(parser.parse_args())"
)
RATES = (1.5, 3.0, 4.5, 6.0)  # requests a second: on one core, from what holds to what does not
PROMPTS = 200
INPUT_TOKENS, OUTPUT_TOKENS, RANGE = 120, 40, 0.5
TTFT_MS, TPOT_MS = 400.0, 45.0
AGREE = 0.02
CLASS = "custom"  # of requests with numbers of their own
SETTLED_S = 10.0


def goodput(
    rate: Annotated[list[float] | None, typer.Option(help="Requests a second (repeatable).")] = None,
    prompts: Annotated[int, typer.Option(min=1, help="At each rate.")] = PROMPTS,
    ttft_ms: Annotated[float, typer.Option(help="Promised, and counted.")] = TTFT_MS,
    tpot_ms: Annotated[float, typer.Option(help="Promised, and counted.")] = TPOT_MS,
    model: Annotated[str, typer.Option(help="Of `slosserve model make`, or a folder.")] = "scale",
    config: Annotated[str, typer.Option(help="Of the cluster.")] = "colocated",
    seed: Annotated[int, typer.Option(help="Of vLLM's client.")] = 1,
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = Path("out/bench/goodput.json"),
) -> None:
    """Let vLLM's own client measure our endpoint, and compare its goodput with what the cluster says it kept.

    Example: slosserve bench goodput --rate 2 --prompts 60
    """
    console = Console(width=100, highlight=False)
    folder = out.parent
    folder.mkdir(parents=True, exist_ok=True)
    overrides = {"name": "bench-goodput", "model": model, "dtype": "auto", "endpoint.port": 0}
    slo = {"ttft_ms": ttft_ms, "tpot_ms": tpot_ms}

    def keep(rows: Sequence[Row]) -> None:
        """What is known so far: a run that is cut short leaves it."""
        worst = max(row["difference"] for row in rows)
        target = {"at_most": AGREE, "met": worst <= AGREE}
        told = {"worst_difference": worst, "target": target, "slo": slo, "rows": list(rows)}
        write(out, {**told, "provenance": provenance(seed)})

    try:
        with console.status("starting") as status:
            cluster = load_config(config, overrides)
            rows = _measure(cluster, slo, rate or RATES, prompts, seed, folder, status.update, keep)
    except SlosserveError as error:
        Console(stderr=True).print(f"[red]error:[/red] {escape(str(error))}", highlight=False)
        raise typer.Exit(2) from error
    console.print(_table(rows))
    console.print(f"figures in {out}", soft_wrap=True)


def compared(theirs: Row, before: Facts, after: Facts) -> Row:
    """What vLLM's client found of a run, beside what the cluster counted between `before` and `after`.

    `difference`: of the shares of requests that were good, by both. Raises EngineError unless both saw as many
    requests.
    """
    asked = len(theirs["ttfts"])
    requests, good = (_counted(after, what) - _counted(before, what) for what in ("requests", "goodput"))
    if requests != asked:
        raise EngineError(f"vLLM's client sent {asked} requests, and the scorecard has {requests} of them")
    good_there = round(theirs["request_goodput"] * theirs["duration"])
    return {
        "requests": asked,
        "completed": theirs["completed"],
        "good_by_client": good_there,
        "good_by_scorecard": good,
        "goodput_by_client_per_s": theirs["request_goodput"],
        "goodput_by_scorecard_per_s": good / theirs["duration"],
        "difference": abs(good - good_there) / asked,
        "ttft_p50_ms": theirs["median_ttft_ms"],
        "tpot_p50_ms": theirs["median_tpot_ms"],
    }


def arguments(
    base_url: str, model: str, tokenizer: Path, slo: Row, rate: float, prompts: int, seed: int, result: Path
) -> list[str]:
    """Of vLLM's client, for one run."""
    flags = {
        "backend": "openai",
        "base-url": base_url,
        "endpoint": PATH,
        "model": model,
        "tokenizer": str(tokenizer),
        "dataset-name": "random",
        "random-input-len": INPUT_TOKENS,
        "random-output-len": OUTPUT_TOKENS,
        "random-range-ratio": RANGE,
        "num-prompts": prompts,
        "request-rate": rate,
        "seed": seed,
        "extra-body": json.dumps({"slo": slo}),
        "result-dir": str(result.parent),
        "result-filename": result.name,
    }
    paired = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    goods = ["--goodput", f"ttft:{slo['ttft_ms']:g}", f"tpot:{slo['tpot_ms']:g}"]
    return [*paired, "--ignore-eos", "--save-result", "--save-detailed", *goods]


def _measure(
    config: ClusterConfig,
    slo: Row,
    rates: Sequence[float],
    prompts: int,
    seed: int,
    folder: Path,
    say: Callable[[str], None],
    keep: Callable[[Sequence[Row]], None],
) -> list[Row]:
    from coordinator.cluster_process import ClusterProcess

    rows: list[Row] = []
    with ClusterProcess.start(config, None, lambda event: say(step(event))) as cluster:
        for number, rate in enumerate(rates):
            say(f"vLLM's client, {rate:g} requests a second, {number + 1} of {len(rates)}")
            before = _facts(cluster.base_url)
            result = folder / f"goodput-{number}.json"
            name, tokenizer = served_model(cluster.base_url), Path(resolve_model(config.model))
            asked = arguments(cluster.base_url, name, tokenizer, slo, rate, prompts, seed + number, result)
            theirs = _run(asked, result)
            after = _settled(cluster.base_url, before, theirs)
            rows.append({"rate_per_s": rate, **compared(theirs, before, after)})
            keep(rows)
    return rows


def _run(asked: Sequence[str], result: Path) -> Row:
    """Raises EngineError with the last lines it said if vLLM's client fails."""
    result.unlink(missing_ok=True)
    ran = subprocess.run(
        [sys.executable, "-c", CLIENT, *asked],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    if ran.returncode != 0 or not result.exists():
        raise EngineError(f"vLLM's client ended with status {ran.returncode}:\n{ran.stdout[-2000:]}")
    found: Row = json.loads(result.read_text(encoding="utf-8"))
    return found


def _settled(base_url: str, before: Facts, theirs: Row) -> Facts:
    """The cluster's facts, when the last request has been counted."""
    give_up_s = time.monotonic() + SETTLED_S
    while True:
        facts = _facts(base_url)
        counted = _counted(facts, "requests") - _counted(before, "requests")
        if counted >= len(theirs["ttfts"]) or time.monotonic() > give_up_s:
            return facts
        time.sleep(0.2)


def _counted(facts: Facts, what: str) -> int:
    """Requests that were scored, or those of them that were good."""
    kept = facts["attainment"].get(CLASS, {"requests": 0, "goodput": 0.0})
    requests = int(kept["requests"])
    return round(requests * float(kept["goodput"])) if what == "goodput" else requests


def _facts(base_url: str) -> Facts:
    async def fetch() -> Facts:
        async with httpx.AsyncClient(base_url=base_url, timeout=TIMEOUT_S) as client:
            return await fetch_facts(client)

    return asyncio.run(fetch())


def _table(rows: Sequence[Row]) -> Table:
    table = Table(title="goodput: vLLM's own client, and our scorecard", title_justify="left")
    for heading in ("requests/s", "requests", "good by vLLM", "good by ours", "apart", "TTFT p50", "TPOT p50"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            f"{row['rate_per_s']:g}",
            str(row["requests"]),
            str(row["good_by_client"]),
            str(row["good_by_scorecard"]),
            f"{row['difference']:.1%}",
            f"{row['ttft_p50_ms']:.0f} ms",
            f"{row['tpot_p50_ms']:.0f} ms",
        )
    return table


if __name__ == "__main__":
    typer.run(goodput)
