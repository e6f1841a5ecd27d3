"""`slosserve profile`: measure what steps cost on an engine, and fit a model to what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from engine.profile import StepProfile
from engine.step_table import StepTable

EXAMPLE = (
    "Example: slosserve profile run --model tiny --out steps.csv.gz && "
    "slosserve profile fit --steps steps.csv.gz --out profile.json --plot profile.png"
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


@app.command(epilog="Example: slosserve profile fit --steps steps.csv.gz --out profile.json --plot profile.png")
def fit(
    steps: Annotated[list[Path], typer.Option(help="CSV or CSV.gz of measured steps; may be repeated.")],
    out: Annotated[Path, typer.Option(help="Where the model goes, as JSON.")],
    plot: Annotated[Path | None, typer.Option(help="Draw predicted against measured, as PNG.")] = None,
    as_json: AsJson = False,
) -> None:
    """Fit a step-time model, choose its form by held-out steps, and save it with how wrong it is."""
    table = StepTable.read(steps)
    fitted = StepProfile.fit(table)
    fitted.save(out)
    if plot is not None:
        from coordinator.cli.profile_plot import draw_profile

        draw_profile(fitted, table, plot, title=", ".join(source.file for source in fitted.sources))
    if as_json:
        typer.echo(json.dumps({"out": str(out), **msgspec.to_builtins(fitted)}))
        return
    _show(fitted, out)


def _show(fitted: StepProfile, out: Path) -> None:
    console = Console(soft_wrap=True, highlight=False)
    table = Table(title=f"{fitted.held_out.rows} held-out steps")
    for heading in ("form", "R2", "median error", "p99 error"):
        table.add_column(heading, justify="left" if heading == "form" else "right")
    for name, score in fitted.compared.items():
        chosen = "bold" if name == fitted.family else None
        errors = (f"{score.median_error:.1%}", f"{score.p99_error:.1%}")
        table.add_row(name, f"{score.r2:.4f}", *errors, style=chosen)
    console.print(table)
    for row in fitted.worst:
        console.print(f"  {row.measured_ms:8.2f} ms, predicted {row.predicted_ms:8.2f}: {row.shape}")
    console.print(f"[bold]{fitted.family}[/bold] fitted to all {sum(s.rows for s in fitted.sources)}: {out}")


@app.command(epilog="Example: slosserve profile run --model tiny --out steps.csv.gz --shapes 300")
def run(
    out: Annotated[Path, typer.Option(help="Where the rows go, as CSV or CSV.gz.")],
    model: Annotated[str, typer.Option(help="tiny, scale, a folder or a Hugging Face name.")] = "tiny",
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
