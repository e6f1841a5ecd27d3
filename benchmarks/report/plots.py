"""Pictures of results: bars with spread, and lines, one panel per scenario. Each system has its own colour."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

DOTS_PER_INCH = 110
PALETTE = 64
COLUMNS = 3
PANEL_WIDTH, PANEL_HEIGHT, BAR_HEIGHT = 3.7, 2.9, 0.26  # inches
# Okabe and Ito: told apart by eyes that see few colours, and in print.
COLOURS = {
    "vllm": "#E69F00",
    "vllm-spec": "#CC79A7",
    "sarathi": "#56B4E9",
    "sarathi-edf": "#0072B2",
    "distserve": "#009E73",
    "ours": "#D55E00",
}
OTHER_COLOUR = "#777777"
OTHER_LINES = ("#000000", "#56B4E9", "#009E73", "#999999", "#CC79A7", "#D55E00", "#0072B2")
HATCHES = {"disaggregated": "////", "mixed": "...."}
DASHES = {"disaggregated": "--", "mixed": ":"}
MARKERS = {"vllm": "o", "vllm-spec": "P", "sarathi": "s", "sarathi-edf": "D", "distserve": "^", "ours": "*"}


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar and its spread. `faint`: a second choice, as a baseline that is not tuned."""

    label: str
    value: float
    least: float
    most: float
    system: str = ""
    mode: str = ""
    faint: bool = False


@dataclass(frozen=True, slots=True)
class Line:
    """Points in order of x."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    system: str = ""
    mode: str = ""


@dataclass(frozen=True, slots=True)
class Panel:
    """Bars or lines. `limit`: a value of x that nothing can pass, `target` a share of y to be held.

    `most`: where long bars are cut, with their value written on. `shaded` is a stretch of x that matters,
    `log`: y over powers of ten, `doubling`: x over powers of two.
    """

    title: str
    bars: Sequence[Bar] = ()
    lines: Sequence[Line] = ()
    limit: float | None = None
    target: float | None = None
    most: float | None = None
    shaded: tuple[float, float] | None = None
    xlabel: str = ""
    ylabel: str = ""
    log: bool = False
    doubling: bool = False


def draw_bars(path: Path, panels: Sequence[Panel], title: str) -> None:
    """Horizontal bars from 0, in the order given; each label has the same place in every panel."""
    labels = list(dict.fromkeys(bar.label for panel in panels for bar in panel.bars))
    figure, axes = _figure(len(panels), 0.9 + BAR_HEIGHT * len(labels))
    for at, (axis, panel) in enumerate(zip(axes, panels, strict=True)):
        for bar in panel.bars:
            axis.barh(
                labels.index(bar.label),
                bar.value,
                xerr=[[bar.value - bar.least], [bar.most - bar.value]] if bar.least < bar.most else None,
                color=COLOURS.get(bar.system, OTHER_COLOUR),
                hatch=HATCHES.get(bar.mode),
                alpha=0.45 if bar.faint else 1.0,
                edgecolor="white" if bar.mode in HATCHES else "none",
                error_kw={"elinewidth": 1.2, "capsize": 2.5, "ecolor": "#222222"},
                height=0.8,
            )
        if panel.limit is not None:
            axis.axvline(panel.limit, color="k", linestyle="--", linewidth=1)
        axis.set_yticks(range(len(labels)), labels if at % COLUMNS == 0 else [""] * len(labels))
        axis.tick_params(axis="y", length=0)
        axis.set_ylim(len(labels) - 0.4, -0.6)
        axis.set_xlim(left=0)
        if panel.most is not None and axis.get_xlim()[1] > panel.most:
            axis.set_xlim(right=panel.most)
            for bar in panel.bars:
                if bar.value > panel.most:
                    place = (panel.most, labels.index(bar.label))
                    axis.annotate(
                        f"{bar.value:.3g} ", place, ha="right", va="center", color="white", fontsize=8
                    )
        _finish(axis, panel)
    _save(figure, path, title)


def draw_lines(path: Path, panels: Sequence[Panel], title: str, width: float = PANEL_WIDTH) -> None:
    """Lines over x, one legend for all panels."""
    figure, axes = _figure(len(panels), PANEL_HEIGHT, width)
    shown: dict[str, Any] = {}
    for axis, panel in zip(axes, panels, strict=True):
        if panel.shaded is not None:
            axis.axvspan(*panel.shaded, color="0.9", zorder=0)
        if panel.limit is not None:
            shown.setdefault(
                "bound, lengths unknown", axis.axvline(panel.limit, color="k", linestyle="--", linewidth=1)
            )
        if panel.target is not None:
            axis.axhline(panel.target, color="0.45", linewidth=0.8)
        for at, line in enumerate(panel.lines):
            (drawn,) = axis.plot(
                line.x,
                line.y,
                color=COLOURS.get(line.system, OTHER_LINES[at % len(OTHER_LINES)]),
                linestyle=DASHES.get(line.mode, "-"),
                marker=MARKERS.get(line.system, "o") if len(line.x) < 20 else None,
                markersize=7 if line.system == "ours" else 4,
                linewidth=2 if line.system == "ours" else 1.3,
            )
            shown.setdefault(line.label, drawn)
        if panel.log:
            axis.set_yscale("log")
        if panel.doubling:
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter("{x:g}")
            axis.set_ylim(bottom=0)
        _finish(axis, panel)
    if len(shown) > 1:
        figure.legend(
            shown.values(), shown.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=9
        )
    _save(figure, path, title)


def draw_splits(path: Path, rows: Sequence[tuple[str, float, str]], unit: str, title: str) -> None:
    """How well splits of GPUs do (name, value, the value in words), the best on top."""
    figure, axes = _figure(1, 1.2 + BAR_HEIGHT * len(rows), width=7.5)
    for at, (_, value, words) in enumerate(rows):
        axes[0].barh(at, value, color=OTHER_COLOUR if at else COLOURS["ours"], height=0.8)
        axes[0].annotate(words, (value, at), (4, 0), textcoords="offset points", va="center", fontsize=9)
    axes[0].set_yticks(range(len(rows)), [name for name, *_ in rows])
    axes[0].invert_yaxis()
    axes[0].set_xlim(0, 1.15 * max(max(value for _, value, _ in rows), 1e-9))
    _finish(axes[0], Panel("", xlabel=unit))
    _save(figure, path, title)


def _figure(panels: int, height: float, width: float = PANEL_WIDTH) -> tuple[Any, list[Any]]:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    columns = min(panels, COLUMNS)
    rows = -(-panels // columns)
    size = (max(columns * width, 6.0), rows * height + 0.7)
    figure, axes = pyplot.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    flat = list(axes.flat)
    for axis in flat[panels:]:
        axis.set_axis_off()
    return figure, flat[:panels]


def _finish(axis: Any, panel: Panel) -> None:
    axis.set_title(panel.title, fontsize=10)
    axis.set_xlabel(panel.xlabel, fontsize=9)
    axis.set_ylabel(panel.ylabel, fontsize=9)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def _save(figure: Any, path: Path, title: str) -> None:
    from matplotlib import pyplot

    figure.suptitle(title.replace("`", ""), fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix != ".png":
        figure.savefig(path)
    else:
        from PIL import Image

        drawn = BytesIO()
        figure.savefig(drawn, dpi=DOTS_PER_INCH)
        # A palette makes files a third as large; no date or version: the same figures make the same picture.
        flat = Image.open(drawn).convert("RGB").quantize(PALETTE, dither=Image.Dither.NONE)
        flat.save(path, optimize=True)
    pyplot.close(figure)
