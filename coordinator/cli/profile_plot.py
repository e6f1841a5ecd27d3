"""Predicted against measured step times, as a picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from engine.cost_fit import predicted_s
from engine.profile import StepProfile
from engine.step_table import StepTable

KINDS = (("decodes", "tab:blue"), ("prefills", "tab:orange"), ("both", "tab:green"))
DOTS_PER_INCH = 120
WITHIN = 0.05


def draw_profile(fitted: StepProfile, table: StepTable, path: Path, title: str) -> None:
    """Two panels: predicted over measured on log axes, and the relative error over batch tokens."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot, ticker

    measured_ms, predicted_ms = table.seconds * 1e3, predicted_s(fitted.cost, table) * 1e3
    error = predicted_ms / measured_ms - 1
    decodes, prefills = table.column("decode_seqs") > 0, table.column("prefill_work") > 0
    kinds = (decodes & ~prefills, prefills & ~decodes, decodes & prefills)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 5.2), layout="constrained")
    for (name, colour), rows in zip(KINDS, kinds, strict=True):
        if rows.any():
            label = f"{name} ({int(rows.sum())})"
            left.scatter(measured_ms[rows], predicted_ms[rows], s=6, alpha=0.4, c=colour, label=label)
            right.scatter(table.column("tokens")[rows], 100 * error[rows], s=6, alpha=0.4, c=colour)
    ends = [min(measured_ms.min(), predicted_ms.min()), max(measured_ms.max(), predicted_ms.max())]
    left.plot(ends, ends, "k-", linewidth=0.8)
    left.set(xscale="log", yscale="log", xlabel="measured step [ms]", ylabel="predicted step [ms]")
    for axis in (left.xaxis, left.yaxis):
        axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(ticker.NullFormatter())
    left.legend(loc="upper left", title="batches with", markerscale=2)
    right.axhspan(-100 * WITHIN, 100 * WITHIN, color="0.9", zorder=0)
    right.axhline(0, color="k", linewidth=0.8)
    widest = max(100 * float(np.quantile(np.abs(error), 0.995)), 10.0)
    right.set(xscale="log", xlabel="tokens of the batch", ylabel="error of the prediction [%]")
    right.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    right.set_ylim(-widest, widest)
    score = fitted.held_out
    figure.suptitle(
        f"{title}: {fitted.family}; on {score.rows} held-out steps R² {score.r2:.4f}, "
        f"error median {score.median_error:.1%}, p99 {score.p99_error:.1%}"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DOTS_PER_INCH)
    pyplot.close(figure)
