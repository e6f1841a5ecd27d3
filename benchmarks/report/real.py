"""The part of RESULTS.md about real engines: ours beside vLLM as it ships, and what was kept under load."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.real.systems import SYSTEMS
from benchmarks.report.markdown import NOTHING, image, mean, number, percent, ratio, table
from benchmarks.report.plots import Line, Panel, draw_lines

Row = Mapping[str, Any]
TARGETS = (
    ("over the best of vLLM as it comes", "geomean_vs_stock_default", "at least 1.5x", 1.5),
    ("over the best of vLLM tuned", "geomean_vs_stock_tuned", "-", None),
    ("worst scenario, over the tuned", "worst_ratio", "at least 1.00x", 1.0),
)
LOADS_NOTE = (
    "Planning: of the time of a step (target at most 3 %). Steps over profile: seconds that they took, over "
    "those that the profile gives for the same batches; it was measured with nothing else on the machine, and "
    "the simulator, which serves by it, does not know that they take longer beside a busy client and endpoint."
)
# Colours of the simulated systems that these are of the family of.
FAMILY = {"distserve": "distserve", "sarathi": "vllm", "ours": "ours"}


def real(file: Row, plots: Path) -> list[str]:
    """From the headline to every load."""
    parts = [
        _setting(file["method"]),
        table(["geometric mean of ours", "figure", "target", ""], list(map(_target, TARGETS, [file] * 3))),
        _kept(file),
        table(
            ["", "settings", "requests/s at 90 %", "over vLLM", "over tuned", "simulator", "arrivals"],
            [_capacity(row, file) for row in file["rows"]],
        ),
        _measured_on(file["rows"]),
    ]
    if file["loads"]:
        headings = [
            "ours",
            "load",
            "requests/s",
            "attained",
            "admitted",
            "admitted and kept",
            "best effort done",
            "planning",
            "steps over profile",
        ]
        parts.append(table(headings, [_load(row) for row in file["loads"]]))
        parts.append(LOADS_NOTE)
    if file["windows"]:
        name = f"{_name(file)}.png"
        draw_lines(plots / name, _panels(file["windows"]), "Real engines: promises kept over the rate")
        parts.append(image(f"results/plots/{name}", "attainment against rate on real engines, by scenario"))
    return parts


def agents(file: Row, plots: Path) -> list[str]:
    """Loops of tool calls: with sessions, without, and on stock vLLM."""
    loads = list(dict.fromkeys(row["load"] for row in file["rows"]))
    rows = [_agents_row(file, way, load) for load in loads for way in file["ways"]]
    at, found = file["compared_at_load"], file["slower_than_without_sessions"]
    reused, p99 = file["prompt_tokens_reused_share"], file["loop_p99_ratio_vs_stock"]
    aims = file["targets"]
    where = f"simulated replicas ({file['measured_on']['device']})" if file.get("simulated") else "real engines"
    text = (
        f"Loops of 2 to 8 calls with tools of 0.2 to 5 s between them, on {file['engines']} {where}; the "
        "seconds of a loop are without those of its tools. Reused: of the prompt tokens that had been computed "
        "before, in whole blocks, those that no engine computed again."
    )
    text += _paces(file.get("tpot_scale"))
    compared = [
        ["prompt tokens reused", percent(reused, 1), f"at least {aims['prompt_tokens_reused_share']:.0%}"],
        ["p99 of a loop, over vLLM's", ratio(p99, "x"), f"at most {aims['loop_p99_ratio_vs_stock']:g}x"],
        ["loops slower by more than 5 % with sessions", f"{found['slower']} of {found['loops']}", "none"],
    ]
    headings = ["load", "loops/s", "", "p50", "p99", "reused", "calls kept", "loops kept", "errors"]
    return [
        text,
        f"At a load of {number(at)}, the highest of which vLLM keeps 90 % (else the lowest):",
        table(["", "figure", "target"], compared),
        table(headings, rows),
    ]


def _agents_row(file: Row, way: str, load: float) -> list[str]:
    rows = [row for row in file["rows"] if (row["way"], row["load"]) == (way, load)]
    if not rows:
        return [number(load), NOTHING, file["ways"][way], *[NOTHING] * 6]
    p50, p99 = (mean([row["loop_s"][key] for row in rows]) for key in ("p50", "p99"))
    shares = (mean([row[key] for row in rows]) for key in ("reused_share", "attainment", "loop_attainment"))
    seconds = [NOTHING if value is None else f"{number(value)} s" for value in (p50, p99)]
    return [
        number(load),
        number(rows[0]["rate_per_s"]),
        file["ways"][way],
        *seconds,
        *(percent(share, 1) for share in shares),
        str(sum(row["errors"] for row in rows)),
    ]


def same_tokens(file: Row, _: Path) -> list[str]:
    """Whether ours says what stock vLLM says, and what was done to the batches meanwhile."""
    kinds = list(file["rows"][0]["happened"])
    rows = [
        [
            row["dtype"],
            *(f"{row[key]} of {row['prompts']}" for key in ("equal", "vllm_equal_to_itself")),
            *(f"{row['happened'][kind]:,}" for kind in kinds),
        ]
        for row in file["rows"]
    ]
    return [
        "Prompts at temperature 0, one at a time by vLLM's own server, and all at once by our prefill and "
        "decode node with little memory, small batches and n-gram drafts. In bfloat16 tokens of a model with "
        "random weights tie often, and which one wins depends on the shape of the batch: the second column is "
        "vLLM's own server beside itself, one at a time and all at once.",
        table(["", "equal", "vLLM to itself", *(kind.replace("_", " ") for kind in kinds)], rows),
    ]


def same_goodput(file: Row, _: Path) -> list[str]:
    """Whether vLLM's own client and our scorecard call the same requests good."""
    rows = [
        [
            number(row["rate_per_s"]),
            f"{row['requests']:,}",
            *(f"{row[f'good_by_{side}']:,}" for side in ("client", "scorecard")),
            percent(row["difference"], 1),
        ]
        for row in file["rows"]
    ]
    met = "met" if file["target"]["met"] else "missed"
    slo = file["slo"]
    return [
        "`vllm.benchmarks.serve --goodput`, as vLLM ships it, asks our endpoint; the scorecard reads the same "
        f"definition there (TTFT at most {slo['ttft_ms']:g} ms, mean TPOT at most {slo['tpot_ms']:g} ms, no "
        f"tolerance). They are at most {percent(file['target']['at_most'], 0)} of the requests apart: {met}.",
        table(["requests/s", "requests", "good by vLLM's client", "good by our scorecard", "apart"], rows),
    ]


