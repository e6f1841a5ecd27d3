"""`slosserve bench`: the benchmark suite, one command per result. Each is imported when it is called."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import typer
import typer.core

from benchmarks.provenance import commit
from coordinator.cli.main import as_command

EXAMPLE = (
    "Example: slosserve bench capacity --quick && "
    "slosserve bench report --from out/bench/quick --out out/bench/quick/RESULTS.md"
)
# Command -> its function, whose docstring ends with its example, and its line in --help.
COMMANDS = {
    "capacity": ("benchmarks.capacity_table:bench_capacity", "The table: rate per GPU of every system."),
    "ablation": ("benchmarks.studies.ablation:ablation", "What each part of the planner adds."),
    "scaling": ("benchmarks.studies.scaling:scaling", "1 to 16 replicas under bursts."),
    "burst": ("benchmarks.studies.burst:burst", "Latency and promises through a spike."),
    "lengths": ("benchmarks.lengths:bench_lengths", "What it costs not to know output lengths."),
    "rebalance": ("benchmarks.studies.rebalance:rebalance", "Pools that follow a shift of the load."),
    "distserve-facts": ("benchmarks.distserve_facts:distserve_facts", "The published figures of DistServe."),
    "fidelity": ("benchmarks.fidelity.command:fidelity", "The virtual engine beside the real one."),
    "shift": ("benchmarks.real.shift:bench_shift", "A shift of the mix on real engines: pools that follow it."),
    "real": ("benchmarks.real.command:bench_real", "Real engines: ours beside vLLM as it ships."),
    "agents": ("benchmarks.agents.command:bench_agents", "Tool loops: with sessions, without, and vLLM."),
    "goodput": ("benchmarks.real.goodput:goodput", "vLLM's own client, and our scorecard."),
    "tokens": ("benchmarks.real.tokens:tokens", "The same tokens as stock vLLM, under load."),
    "thousand": ("benchmarks.thousand:bench_thousand", "A thousand virtual replicas, one coordinator."),
    "speed": ("benchmarks.speed:speed", "Simulated seconds per second."),
    "report": ("benchmarks.report.page:report", "Tables and plots of all of it, as RESULTS.md."),
}


class _LazyCommands(typer.core.TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        path, line = COMMANDS[cmd_name]
        if ctx.resilient_parsing or ctx.meta.get("slosserve.bench") != cmd_name:
            return typer.core.TyperCommand(cmd_name, help=line)
        module, _, function = path.partition(":")
        return as_command(cmd_name, getattr(import_module(module), function))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        ctx.meta["slosserve.bench"] = args[0] if args else None
        return super().resolve_command(ctx, args)


app = typer.Typer(cls=_LazyCommands, no_args_is_help=True, add_completion=False)


@app.callback(epilog=EXAMPLE)
def bench() -> None:
    """Measure the cluster against vLLM, Sarathi-Serve and DistServe, in simulated time and on real engines."""
    commit()  # a run of an hour tells of the code that it began with
