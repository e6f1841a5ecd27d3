"""`slosserve traces`: which public traces there are, and a copy of one."""

from __future__ import annotations

import csv
import gzip
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import httpx
import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential

from benchmarks.traces import data_directory, read_lengths, read_trace
from engine.errors import ConfigError

AZURE = "https://raw.githubusercontent.com/Azure/AzurePublicDataset/master/data/AzureLLMInferenceTrace_"
MOONCAKE = "https://raw.githubusercontent.com/kvcache-ai/Mooncake/main/FAST25-release/traces/"
ATTEMPTS = 4
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 8.0
TIMEOUT_S = 30.0
BUSY_STATUS = 429

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True, slots=True)
class PublicTrace:
    """A trace that others published. `is_file`: the address is one that can be fetched as it is.

    `local_file`: its name in the folder traces of the data. `has_arrivals`: t_s is the time of arrival.
    """

    what: str
    licence: str
    address: str
    is_file: bool = True
    local_file: str | None = None
    has_arrivals: bool = True


PUBLIC_TRACES: Mapping[str, PublicTrace] = {
    "azure-conv": PublicTrace(
        "chat, Azure 2023 (Patel et al., Splitwise)",
        "CC-BY-4.0",
        f"{AZURE}conv.csv",
        local_file="azure2023_conv.csv.gz",
    ),
    "azure-code": PublicTrace(
        "code completion, Azure 2023, very bursty (a local copy may be its first 30 minutes)",
        "CC-BY-4.0",
        f"{AZURE}code.csv",
        local_file="azure2023_code_first30min.csv.gz",
    ),
    "servegen-reasoning": PublicTrace(
        "DeepSeek-R1, generated from production client models",
        "Apache-2.0",
        "https://github.com/alibaba/ServeGen",
        is_file=False,
        local_file="servegen_reason_deepseekr1_4rps.csv.gz",
    ),
    "agent-sessions": PublicTrace(
        "calls of coding agents, by session",
        "Apache-2.0",
        "https://github.com/callanjfox/kv-cache-tester",
        is_file=False,
        local_file="agent_sessions_even.csv.gz",
        has_arrivals=False,
    ),
    "mooncake": PublicTrace(
        "long prompts, synthetic mix of FAST'25",
        "Apache-2.0",
        f"{MOONCAKE}synthetic_trace.jsonl",
        local_file="mooncake_synthetic.csv.gz",
    ),
    "mooncake-conversation": PublicTrace(
        "conversations, FAST'25", "Apache-2.0", f"{MOONCAKE}conversation_trace.jsonl"
    ),
    "mooncake-toolagent": PublicTrace(
        "tools and agents, FAST'25", "Apache-2.0", f"{MOONCAKE}toolagent_trace.jsonl"
    ),
}


@app.callback(epilog="Example: slosserve traces get azure-conv --out azure-conv.csv.gz")
def traces() -> None:
    """List public traces, and fetch one."""