def _name(file: Row) -> str:
    return "real_gpu" if file["method"].get("site") == "gpu" else "real"


def _setting(method: Row) -> str:
    if method.get("site") == "gpu":
        where = f"a GPU of its own ({', '.join(sorted(set(method['devices'])))})"
        lengths = "lengths as they are"
    else:
        where, lengths = "a core of its own", f"lengths divided by {method['lengths_divided_by']:g}"
    text = (
        f"vLLM engines with the `{method['model']}` model, each on {where}, asked over HTTP by a client in a "
        f"process of its own; {lengths}. Latency counts from when a request should have been sent. Requests "
        "come smoothly on one engine, in bursts (gamma, CV 3) on two. Nothing is drafted unless it says so. "
        "Where tuning finds nothing better than what ships, its row is that of the system as it comes."
    )
    text += _paces(method.get("tpot_scale"))
    if method.get("site") != "gpu":
        text += " Two engines on two cores leave none to client and endpoint: there only ratios count."
    return text


def _paces(times: float | None) -> str:
    if times in (None, 1.0):
        return ""
    return (
        f" Paces are {times:g} times those of the SLO classes: a step takes that much longer here at the least."
    )


def _target(target: tuple[str, str, str, float | None], file: Row) -> list[str]:
    name, key, words, least = target
    value = file[key]
    met = NOTHING if value is None or least is None else "met" if value >= least else "missed"
    return [name, ratio(value, "x"), words, met]


