"""The parts of RESULTS.md beside capacity: each takes the JSON of one study and says what it found."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.report.capacity_view import name_of
from benchmarks.report.markdown import is_number, number, percent, spread, table

Row = Mapping[str, Any]
PLANNER_ROWS = ((64, 1, 3), (64, 10, 3), (64, 10, 4), (256, 10, 3), (64, 50, 3))  # running, newcomers, tiers
MOST_PLACEMENTS = 6


def fidelity(file: Row, plots: Path) -> list[str]:
    """The simulator against a real node."""
    target, facts = file["target"]["at_most"], file["facts"]
    rows: list[list[str]] = []
    for row in file["rows"]:
        late = number(row["client_late_ms"]["p99"], " ms")
        rows.append([number(row["rate_per_s"]), number(row["counted"]), *_compared(row["real"], row), late])
        if "at_run_speed" in row:
            rows.append(["at the speed of the run", "", *_compared(row["real"], row["at_run_speed"]), ""])
    missed = sum(not row["within_target"] for row in file["rows"])
    count = len(file["rows"])
    result = "met at every rate" if not missed else f"missed at {missed} of {count} rates"
    said = f"Target: medians within {target:.0%}, attainment within {100 * target:.0f} points: {result}."
    if "within_target_at_run_speed" in file:
        missed = sum(not row["at_run_speed"]["within_target"] for row in file["rows"])
        result = "met at every rate" if not missed else f"missed at {missed} of {count} rates"
        said += (
            " The node of a shared machine is not always as fast as it was when measured; with the step times "
            f"of the run itself: {result}."
        )
    return [
        f"The same {facts['scenario']} requests (lengths divided by {facts['lengths_divided_by']:g}) on a real "
        f"node ({facts['engine']}) and on its simulated twin: real / simulated.",
        table(["req/s", "requests", "TTFT p50", "TPOT p50", "promises kept", "client late, p99"], rows),
        said,
    ]


def _compared(real: Row, other: Row) -> list[str]:
    virtual, apart = other["virtual"], other["difference"]
    times = ("ttft_p50_ms", "tpot_p50_ms")
    kept = f"{percent(real['attainment'])} / {percent(virtual['attainment'])}"
    return [
        *(f"{number(real[key])} / {number(virtual[key])} ms ({_signed(apart[key])})" for key in times),
        f"{kept} ({_points(apart['attainment'])})",
    ]


def distserve_facts(file: Row, plots: Path) -> list[str]:
    """DistServe's published placement, made again."""
    published, placements = file["published"], file["placements"]
    best = next(row for row in placements if row["one_of_each"])
    rows = [
        [
            row["placement"],
            str(row["gpus"]),
            number(row["their_search"]),
            number(row["their_draw"]),
            spread(row["our_draws"]),
        ]
        for row in placements[:MOST_PLACEMENTS]
    ]
    headings = [
        "prefill + decode",
        "GPUs",
        "their search and draw",
        "crossing, their draw",
        "crossing, our draws",
    ]
    return [
        f"Published by DistServe's authors: {published['placement']} is best, at {published['per_gpu']} "
        f"requests/s per GPU. Our simulator with their draw: {best['placement']} at "
        f"{number(best['their_search'])} ({_signed(file['error'])}). "
        f"The best {len(rows)} of {len(placements)} placements:",
        table(headings, rows),
        f"The crossing depends on the draw of 300 requests: {len(file['our_seeds'])} draws of ours scatter so.",
    ]


def thousand(file: Row, plots: Path) -> list[str]:
    """Many virtual replicas under one coordinator."""
    asked, inside, load = file["placement_ms"], file["placing_inside_ms"], file["load"]
    target, p99 = file["target_p99_ms"], asked["p99"]
    admitted = file["verdicts"].get("admitted", 0)
    rows = [
        ["placement, asked of the coordinator", number(asked["p50"], " ms"), number(p99, " ms")],
        ["placement, inside the coordinator", number(inside["p50_ms"], " ms"), number(inside["p99_ms"], " ms")],
        ["first token", number(file["ttft_ms"]["p50"], " ms"), number(file["ttft_ms"]["p99"], " ms")],
    ]
    taken = file["loaded"].get("coordinator")
    size = f"{taken['cpu_share']:.0%} of a core, {taken['rss_mib']:.0f} MiB" if taken else ""
    held = f" The coordinator takes {size}." if size else ""
    return [
        f"{file['nodes']:,} virtual replicas, one coordinator, {load['rate']:g} requests/s, "
        f"{file['requests']:,} in all. The engines are virtual, everything else is what serves.",
        table(["", "p50", "p99"], rows),
        f"Target: p99 below {target:g} ms: {_below(p99, target, ' ms')}. "
        f"{file['met']:,} of {admitted:,} admitted promises kept.{held}",
    ]


def endpoint(file: Row, plots: Path) -> list[str]:
    """Our endpoint beside vLLM's own server."""
    rows = [
        [
            f"{cell['model']}, {cell['streams']}",
            number(cell["direct"]["ttft_p50_ms"], " ms"),
            number(cell["ttft_added_p50_ms"], " ms"),
            number(cell["ttft_added_p99_ms"], " ms"),
            f"{cell['tokens_per_s_ratio']:.3f}",
        ]
        for cell in file["cells"]
    ]
    bars = {
        "ttft_added_p50_ms": "TTFT added, p50 (ms)",
        "ttft_added_p99_ms": "TTFT added, p99 (ms)",
        "tokens_per_s_ratio": "tokens/s, ratio",
    }
    said = [
        f"{bars[name]} {'>=' if 'at_least' in goal else '<='} {goal.get('at_least', goal.get('at_most'))}: "
        f"{'met' if goal['met'] else f'missed, the worst is {file[name]:.4g}'}"
        for name, goal in file["targets"].items()
    ]
    headings = ["model, streams", "TTFT p50 direct", "added p50", "added p99", "tokens/s, ratio"]
    return [table(headings, rows), f"Targets: {'; '.join(said)}."]


