"""`slosserve profile`: measure what steps cost on an engine, and fit a model to what was measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from engine.coefficients import Coefficients
from engine.errors import ConfigError
from engine.profile import StepProfile
from engine.request import RoleName
from engine.step_table import StepTable

EXAMPLE = (
    "Example: slosserve profile run --model tiny --out steps.csv.gz && "
    "slosserve profile fit --steps steps.csv.gz --out profile.json --plot profile.png"
)

FIT_EXAMPLE = (
    "Example: slosserve profile fit --steps steps.csv.gz --host-ms 2 --out profile.json --plot profile.png, or "
    "slosserve profile fit --coefficients distserve_opt13b_a100.json --tp 2 --phase prefill --out prefill.json"
)

BUSY_SHARE = 0.05
BUSY = (
    "[yellow]The machine was busy:[/yellow] {:.0%} of the time others had the core. That is taken off, but not "
    "what they do to caches: measure again on a quiet machine, or under `nice -n -15`."
)

app = typer.Typer(no_args_is_help=True, add_completion=False)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


@app.callback(epilog=EXAMPLE)
def profile() -> None:
    """Measure what steps cost on an engine, and fit a model to what was measured."""


class System(StrEnum):
    """Whose coefficients, of those that a file holds."""

    DISTSERVE = "distserve"
    VLLM = "vllm"


@app.command(epilog=FIT_EXAMPLE)
def fit(
    out: Annotated[Path, typer.Option(help="Where the model goes, as JSON.")],
    steps: Annotated[
        list[Path] | None, typer.Option(help="CSV or CSV.gz of measured steps; may be repeated.")
    ] = None,
    coefficients: Annotated[
        Path | None, typer.Option(help="JSON of published coefficients, in the form of DistServe's, instead.")
    ] = None,
    phase: Annotated[RoleName | None, typer.Option(help="Of the coefficients: what the replica does.")] = None,
    tp: Annotated[
        int | None, typer.Option(min=1, help="Of the coefficients: GPUs per replica.", show_default="1")
    ] = None,
    system: Annotated[
        System | None, typer.Option(help="Of the coefficients: whose engine.", show_default="distserve")
    ] = None,
    host_ms: Annotated[
        float, typer.Option(min=0, help="Added to every step: the engine's host, where steps leave it out.")
    ] = 0.0,
    plot: Annotated[Path | None, typer.Option(help="Draw predicted against measured, as PNG.")] = None,
    as_json: AsJson = False,
) -> None:
    """Fit a step-time model, choose its form by held-out steps, and save it with how wrong it is."""
    fitted, table = _fitted(steps or (), coefficients, phase, tp, system)
    saved = fitted.with_host(host_ms / 1e3)
    saved.save(out)
    if plot is not None:
        from coordinator.cli.profile_plot import draw_profile

        # Without the host, as the rows are.
        draw_profile(fitted, table, plot, title=", ".join(source.file for source in fitted.sources))
    if as_json:
        typer.echo(json.dumps({"out": str(out), **msgspec.to_builtins(saved)}))
    elif coefficients is None:
        _show(saved, f"{saved.held_out.rows} held-out steps")
        typer.echo(f"{saved.family} fitted to all {sum(source.rows for source in saved.sources)}: {out}")
    else:
        _show(saved, f"{saved.held_out.rows} batches of the published formula")
        typer.echo("\n".join([*_said(saved), f"{saved.family} from {coefficients}: {out}"]))


def _fitted(
    steps: Sequence[Path],
    coefficients: Path | None,
    phase: RoleName | None,
    tp: int | None,
    system: System | None,
) -> tuple[StepProfile, StepTable]:
    """The model, and the rows that it was made from or is compared with. Raises ConfigError."""
    if bool(steps) == (coefficients is not None):
        raise ConfigError("give either --steps (what was measured) or --coefficients (what was published)")
    if coefficients is None:
        flags = {"--phase": phase, "--tp": tp, "--system": system}
        if given := [flag for flag, value in flags.items() if value is not None]:
            raise ConfigError(f"{given[0]} goes with --coefficients: steps do not have it")
        table = StepTable.read(steps)
        return StepProfile.fit(table), table
    if phase is None:
        raise ConfigError(
            "--coefficients needs --phase: prefill, decode, or mixed for a replica that does both"
        )
    published = Coefficients.read(coefficients, system or System.DISTSERVE, tp or 1)
    return published.profile(phase), published.grid(phase)


def _said(fitted: StepProfile) -> list[str]:
    return [f"  {key}: {fitted.about[key]}" for key in ("error", "switch", "batches") if key in fitted.about]


def _show(fitted: StepProfile, title: str) -> None:
    console = Console(soft_wrap=True, highlight=False)
    table = Table(title=title)
    for heading in ("form", "R2", "median error", "p99 error"):
        table.add_column(heading, justify="left" if heading == "form" else "right")
    for name, score in fitted.compared.items():
        chosen = "bold" if name == fitted.family else None
        errors = (f"{score.median_error:.1%}", f"{score.p99_error:.1%}")
        table.add_row(name, f"{score.r2:.4f}", *errors, style=chosen)
    console.print(table)
    for row in fitted.worst:
        console.print(f"  {row.measured_ms:8.2f} ms, predicted {row.predicted_ms:8.2f}: {row.shape}")


@app.command(epilog="Example: slosserve profile run --model tiny --out steps.csv.gz --shapes 300")
def run(
    out: Annotated[Path, typer.Option(help="Where the rows go, as CSV or CSV.gz.")],
    model: Annotated[
        str, typer.Option(help="tiny, scale, llama-8b, a folder or a Hugging Face name.")
    ] = "tiny",
    shapes: Annotated[int, typer.Option(min=1, help="Different batches to measure.")] = 300,
    repeats: Annotated[int, typer.Option(min=1, help="Steps of each; the median is kept.")] = 5,
    minutes: Annotated[float, typer.Option(min=0.1, help="Stop repeating after this long.")] = 9.0,
    max_batch_tokens: Annotated[int, typer.Option(min=64, help="Largest batch.")] = 1024,
    max_model_len: Annotated[int, typer.Option(min=64, help="Longest context.")] = 4096,
    kv_cache_gib: Annotated[float | None, typer.Option(help="KV cache; vLLM decides if not given.")] = None,
    seed: Annotated[int, typer.Option(help="Of the batches and the prompts.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Start one engine here, measure hundreds of batches on it, and write a row for each."""
    from coordinator.cli.profile_run import Settings, measure

    settings = Settings(
        model, shapes, repeats, minutes * 60, max_batch_tokens, max_model_len, kv_cache_gib, seed
    )
    table, facts = measure(settings, out)
    table.write(out)
    if as_json:
        typer.echo(json.dumps({"out": str(out), "rows": len(table.rows), **facts}))
        return
    console = Console(soft_wrap=True, highlight=False)
    console.print(
        f"[bold]{len(table.rows)}[/bold] of {shapes} batches, {facts['rounds']} times each, "
        f"in {facts['seconds']:.0f} s: {out}"
    )
    if facts["waited_share"] > BUSY_SHARE:
        console.print(BUSY.format(facts["waited_share"]))
    console.print(f"Fit them: slosserve profile fit --steps {out} --out profile.json")
