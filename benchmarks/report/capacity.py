"""The tables and pictures of RESULTS.md that are made of capacity.json."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.report.capacity_view import (
    HEAD_SHARE,
    Row,
    View,
    geomean,
    key_of,
    label_of,
    machine_words,
    name_of,
)
from benchmarks.report.limits import times
from benchmarks.report.markdown import (
    NOTHING,
    image,
    is_number,
    mean,
    number,
    origin,
    percent,
    ratio,
    source,
    spread,
    table,
)
from benchmarks.report.plots import Bar, Line, Panel, draw_bars, draw_lines
from benchmarks.simulator.systems import DESIGNS, MODES, OURS_NAME

COMMAND = "slosserve bench capacity"


def capacity_table(view: View, file: Row, names: Sequence[str]) -> str:
    """Systems down, scenarios across: requests a second and GPU, with ratios below."""
    lines = []
    top = {
        name: max((row["mean"] for row in view.rows if row["scenario"] == name), default=0) for name in names
    }
    for key in view.keys:
        cells = []
        for name in names:
            row = view.at(name, key)
            text = NOTHING if row is None else spread(row["per_seed"])
            cells.append(f"**{text}**" if row is not None and row["mean"] == top[name] > 0 else text)
        lines.append([label_of(key, view.acceptance), *cells, ""])
    if view.share == HEAD_SHARE:
        lines.append(["*bound, lengths unknown*", *[number(view.blind.get(name)) for name in names], ""])
        shares = [view.of_bound(name) for name in names]
        lines.append(["ours / bound", *map(ratio, shares), f"{ratio(mean(shares))} mean"])
        if view.kept:
            bounds = [number(view.kept.get(name)) for name in names]
            lines.append(["*bound, and nobody given up*", *bounds, ""])
            shares = [view.of_kept(name) for name in names]
            lines.append(["ours / that bound", *map(ratio, shares), f"{ratio(mean(shares))} mean"])
    for column, text in (("tuned", "ours / best tuned"), ("default", "ours / best default")):
        ratios = [view.over(name, column) for name in names]
        average = geomean(ratio for ratio in ratios if ratio is not None)
        lines.append([text, *map(times, ratios), f"{times(average)} geomean"])
    told = table(["requests/s per GPU", *names, "mean"], lines)
    seeds = sorted({seed for row in view.rows for seed in row["seeds"]})
    gpus = "/".join(str(count) for count in sorted({row["gpus"] for row in view.rows}))
    lasts = "/".join(f"{one:g}" for one in sorted({row["seconds"] for row in view.rows if "seconds" in row}))
    ran_on = f"{machine_words(view.hardware)}, {gpus} GPUs" + (f"; {lasts} s of arrivals" if lasts else "")
    rows = [row for row in view.rows if row["scenario"] in names]
    return f"{told}\n\n{source(in_parts(file, rows), ran_on, seeds)}"


def in_parts(file: Row, rows: Sequence[Row]) -> Row:
    """The origin of these rows of a file that several runs have filled: their commits, and no run's words."""
    commits: dict[str, list[Row]] = {}
    for row in rows:
        if row.get("commit"):
            commits.setdefault(str(row["commit"]), []).append(row)
    if not commits:
        return file
    most, *others = sorted(commits, key=lambda commit: -len(commits[commit]))
    told = [most, *(f"{_words(commits[commit])} {commit}" for commit in others)]
    return {**origin(file), "command": COMMAND, "commit": ", ".join(told)}


def _words(rows: Sequence[Row]) -> str:
    systems = "slosserve" if all(row["system"] == OURS_NAME for row in rows) else "some"
    return f"{systems} in {', '.join(dict.fromkeys(row['scenario'] for row in rows))}"


def tuning_table(view: View) -> str:
    """What tuning chose."""
    names = [*view.scenarios, *view.traces]
    rows = []
    for key in view.keys:
        found = [view.at(name, key) for name in names]
        if key[2] == "tuned":
            words = [NOTHING if row is None else row["tuning"] for row in found]
            rows.append([label_of(key, view.acceptance), *words])
    told = table(["", *names], rows)
    return f"<details><summary>What tuning chose</summary>\n\n{told}\n\n</details>"


def heading(view: View) -> str:
    """Of a table."""
    drafts = (
        "" if view.acceptance is None else f", with speculation (a draft is right with {view.acceptance:g})"
    )
    return f"Capacity at {view.share:.0%}{drafts}: {machine_words(view.hardware)}"