@app.command("list", epilog="Example: slosserve traces list --json")
def list_traces(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Say what each trace is, its licence and address, and what is in the local copy if there is one."""
    rows = [_row(name, trace) for name, trace in PUBLIC_TRACES.items()]
    if as_json:
        typer.echo(json.dumps({"traces": rows}, indent=1))
        return
    console = Console(highlight=False)
    table = Table("name", "what", "licence", "local", "rows", "req/s", "in", "out", title="public traces")
    table.caption = "in, out: tokens, mean / p50 / p99"
    for row in rows:
        table.add_row(*_cells(row))
    console.print(table)
    for row in rows:
        console.print(f"{row['name']}: {row['address']}", soft_wrap=True)


@app.command(epilog="Example: slosserve traces get azure-code --out azure-code.csv.gz")
def get(
    name: Annotated[str, typer.Argument(help=f"Which one: {', '.join(PUBLIC_TRACES)}.")],
    out: Annotated[Path, typer.Option(help="Where it goes; gzipped if the name ends with .gz.")],
) -> None:
    """Copy a trace from the local data, else fetch it, as CSV with t_s,in_tokens,out_tokens.

    A local copy keeps its further columns. The file appears whole or not at all.
    """
    if name not in PUBLIC_TRACES:
        raise ConfigError(f"no trace {name!r}: choose from {', '.join(PUBLIC_TRACES)}")
    trace = PUBLIC_TRACES[name]
    local = _local(trace)
    out.parent.mkdir(parents=True, exist_ok=True)
    if local is not None:
        with _replacing(out) as unfinished:
            _copy(local, unfinished, gzipped=out.suffix == ".gz")
    elif trace.is_file:
        with _replacing(out) as unfinished, tempfile.TemporaryDirectory() as folder:
            fetched = Path(folder) / Path(trace.address).name
            _download(name, trace.address, fetched)
            _convert(fetched, unfinished, gzipped=out.suffix == ".gz")
    else:
        raise ConfigError(
            f"trace {name} is not one file that can be fetched: make a CSV with t_s,in_tokens,out_tokens from "
            f"{trace.address}, or set SLOSSERVE_DATA to a folder that holds traces/{trace.local_file}"
        )
    Console(stderr=True, highlight=False, soft_wrap=True).print(
        f"{name} ({trace.licence}) from {local or trace.address}: {out}"
    )


def _local(trace: PublicTrace) -> Path | None:
    folder = data_directory()
    if folder is None or trace.local_file is None:
        return None
    path = folder / "traces" / trace.local_file
    return path if path.is_file() else None


def _row(name: str, trace: PublicTrace) -> dict[str, Any]:
    local = _local(trace)
    shown = asdict(trace)
    facts = {"name": name, **{key: shown[key] for key in ("what", "licence", "address", "is_file")}}
    if local is None:
        return {**facts, "local": None}
    pairs = read_lengths(local)
    rate = None
    if trace.has_arrivals:
        arrivals = read_trace(local)
        rate = (len(arrivals) - 1) / arrivals[-1].at_s if arrivals[-1].at_s > 0 else None
    return {
        **facts,
        "local": str(local),
        "rows": len(pairs),
        "rate_per_s": rate,
        "in_tokens": _summary(pairs[:, 0]),
        "out_tokens": _summary(pairs[:, 1]),
    }


def _summary(tokens: np.ndarray) -> dict[str, float]:
    p50, p99 = np.percentile(tokens, (50, 99))
    return {"mean": float(tokens.mean()), "p50": float(p50), "p99": float(p99)}


def _cells(row: Mapping[str, Any]) -> list[str]:
    about = [row["name"], row["what"], row["licence"]]
    if row["local"] is None:
        return [*about, "no" if row["is_file"] else "no, see its address", "", "", "", ""]
    lengths = [" / ".join(f"{value:.0f}" for value in row[key].values()) for key in ("in_tokens", "out_tokens")]
    rate = "" if row["rate_per_s"] is None else f"{row['rate_per_s']:.2f}"
    return [*about, "yes", str(row["rows"]), rate, *lengths]


@contextmanager
def _replacing(out: Path) -> Iterator[Path]:
    """A file beside `out` that takes its place at the end, and is gone if it does not come so far."""
    handle, name = tempfile.mkstemp(prefix=f".{out.name}.", dir=out.parent)
    os.close(handle)
    unfinished = Path(name)
    try:
        yield unfinished
        unfinished.chmod(0o644)  # mkstemp made it private
        unfinished.replace(out)
    finally:
        unfinished.unlink(missing_ok=True)


def _copy(source: Path, target: Path, *, gzipped: bool) -> None:
    with gzip.open(source, "rb") as read, _opened(gzipped)(target, "wb") as write:
        shutil.copyfileobj(read, write)


def _convert(source: Path, target: Path, *, gzipped: bool) -> None:
    arrivals = read_trace(source)
    with _opened(gzipped)(target, "wt", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("t_s", "in_tokens", "out_tokens"))
        writer.writerows((round(a.at_s, 6), a.in_tokens, a.out_tokens) for a in arrivals)


def _opened(gzipped: bool) -> Callable[..., Any]:
    return gzip.open if gzipped else open


def _download(name: str, address: str, target: Path) -> None:
    """Fetch `address`; a transport that failed or a server that was busy is asked again."""
    attempts = Retrying(
        stop=stop_after_attempt(ATTEMPTS),
        wait=wait_exponential(multiplier=FIRST_WAIT_S, max=LONGEST_WAIT_S),
        retry=retry_if_exception(_can_help_again),
        reraise=True,
    )
    try:
        with _progress() as progress:
            attempts(_download_once, name, address, target, progress)
    except httpx.HTTPError as error:
        raise ConfigError(
            f"trace {name} could not be fetched from {address}: {error or type(error).__name__}; try again "
            "with a network, or fetch that file on another machine: it can be given as a trace as it is"
        ) from error


def _download_once(name: str, address: str, target: Path, progress: Progress) -> None:
    task = progress.add_task(name, total=None)
    try:
        with (
            httpx.stream("GET", address, follow_redirects=True, timeout=TIMEOUT_S) as response,
            target.open("wb") as file,
        ):
            response.raise_for_status()
            size = response.headers.get("content-length")
            progress.update(task, total=int(size) if size else None)
            for chunk in response.iter_bytes():
                file.write(chunk)
                # Of what came over the line: content-length counts compressed bytes.
                progress.update(task, completed=response.num_bytes_downloaded)
    except BaseException:
        progress.remove_task(task)
        raise


def _can_help_again(error: BaseException) -> bool:
    if isinstance(error, httpx.HTTPStatusError):
        status = error.response.status_code
        return status == BUSY_STATUS or status >= httpx.codes.INTERNAL_SERVER_ERROR
    return isinstance(error, httpx.TransportError)


def _progress() -> Progress:
    text = TextColumn("[progress.description]{task.description}")
    console = Console(stderr=True)
    return Progress(text, BarColumn(), DownloadColumn(), TimeRemainingColumn(), console=console)


if __name__ == "__main__":
    app()
