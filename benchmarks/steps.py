"""How well step times are predicted: every table of measured steps, and the published coefficients.

`python -m benchmarks.steps --data DIR --out out/bench/steps.json` fits each table under DIR/steps, scores the
fit on steps that it has not seen, and draws predicted against measured beside the JSON.
"""

from __future__ import annotations

import json
import random
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.as_module import start
from benchmarks.provenance import provenance
from coordinator.cli.profile_plot import draw_profile
from engine.batch_shapes import Limits, Shape, draw_shapes
from engine.cost import Piece, StepCost
from engine.cost_fit import FAMILIES, fit_cost
from engine.errors import ConfigError
from engine.profile import Score, StepProfile, score, split
from engine.step_table import StepRow, StepTable

R2_AT_LEAST = 0.97
MEDIAN_ERROR_AT_MOST = 0.05
SEED = 0
# What SLOs-Serve's authors published: seconds of `base + per_token * tokens + per_draft_step * draft steps`.
PUBLISHED = {
    "OPT-6.7B, A100": Piece(24.8e-3, 6.9e-5),
    "ToolLlama-7B, A100": Piece(27.5e-3, 6.6e-5),
    "OPT-13B TP2, A100": Piece(31.7e-3, 7.2e-5, 3.3e-3),
    "OPT-30B TP4, A100": Piece(37.9e-3, 9.3e-5, 2.8e-3),
    "OPT-13B, H100": Piece(27.4e-3, 4.2e-5),
}
PUBLISHED_ROWS = 1000
PUBLISHED_LIMITS = Limits(max_decodes=128, max_batch_tokens=2048, max_kv_tokens=2048, block_size=16)
MAX_DRAFT_STEPS = 6
NOISE = (0.0, 0.05)  # standard deviation of the relative noise on their steps


def bench_steps(
    data: Annotated[
        Path | None, typer.Option(envvar="SLOSSERVE_DATA", help="Folder with steps/*.csv.gz in it.")
    ] = None,
    steps: Annotated[list[Path] | None, typer.Option(help="More tables, as `profile run` writes them.")] = None,
    out: Annotated[Path, typer.Option(help="Where the results go, as JSON.")] = Path("out/bench/steps.json"),
) -> None:
    """Fit every table of step times and say how well steps that were held out are predicted.

    Example: python -m benchmarks.steps --data DIR --out out/bench/steps.json
    """
    tables = [_fit_table(path, out.with_suffix("")) for path in [*_tables(data), *(steps or ())]]
    published = [_fit_published(name, piece, noise) for name, piece in PUBLISHED.items() for noise in NOISE]
    results = {
        "targets": _targets([*tables, *published]),
        "tables": tables,
        "published": published,
        "method": (
            "forms are fitted to 80 % of the rows and scored on the rest, the same rows each time; errors are "
            "|predicted - measured| / measured; the best form is then fitted to all rows"
        ),
        "provenance": provenance(SEED),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    _show(tables, published, out)


def _tables(data: Path | None) -> list[Path]:
    if data is None:
        return []
    found = sorted(path for folder in (data, data / "steps") for path in folder.glob("*.csv*"))
    if not found:
        raise ConfigError(f"{data}: has no *.csv or *.csv.gz, and neither has its folder steps")
    return found


def _fit_table(path: Path, plots: Path) -> dict[str, Any]:
    table = StepTable.read([path])
    fitted = StepProfile.fit(table)
    name = path.name.removesuffix(".gz").removesuffix(".csv")
    draw_profile(fitted, table, plots / f"{name}.png", title=name)
    return {
        "name": name,
        "rows": len(table.rows),
        "family": fitted.family,
        **_errors(fitted.held_out),
        "compared": {form: asdict(scored) for form, scored in fitted.compared.items()},
        "worst": [asdict(row) for row in fitted.worst],
        "cost": asdict(fitted.cost),
        "about": dict(table.about),
        "sources": [asdict(source) for source in fitted.sources],
    }


def _errors(held_out: Score) -> dict[str, Any]:
    scored = asdict(held_out)
    return {"held_out_rows": scored.pop("rows"), **scored}


def _fit_published(name: str, piece: Piece, noise: float) -> dict[str, Any]:
    """Rows made from a published fit, and what a fit to them finds."""
    table = _made_table(StepCost((piece,)), noise)
    line = FAMILIES[0]
    seen, unseen = split(table)
    scored = score(fit_cost(seen, line), unseen)
    return {
        "name": name,
        "noise": noise,
        "family": line.name,
        "rows": PUBLISHED_ROWS,
        **_errors(scored),
        "published": asdict(piece),
        "found": asdict(fit_cost(table, line).pieces[0]),
    }


def _made_table(cost: StepCost, noise: float) -> StepTable:
    draw = random.Random(SEED)
    shapes = draw_shapes(PUBLISHED_ROWS, PUBLISHED_LIMITS, SEED)
    return StepTable(tuple(_made_row(cost, shape, noise, draw) for shape in shapes))


def _made_row(cost: StepCost, shape: Shape, noise: float, draw: random.Random) -> StepRow:
    drafts = draw.randint(0, MAX_DRAFT_STEPS) if shape.decodes else 0
    tokens = shape.tokens + shape.decodes * drafts
    seconds = cost.predict(tokens, draft_steps=drafts) * max(draw.gauss(1.0, noise), 0.1)
    return StepRow(
        tokens=tokens,
        seqs=shape.decodes + len(shape.chunks),
        decode_seqs=shape.decodes,
        decode_context_tokens=sum(draw.randint(16, 2048) for _ in range(shape.decodes)),
        prefill_chunks=shape.chunks,
        prefill_work=sum(chunk * (kv + chunk / 2) for chunk, kv in shape.chunks),
        step_ms=seconds * 1e3,
        spec_tokens_per_decode=drafts,
    )


def _targets(scored: list[dict[str, Any]]) -> dict[str, Any]:
    """Whether every table is predicted well enough. Each figure is the worst over the tables."""
    r2 = min(row["r2"] for row in scored)
    median_error = max(row["median_error"] for row in scored)
    return {
        "r2": {"at_least": R2_AT_LEAST, "worst": r2, "met": r2 >= R2_AT_LEAST},
        "median_error": {
            "at_most": MEDIAN_ERROR_AT_MOST,
            "worst": median_error,
            "met": median_error <= MEDIAN_ERROR_AT_MOST,
        },
    }


def _show(tables: list[dict[str, Any]], published: list[dict[str, Any]], out: Path) -> None:
    shown = Table(title="held-out steps")
    for heading in ("table", "form", "R2", "median error", "p99 error", "worst"):
        shown.add_column(heading, justify="left" if heading in ("table", "form", "worst") else "right")
    for row in [*tables, *published]:
        name = f"{row['name']}, noise {row['noise']:.0%}" if "noise" in row else row["name"]
        worst = row.get("worst", [])
        shown.add_row(
            name,
            row["family"],
            f"{row['r2']:.4f}",
            f"{row['median_error']:.1%}",
            f"{row['p99_error']:.1%}",
            f"{worst[0]['predicted_ms'] / worst[0]['measured_ms'] - 1:+.0%} {worst[0]['shape']}"
            if worst
            else "",
        )
    console = Console(width=150, highlight=False)
    console.print(shown)
    console.print(f"results: {out}")


if __name__ == "__main__":
    start(bench_steps)