def fixed_rates(file: Row, name: str) -> str | None:
    """Attainment at equal rates, where a capacity is ill-conditioned. None if this scenario has none."""
    rows = [row for row in file.get("fixed_rates", []) if row["scenario"] == name]
    if not rows:
        return None
    fractions = sorted({row["fraction"] for row in rows})
    last = fractions[-1]
    lines = []
    for key in sorted(
        {key_of(row) for row in rows}, key=lambda k: (list(DESIGNS).index(k[0]), MODES.index(k[1]))
    ):
        found = {row["fraction"]: row for row in rows if key_of(row) == key}
        cells = [spread(found.get(fraction, {}).get("attainment"), percent) for fraction in fractions]
        full = found.get(last, {})
        shares = [
            percent(mean(full.get(what))) for what in ("attainment_strict", "goodput_share", "admitted_kept")
        ]
        times = [number(mean(full.get(what)), " s") for what in ("ttft_p99_s", "tpot_p99_s")]
        lines.append([label_of(key, None), *cells, *shares, *times])
    rates = {row["fraction"]: row["rate_per_gpu"] for row in rows}
    kept = [f"kept at {fraction:.1f} ({number(rates[fraction])}/s)" for fraction in fractions]
    further = ["strict", "vLLM's goodput", "admitted and kept", "TTFT p99", "TPOT p99"]
    bounded = {row["fraction"]: row["bound_attainment"] for row in rows if row.get("bound_attainment")}
    if bounded:
        cells = [spread(bounded.get(fraction), percent) for fraction in fractions]
        lines.append(["*bound: lengths and future known*", *cells, *[""] * 5])
    return table(
        [f"{name}, at a share of the bound", *kept, *(f"{what} at {last:.1f}" for what in further)], lines
    )


def draw_capacity(view: View, path: Path) -> str:
    """Bars with spread. Returns the markdown that shows them."""
    panels = []
    for name in view.scenarios:
        bars = []
        for key in view.keys:
            row = view.at(name, key)
            if row is not None and is_number(row["mean"]):
                default = key[2] == "default"
                bars.append(
                    Bar(
                        label_of(key, view.acceptance),
                        row["mean"],
                        row["least"],
                        row["most"],
                        key[0],
                        key[1],
                        default,
                    )
                )
        panels.append(Panel(name, bars, limit=view.blind.get(name), xlabel="requests/s per GPU"))
    title = f"{heading(view)} (dashed: bound, lengths unknown; pale: default)"
    draw_bars(path, panels, title)
    return image(f"results/plots/{path.name}", f"{heading(view)}: bars per system and scenario, with spread")


def draw_attainment(file: Row, view: View, path: Path) -> str | None:
    """Attainment against rate, from the fixed rates and the capacities. None if there are no fixed rates."""
    rows = [row for row in file.get("fixed_rates", []) if row["hardware"] == view.hardware]
    panels = [
        Panel(
            name,
            lines=_attained(file, view, name, [row for row in rows if row["scenario"] == name]),
            limit=view.blind.get(name),
            target=HEAD_SHARE,
            xlabel="requests/s per GPU",
            ylabel="promises kept",
        )
        for name in view.scenarios
        if any(row["scenario"] == name for row in rows)
    ]
    if not panels:
        return None
    draw_lines(
        path, panels, f"Promises kept against rate, tuned: {machine_words(view.hardware)} (grey line: 90 %)"
    )
    return image(f"results/plots/{path.name}", "promises kept against rate, one panel per scenario")


def _attained(file: Row, view: View, name: str, rows: Sequence[Row]) -> list[Line]:
    ours = view.ours(name)
    lines = []
    for key in view.keys:
        system, mode, column, _ = key
        if column != "tuned" or (system == OURS_NAME and (ours is None or key != key_of(ours))):
            continue
        points = [(row["rate_per_gpu"], mean(row["attainment"])) for row in rows if key_of(row) == key]
        points += [
            (row["mean"], row["share"])
            for row in file["rows"]
            if (row["hardware"], row["scenario"]) == (view.hardware, name)
            and key_of(row) == key
            and row["mean"]
        ]
        known = sorted((x, y) for x, y in points if is_number(x) and y is not None)
        label = "slosserve, best mode" if system == OURS_NAME else name_of(system)
        lines.append(
            Line(
                label, [x for x, _ in known], [y for _, y in known], system, mode if system != OURS_NAME else ""
            )
        )
    return lines
