"""The studies of RESULTS.md with pictures: what each part adds, more replicas, a spike, roles that change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report.capacity_view import machine_words, name_of
from benchmarks.report.markdown import NOTHING, image, is_number, number, percent, ratio, table
from benchmarks.report.plots import Bar, Line, Panel, draw_bars, draw_lines
from benchmarks.simulator.world import DRAIN_S

Row = Mapping[str, Any]
MOST_TIMES = 3.0  # longer bars of the ablation are cut


def ablation(file: Row, plots: Path) -> list[str]:
    """Capacity in full over capacity without a part."""
    parts, method = file["parts"], file["method"]
    full, *others = parts
    names = list(parts[full]["scenarios"])
    head = [_held(parts[full]["scenarios"][name]["capacity_per_gpu"]) for name in names]
    rows = [[f"{full}: requests/s per GPU", *head, "", ""]]
    for part in others:
        found = parts[part]
        cells = [_over(found["scenarios"][name]["full_over_this"]) for name in names]
        rows.append([part, *cells, ratio(found["geometric_mean"], "x"), ratio(found["paper"], "x")])
    panels = [
        Panel(name, [bar for part in others for bar in _bar(part, parts[part]["scenarios"][name])],
              limit=1.0, most=MOST_TIMES, xlabel="in full / without")
        for name in names
    ]  # fmt: skip
    machine = machine_words(method["hardware"])
    draw_bars(plots / "ablation.png", panels, f"Capacity in full over capacity without a part, {machine}")
    meant = [f"- {part}: {parts[part]['meaning']}" for part in others if parts[part]["meaning"]]
    greedy = file.get("greedy instead of the DP", {}).get("note")
    return [
        f"Capacity at {percent(method['share'], 0)} in full over that without one part: above 1 the part adds "
        f"capacity. {method['replicas']} GPUs, {machine}, acceptance {method['acceptance']:g}, "
        f"{method['duration_s']:.0f} s, seeds {', '.join(map(str, method['seeds']))}; in brackets the least "
        "and the most of a seed. The paper's column is its own figure.",
        table(["without", *names, "geomean", "paper"], rows),
        *(["\n".join(meant)] if meant else []),
        *([f"Greedy instead of the dynamic program: {greedy}."] if greedy else []),
        image("results/plots/ablation.png", "capacity in full over capacity without each part, with spread"),
    ]


def scaling(file: Row, plots: Path) -> list[str]:
    """Capacity per GPU of more and more replicas."""
    method, found = file["method"], file["scaling"]
    counts = sorted({row["replicas"] for row in found})
    rows, panels = [], []
    for scenario in dict.fromkeys(row["scenario"] for row in found):
        lines = []
        for system in dict.fromkeys(row["system"] for row in found):
            mine = {
                row["replicas"]: row for row in found if (row["scenario"], row["system"]) == (scenario, system)
            }
            held = [_held(mine[count]["per_gpu"]) if count in mine else NOTHING for count in counts]
            times = [
                (count, row["times_one"]["mean"] / count) for count, row in mine.items() if row["times_one"]
            ]
            four = mine.get(4, {}).get("times_one") or {}
            paper = mine.get(4, {}).get("paper") if system == "ours" else None
            rows.append(
                [f"{scenario}, {name_of(system)}", *held, ratio(four.get("mean"), "x"), ratio(paper, "x")]
            )
            known = sorted((count, each) for count, each in times if is_number(each))
            lines.append(Line(name_of(system), [x for x, _ in known], [y for _, y in known], system))
        panels.append(
            Panel(scenario, lines=lines, target=1.0, xlabel="replicas", ylabel="per GPU, against one replica",
                  doubling=True)
        )  # fmt: skip
    draw_lines(plots / "scaling.png", panels, "Capacity per GPU of more replicas (grey: as much as one alone)")
    efforts = [
        f"{count}: {one['seeds']} of {one['duration_s']:.0f} s" for count, one in method["efforts"].items()
    ]
    return [
        f"Requests/s per GPU at {percent(method['share'], 0)}, arrivals {method['arrivals']}, "
        f"{machine_words(method['hardware'])}, nothing drafted: more replicas even bursts out. The last "
        f"columns: four against one, here and in the paper ({method['paper']}). "
        f"Runs by replicas: {'; '.join(efforts)}.",
        table(["", *(f"{count} GPU{'s' * (count > 1)}" for count in counts), "4 / 1", "paper"], rows),
        image("results/plots/scaling.png", "capacity per GPU against one replica, over the number of replicas"),
    ]


def burst(file: Row, plots: Path) -> list[str]:
    """Every system through a spike, at a load that is the same for all and at one of its own."""
    method = file["method"]
    shape = method["shape"]
    parts = [
        f"A steady {shape['scenario']} load, {method['spike']:g} times as much for {shape['spike_s']:g} s, and "
        f"steady again. {method['replicas']} GPUs, "
        f"{machine_words(method['hardware'])}, seeds {', '.join(map(str, method['seeds']))} pooled. "
        "Times are of all who got a token, promised or not."
    ]
    headings = [
        "kept before / spike / after",
        "TTFT p99 in the spike",
        "TPOT p99 in it",
        "best effort completed",
    ]
    for load, meaning in method["loads"].items():
        rows = [_through(row) for row in file["rows"] if row["load"] == load]
        if rows:
            parts.append(
                table(
                    [
                        f"load: {percent(method['load'], 0)} {meaning}",
                        "requests/s per GPU",
                        *headings,
                        "recovered after",
                    ],
                    rows,
                )
            )
    same = [row for row in file["rows"] if row["load"] == next(iter(method["loads"]))]
    spike = (shape["steady_s"], shape["steady_s"] + shape["spike_s"])
    at = "time of arrival [s]"
    panels = [
        Panel("promises kept", lines=_series(same, "attainment"), target=0.9, shaded=spike, xlabel=at),
        Panel("TTFT, p99 [s]", lines=_series(same, "ttft_s"), shaded=spike, log=True, xlabel=at),
        Panel("TPOT, p99 [s]", lines=_series(same, "tpot_s"), shaded=spike, log=True, xlabel=at),
    ]
    draw_lines(plots / "burst.png", panels, "Through a spike (shaded), the same load for all")
    parts.append(image("results/plots/burst.png", "promises kept, p99 TTFT and p99 TPOT through a spike"))
    return parts


def _through(row: Row) -> list[str]:
    before, spike, after = (row["phases"][name] for name in ("before", "spike", "after"))
    kept = " / ".join(percent(phase["attainment"], 0) for phase in (before, spike, after))
    spare = f"{spike['best_effort_completed']:,} of {spike['best_effort']:,}"
    times = [number(spike["ttft_s"]["p99"], " s"), number(spike["tpot_s"]["p99"], " s")]
    recovered = f"{row['recovered_s']:.0f} s" if is_number(row["recovered_s"]) else "not in the run"
    return [name_of(row["system"]), number(row["rate_per_gpu"]), kept, *times, spare, recovered]


def _series(rows: Sequence[Row], what: str, label: str = "system") -> list[Line]:
    """A share, or the p99 of times, over time."""
    lines = []
    for row in rows:
        found = [(one["from_s"], one[what]) for one in row["series"]]
        points = [(at_s, one["p99"] if isinstance(one, Mapping) else one) for at_s, one in found]
        known = [(at_s, value) for at_s, value in points if is_number(value)]
        name = name_of(row["system"]) if label == "system" else str(row[label])
        lines.append(Line(name, [x for x, _ in known], [y for _, y in known], row.get("system", "")))
    return lines


def rebalance(file: Row, plots: Path) -> list[str]:
    """Roles that follow a shift of the mix, beside those that stay."""
    method = file["method"]
    about = (
        f"{method['replicas']} replicas, {machine_words(method['hardware'])}, links {method['link']}. "
        + _shifts(file)
    )
    return [about, *_around_a_shift(file, plots, "rebalance")]


def shift(file: Row, plots: Path) -> list[str]:
    """The same on real engines."""
    method = file["method"]
    about = (
        f"{method['replicas']} vLLM engines with the `{method['model']}` model on "
        f"{file['provenance']['hardware']['cpu']}, every step held to {method['times']:g} times what it takes "
        f"the `{method['held_to']}` model on a core of its own, paces as many times as long; KV goes over "
        "NIXL, and one cluster serves all, its pools resized between runs. " + _shifts(file)
    )
    changed = [
        f"{row['arrangement']}: "
        + ", ".join(f"{one['before']} to {one['after']} after {one['at_s']:.0f} s" for one in row["changes"])
        for row in file["rows"]
        if row["changes"]
    ]
    lost = [f"{row['arrangement']}: {row['errors']}" for row in file["rows"] if row["errors"]]
    return [
        about,
        *_around_a_shift(file, plots, "shift"),
        f"Roles changed: {'; '.join(changed) or 'none'}. Requests without a whole answer when the client left, "
        f"{DRAIN_S:g} s after the last token was due, or turned away: {'; '.join(lost) or 'none'}.",
    ]


def _shifts(file: Row) -> str:
    method = file["method"]
    shift = method["shift"]
    best = ", ".join(f"{name}: {one['best']}" for name, one in file["pools"].items())
    return (
        f"Most requests are {shift['before']} for {shift['half_s']:g} s, then {shift['after']}: "
        f"{method['load']}. The best pools of each alone: {best}. Dip: {method['dip']}."
    )


def _around_a_shift(file: Row, plots: Path, name: str) -> list[str]:
    """The table and the picture."""
    shift = file["method"]["shift"]
    rows = []
    for row in file["rows"]:
        shares = (
            row["before"]["attainment"],
            row["dip"],
            row["after"]["attainment"],
            row["settled"]["attainment"],
        )
        late = (row["after"]["ttft_s"]["p99"], row["after"]["tpot_s"]["p99"])
        rows.append([row["arrangement"], *map(percent, shares), *(number(value, " s") for value in late)])
    panel = Panel("", lines=_series(file["rows"], "attainment", "arrangement"), target=0.9,
                  shaded=(shift["half_s"], 2 * shift["half_s"]), xlabel="time of arrival [s]",
                  ylabel="promises kept")  # fmt: skip
    title = f"Most requests are {shift['before']}, then (shaded) {shift['after']}"
    draw_lines(plots / f"{name}.png", [panel], title, width=8.0)
    return [
        table(["roles", "before", "dip", "after", "settled", "TTFT p99 after", "TPOT p99 after"], rows),
        image(f"results/plots/{name}.png", "promises kept over time while the mix shifts, by arrangement"),
    ]


def _held(rates: Row) -> str:
    return _within(rates, number)


def _over(found: Row) -> str:
    return _within(found, lambda value: ratio(value, "x")) if is_number(found["mean"]) else "held none"


def _within(found: Row, show: Any) -> str:
    middle, least, most = (show(found[key]) for key in ("mean", "least", "most"))
    if middle == NOTHING or least == most:
        return str(middle)
    return f"{middle} ({least} to {most})"


def _bar(part: str, found: Row) -> list[Bar]:
    over = found["full_over_this"]
    if not is_number(over["mean"]):
        return []
    return [Bar(part, over["mean"], min(over["least"], over["mean"]), max(over["most"], over["mean"]), "ours")]
