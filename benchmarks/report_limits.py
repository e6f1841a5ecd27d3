"""What limits us: how far ours is from the bound and from the best rival, and how that shows."""

from __future__ import annotations

from benchmarks.capacity_view import HEAD_SHARE, Row, View, geomean, key_of, name_of
from benchmarks.markdown import NOTHING, mean, percent, ratio, table
from benchmarks.scenarios import SCENARIOS

BOUND_TARGET, DEFAULT_TARGET, TUNED_TARGET = 0.9, 2.2, 1.0
MOST_BROKEN = 0.02  # of what was admitted: above, promises were broken rather than not made
PART_WORDS = {
    "tokens": "computing tokens",
    "floor": "the floor of steps, shared by as many requests as KV memory holds",
    "drafts": "drafting",
    "attention": "attention over long contexts",
}


def targets(view: View) -> str:
    """The three that were set, beside what came out."""
    names = view.scenarios
    of_bound = {name: value for name in names if (value := view.of_bound(name)) is not None}
    over_default = {name: value for name in names if (value := view.over(name, "default")) is not None}
    over_tuned = {name: value for name in names if (value := view.over(name, "tuned")) is not None}
    worst = min(over_tuned, key=lambda name: over_tuned[name], default="")
    average, defaults, least = mean(of_bound.values()), geomean(over_default.values()), over_tuned.get(worst)
    rows = [
        [
            "share of the length-blind bound, mean",
            f">= {BOUND_TARGET:.2f}",
            ratio(average),
            verdict(average, BOUND_TARGET),
        ],
        [
            "over the best default, geometric mean",
            f">= {DEFAULT_TARGET}x",
            times(defaults),
            verdict(defaults, DEFAULT_TARGET, "x"),
        ],
        [
            f"over the best tuned baseline, the worst scenario{f' ({worst})' if worst else ''}",
            f">= {TUNED_TARGET}x",
            times(least),
            verdict(least, TUNED_TARGET, "x"),
        ],
        [
            "over the best tuned baseline, geometric mean",
            NOTHING,
            times(geomean(over_tuned.values())),
            NOTHING,
        ],
    ]
    told = table(["ours, best mode", "target", "measured", ""], rows)
    if len(names) < len(SCENARIOS):
        told += f"\n\nOnly {len(names)} of the {len(SCENARIOS)} scenarios have been run: {', '.join(names)}."
    return told


def limits(file: Row, view: View) -> str:
    """Per scenario: how far from the bound and the best rival, what the work is made of, and how it shows."""
    bounds = {
        row["scenario"]: row
        for row in file.get("bounds", [])
        if (row["hardware"], row["acceptance"]) == (view.hardware, view.acceptance)
    }
    lines, said = [], []
    for name in view.scenarios:
        of_bound, over = view.of_bound(name), view.over(name, "tuned")
        parts = bounds.get(name, {}).get("parts") or {}
        short = verdict(of_bound, BOUND_TARGET)
        shown = ", ".join(f"{part} {percent(value, 0)}" for part, value in _largest(parts) if value >= 0.005)
        lines.append([name, ratio(of_bound), short, times(over), verdict(over, 1.0, "x"), shown or NOTHING])
        said += [f"- **{name}**: {text}" for text in [_why(file, view, name, parts)] if text]
    columns = [
        "",
        "ours / bound",
        f"target {BOUND_TARGET:.2f}",
        "ours / best tuned",
        "target 1.0x",
        "work of the bound",
    ]
    return table(columns, lines) + ("\n\n" + "\n".join(said) if said else "")


def _why(file: Row, view: View, name: str, parts: Row) -> str:
    """Sentences on a scenario that misses a target."""
    of_bound, over, ours = view.of_bound(name), view.over(name, "tuned"), view.ours(name)
    said = []
    if of_bound is not None and of_bound < BOUND_TARGET:
        said.append(f"{of_bound:.2f} of the bound, {BOUND_TARGET - of_bound:.2f} short.")
        most = _largest(parts)
        said += [f"Most of the work there is {PART_WORDS.get(most[0][0], most[0][0])}."] if most else []
    if over is not None and over < 1:
        rival = view.rival(name, "tuned")
        label = "" if rival is None else name_of(rival["system"])
        said.append(f"{1 - over:.0%} below {label}, the best tuned.")
    if not said or ours is None:
        return " ".join(said)
    return " ".join([*said, *_at_load(file, view, ours)])


def _at_load(file: Row, view: View, ours: Row) -> list[str]:
    """How it shows at the highest fixed rate: promises not made, or made and broken."""
    rows = [
        row
        for row in file.get("fixed_rates", [])
        if (row["scenario"], row["hardware"], *key_of(row)) == (ours["scenario"], view.hardware, *key_of(ours))
    ]
    full = max(rows, key=lambda row: row["fraction"], default=None)
    if full is None:
        return []
    attained, kept = mean(full["attainment"]), mean(full["admitted_kept"])
    if attained is None or kept is None:
        return []
    rate = f"At {full['fraction']:.1f} of the bound"
    text = f"{rate} {attained:.1%} of all requests are kept, {kept:.1%} of those admitted"
    if attained >= HEAD_SHARE:
        return [f"{text}."]
    broken = kept < 1 - MOST_BROKEN
    return [f"{text}: {'promises are broken' if broken else 'the rest was not promised, rather than broken'}."]


def verdict(value: float | None, target: float, unit: str = "") -> str:
    """`met`, or by how much it is missed."""
    if value is None:
        return NOTHING
    return "met" if value >= target else f"**missed by {ratio(target - value, unit)}**"


def times(value: float | None) -> str:
    return ratio(value, "x")


def _largest(parts: Row) -> list[tuple[str, float]]:
    return sorted(parts.items(), key=lambda part: -part[1])
