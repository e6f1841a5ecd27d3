"""`slosserve fuzz`: all that the endpoint's own OpenAPI description allows, and much that it does not."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console

from benchmarks.chaos.cluster import Cluster
from benchmarks.chaos.run import Row
from benchmarks.provenance import provenance
from benchmarks.startup import show_progress
from benchmarks.studies.crew import write
from coordinator.cluster_process import ClusterProcess
from coordinator.config import load_config
from coordinator.process_tree import processes_of
from engine.errors import ConfigError, SlosserveError

HANG_S = 60.0  # no answer for so long is a hang
LATE_S = 300.0  # after its time was over
SETTLED_S = 40.0  # leases end, and so do answers that nobody waits for
# 503 with Retry-After is what a full cluster says.
RULES = '[checks]\nnot_a_server_error.expected-statuses = ["2xx", "3xx", "4xx", "503"]\n'
SETTINGS: dict[str, Any] = {
    "name": "fuzz",
    "endpoint.port": 0,
    "endpoint.admin_key": "not-given",  # who fuzzes may not change the cluster, and is told so
}


def fuzz(
    minutes: Annotated[float, typer.Option(min=0.5, help="Of requests.")] = 10.0,
    config: Annotated[str, typer.Option(help="Configuration of the cluster: a name or a file.")] = "laptop",
    seed: Annotated[int, typer.Option(help="Of the requests.")] = 1,
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = Path("out/bench/fuzz.json"),
) -> None:
    """Send real engines what schemathesis makes of the endpoint's OpenAPI description: right by it, and wrong.

    Exits 1 if a request is answered with an error of the server's (503 with Retry-After is none), if one hangs,
    or if the cluster is not well afterwards: nodes ready, no KV block in use, a request answered.

    Example: slosserve fuzz --minutes 2
    """
    console = Console()
    tool = Path(sys.executable).with_name("schemathesis")
    if not tool.exists():
        raise ConfigError(f"schemathesis is not installed beside {sys.executable}: pip install '.[dev]'")
    with show_progress(console, "starting the cluster") as progress:
        process = ClusterProcess.start(load_config(config, SETTINGS), progress=progress)
    with process, tempfile.TemporaryDirectory() as folder:
        log = out.with_suffix(".log")
        with console.status(f"{minutes:g} minutes of requests; what is found goes to {log}"):
            found = _send(tool, process.base_url, minutes * 60, seed, Path(folder), log)
        found |= asyncio.run(_health(process))
    found["processes_left"] = len(processes_of(process.state.run_id, process.state.processes.values()))
    write(out, {**found, "minutes": minutes, "provenance": provenance(seed)})
    wrong = [name for name in ("failures", "errors", "blocks_in_use", "processes_left") if found[name]]
    wrong += [] if found["answers"] else ["it does not answer any more"]
    console.print(
        f"{found['requests']} requests to {found['operations']} operations: {found['failures']} failures,"
        f" {found['errors']} errors; then {found['blocks_in_use']} KV blocks in use; figures in {out}"
    )
    if wrong:
        raise SlosserveError(f"not as promised: {', '.join(wrong)}; see {log}")


def _send(tool: Path, url: str, seconds: float, seed: int, folder: Path, log: Path) -> Row:
    """Run schemathesis. Raises SlosserveError where it cannot run or does not end."""
    rules, report = folder / "schemathesis.toml", folder / "report.json"
    rules.write_text(RULES, encoding="utf-8")
    command = [str(tool), "--config-file", str(rules), "run", f"{url}/openapi.json"]
    command += ["--max-time", f"{seconds:.0f}", "--request-timeout", f"{HANG_S:g}"]
    command += ["--checks", "not_a_server_error"]
    command += ["--continue-on-failure", "--suppress-health-check", "all", "--generation-database", "none"]
    command += ["--seed", str(seed), "--no-color", "--report-json-path", str(report)]
    log.parent.mkdir(parents=True, exist_ok=True)
    try:
        with log.open("w", encoding="utf-8") as output:
            subprocess.run(
                command, cwd=folder, stdout=output, stderr=output, timeout=seconds + LATE_S, check=False
            )
    except subprocess.TimeoutExpired:
        raise SlosserveError(f"schemathesis did not end within {seconds + LATE_S:g} s; see {log}") from None
    if not report.exists():
        raise SlosserveError(f"schemathesis did not run; see {log}")
    return _told(json.loads(report.read_text(encoding="utf-8")))


def _told(report: Mapping[str, Any]) -> Row:
    """What matters of a report of schemathesis."""
    return {
        "requests": report["test_cases"]["generated"],
        "operations": report["operations"]["tested"],
        "failures": len(report["failures"]),
        "errors": len(report["errors"]),
        "found": [*report["failures"], *report["errors"]][:20],
        "stop_reason": report["stop_reason"],
    }


async def _health(process: ClusterProcess) -> Row:
    """Whether the cluster is as it was before. Raises SlosserveError for nodes that do not serve."""
    cluster = Cluster(process)
    try:
        await cluster.well()
        blocks = await cluster.idle(SETTLED_S)
    finally:
        await cluster.close()
    model = process.config.served_model_name or process.config.model
    body = {"model": model, "prompt": "Are you well?", "max_tokens": 8}
    async with httpx.AsyncClient(timeout=HANG_S) as client:
        answer = await client.post(f"{process.base_url}/v1/completions", json=body)
    return {"blocks_in_use": blocks, "answers": answer.status_code == httpx.codes.OK}