def _kept(file: Row) -> str:
    least, kept = percent(file["admitted_kept"]), percent(file["admitted_kept_in_all"])
    twice = ratio(file["kept_at_twice"])
    drafting = ratio(file["geomean_with_drafts"], "x")
    return (
        f"Of what was admitted on one engine, in every window up to twice its capacity, {least} or more met "
        f"every stage, {kept} in all of them together (target 99 %). At twice capacity {twice} as much was "
        "kept a second as at capacity, or more (target 0.9). "
        f"With n-gram drafts on both sides: {drafting} (random weights repeat themselves, so drafts are right "
        "more often than on real text)."
    )


def _capacity(row: Row, file: Row) -> list[str]:
    cell = f"{row['scenario']} on {row['engines']}"
    held = number(row["mean"])
    if row["least"] != row["most"]:
        held += f" ({number(row['least'])} to {number(row['most'])})"
    over = [
        ratio(_over(row, file["rows"], tuned=tuned), "x") if row["ours"] else ""  # its own, not its best mode's
        for tuned in (False, True)
    ]
    label = SYSTEMS[row["system"]].label
    return [f"{cell}: {label}", row["tuning"], held, *over, number(row["predicted"]), row["arrivals"]]


def _measured_on(rows: Iterable[Row]) -> str:
    """Which cells were measured where: not all of them in one run."""
    places: dict[str, list[str]] = {}
    for row in rows:
        on = row["measured_on"]
        place = f"{on['device']}, commit {on['commit']}, {on['date']}"
        cell = f"{row['scenario']} on {row['engines']}"
        if cell not in places.setdefault(place, []):
            places[place].append(cell)
    return "\n".join(f"- Measured on {place}: {', '.join(cells)}." for place, cells in places.items())


def _over(row: Row, rows: Iterable[Row], *, tuned: bool) -> float | None:
    """Over the best stock system of the cell that drafts if this one does."""
    same = ("scenario", "engines")
    stock = [
        float(one["mean"])
        for one in rows
        if not one["ours"] and all(one[key] == row[key] for key in same)
        and bool(one["drafts"]) == bool(row["drafts"]) and (tuned or not one["tuned"])
    ]  # fmt: skip
    best = max(stock, default=0.0)
    return float(row["mean"]) / best if best > 0 else None


def _load(row: Row) -> list[str]:
    return [
        f"{row['scenario']} on {row['engines']}: {SYSTEMS[row['system']].label}",
        ratio(row["load"], "x"),
        number(row["rate_per_s"]),
        percent(row["attainment"]),
        f"{row['admitted']:,} of {row['counted']:,}",
        percent(row["admitted_kept"]),
        # Of all that was not promised: what has said nothing yet when a window is closed has no verdict either.
        f"{row['best_effort_completed']:,} of {row['counted'] - row['admitted']:,}",
        percent(row["planning_share"], 1),
        ratio(row.get("steps_over_profile"), "x"),
    ]


def _panels(windows: Sequence[Row]) -> list[Panel]:
    panels = []
    for cell in dict.fromkeys((row["scenario"], row["engines"]) for row in windows):
        mine = [row for row in windows if (row["scenario"], row["engines"]) == cell]
        names = [name for name in dict.fromkeys(row["system"] for row in mine) if not SYSTEMS[name].drafts]
        lines = [_line(name, [row for row in mine if row["system"] == name]) for name in names]
        panels.append(
            Panel(f"{cell[0]} on {cell[1]}", lines=lines, target=0.9, xlabel="requests/s", ylabel="kept")
        )
    return panels


def _line(name: str, windows: Sequence[Row]) -> Line:
    """The mean over seeds, at each rate that was asked for."""
    kept: dict[float, list[float]] = {}
    for row in windows:
        kept.setdefault(row["asked_per_s"], []).append(row["attainment"] or 0.0)
    points = sorted((rate, sum(each) / len(each)) for rate, each in kept.items())
    system = SYSTEMS[name]
    mode = system.mode if system.mode != "colocated" else ""
    return Line(system.label, [x for x, _ in points], [y for _, y in points], FAMILY[system.design], mode)