def planner(file: Row, plots: Path) -> list[str]:
    """What an admission takes."""
    found = {
        (row["running"], row["newcomers"], row["tiers"], row["memory_tight"]): row for row in file["calls"]
    }
    rows = []
    for shape in PLANNER_ROWS:
        pair = [found.get((*shape, tight)) for tight in (False, True)]
        cells = ["-" if row is None else f"{row['p50_ms']:.2f} / {row['p99_ms']:.2f} ms" for row in pair]
        rows.append([", ".join(map(str, shape)), *cells])
    said = [
        f"{name.removesuffix('_ms').replace('_', ' ')} {_below(goal['worst'], goal['below'], ' ms')} "
        f"(target {goal['below']:g})"
        for name, goal in file["targets"].items()
    ]
    headings = ["running, newcomers, tiers", "KV ample: p50 / p99", "KV tight: p50 / p99"]
    return [table(headings, rows), f"Worst of {len(file['calls'])} rows: {'; '.join(said)}."]


def exactness(file: Row, plots: Path) -> list[str]:
    """The planner against judges that share no code with it."""
    count, random, moore = file["instances"], file["random"], file["moore_hodgson"]
    return [
        f"{random['equal']:,} of {count:,} random instances have the best value of their family of plans; "
        f"with one tier {moore['equal']:,} of {count:,} equal Moore and Hodgson's. "
        f"Any batches at all would add at most {1 - random['value_share_at_least']:.1%} of value."
    ]


def steps(file: Row, plots: Path) -> list[str]:
    """Fits of step times."""
    rows = [
        [
            f"`{row['name']}`",
            row["family"],
            f"{row['r2']:.3f}",
            percent(row["median_error"]),
            percent(row["p99_error"]),
            f"{row['compared']['max']['r2']:.3f}",
        ]
        for row in file["tables"]
    ]
    return [
        table(["steps of", "form taken", "R2", "median error", "p99 error", "R2 of a max of lines"], rows),
        "A fifth of the rows is held out, and scored.",
    ]


def lengths(file: Row, plots: Path) -> list[str]:
    """Admission by quantiles of unknown lengths."""
    rows = [
        [
            name,
            percent(ways["quantiles"]["overflowed_share"], 2),
            percent(ways["quantiles"]["value_lost"]),
            percent(ways["max_tokens"]["value_lost"], 0),
        ]
        for name, ways in file["traces"].items()
    ]
    goal = file["targets"]["overflowed_share_worst_trace"]
    return [
        table(["trace", "admitted that overflow", "value lost to an oracle", "by charging max_tokens"], rows),
        f"Target: at most {goal['at_most']:.0%} overflow in every trace: "
        f"{'met' if goal['met'] else 'missed'} ({percent(file['overflowed_share_worst_trace'], 2)}).",
    ]


def speculation(file: Row, plots: Path) -> list[str]:
    """What the published model of drafting gives."""
    rows = [
        [
            f"depth {row['depth']}, {'paced to the TPOT' if row['paced'] else 'full speed'}",
            number(row["published"]),
            number(row["requests_per_s"]),
        ]
        for row in file["rates"]
    ]
    return [table(["chat requests/s where KV binds", "published", "ours"], rows), "Models alone, no engine."]


def demo(file: Row, plots: Path) -> list[str]:
    """`slosserve demo`."""
    kept = [f"{name} {percent(found['attainment'])}" for name, found in sorted(file["attainment"].items())]
    return [
        f"{file['completed']} of {file['requests']} calls completed, {file['errors']} errors, "
        f"{file['tool_calls']} tool calls in {file['agent_sessions']} agent sessions, "
        f"{file['handoffs']} handoffs ({file['kv_bytes'] / 1e6:.0f} MB of KV, "
        f"p50 {number(file['handoff_p50_s'] * 1e3, ' ms')}). "
        f"Promises kept: {', '.join(kept)}."
    ]


def speed(file: Row, plots: Path) -> list[str]:
    """How fast simulated time goes."""
    found = {(row["scenario"], row["system"]): row["simulated_s_per_s_and_replica"] for row in file["rows"]}
    scenarios, systems = (list(dict.fromkeys(key[at] for key in found)) for at in (0, 1))
    rows = [[name, *(number(found.get((name, system))) for system in systems)] for name in scenarios]
    least, target = file["ours_least"], file["target"]
    missed = "met" if least >= target else f"missed by {number(target - least)}"
    return [
        "Simulated seconds per second and replica, a run at a time on a core. Ours runs the code that serves.",
        table(["", *map(name_of, systems)], rows),
        f"Target for ours: at least {target:g}; the least is {number(least)}: {missed}.",
    ]


def _signed(share: Any) -> str:
    return f"{share:+.1%}" if is_number(share) else "-"


def _points(share: Any) -> str:
    return f"{100 * share:+.1f} points" if is_number(share) else "-"


def _below(value: Any, target: float, unit: str) -> str:
    if not is_number(value):
        return "not measured"
    return f"{number(value, unit)}, {'met' if value < target else f'missed by {number(value - target, unit)}'}"


Write = Callable[[Row, Path], Iterable[str]]
