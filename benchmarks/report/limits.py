"""What limits us: how far ours is from the bound and from the best rival, and how that shows."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.capacity_cell import BURSTY
from benchmarks.report.capacity_view import HEAD_SHARE, Row, View, geomean, key_of, machine_words, name_of
from benchmarks.report.markdown import NOTHING, mean, percent, ratio, table
from benchmarks.scenarios import SCENARIOS
from benchmarks.simulator.systems import OURS_NAME

BOUND_TARGET, DEFAULT_TARGET, TUNED_TARGET = 0.9, 2.2, 1.0
MOST_BROKEN = 0.02  # of what was admitted: above, promises were broken rather than not made
PART_WORDS = {
    "tokens": "computing tokens",
    "floor": "the floor of steps, shared by as many requests as KV memory holds",
    "drafts": "drafting",
    "attention": "attention over long contexts",
}


@dataclass(frozen=True, slots=True)
class Headline:
    """What the targets are about; None where nothing was run. `worst`: the scenario of `least_over_tuned`."""

    of_bound: float | None
    over_default: float | None
    over_tuned: float | None
    least_over_tuned: float | None
    worst: str

    @classmethod
    def of(cls, view: View) -> Headline:
        """Over the six scenarios, as far as they were run."""
        tuned = {name: over for name in view.scenarios if (over := view.over(name, "tuned")) is not None}
        default = [over for name in view.scenarios if (over := view.over(name, "default")) is not None]
        worst = min(tuned, key=lambda name: tuned[name], default="")
        of_bound = mean([view.of_bound(name) for name in view.scenarios])
        return cls(of_bound, geomean(default), geomean(tuned.values()), tuned.get(worst), worst)


def targets(view: View, drafted: View | None) -> str:
    """The three that were set, beside what came out, and the same with speculation."""
    found, fast = Headline.of(view), None if drafted is None else Headline.of(drafted)
    worst = f"over the best tuned baseline, the worst scenario ({found.worst or NOTHING})"
    average = verdict(found.of_bound, BOUND_TARGET)
    rows = [
        ["share of the length-blind bound, mean", f">= {BOUND_TARGET:.2f}", ratio(found.of_bound), average],
        [
            "over the best default, geometric mean",
            f">= {DEFAULT_TARGET}x",
            times(found.over_default),
            verdict(found.over_default, DEFAULT_TARGET, "x"),
        ],
        [
            worst,
            f">= {TUNED_TARGET}x",
            times(found.least_over_tuned),
            verdict(found.least_over_tuned, TUNED_TARGET, "x"),
        ],
        ["over the best tuned baseline, geometric mean", NOTHING, times(found.over_tuned), NOTHING],
    ]
    headings = ["ours, best mode", "target", "measured", ""]
    if fast is not None:
        least = f"{times(fast.least_over_tuned)} ({fast.worst})" if fast.worst else NOTHING
        shown = [ratio(fast.of_bound), times(fast.over_default), least, times(fast.over_tuned)]
        headings.append("both with speculation")
        rows = [[*row, cell] for row, cell in zip(rows, shown, strict=True)]
        assert drafted is not None
        over = [each for name in drafted.scenarios if (each := drafted.over_undrafted(name)) is not None]
        rows.append(
            [
                "with speculation over the best default, which has none (the paper compares so), geo. mean",
                f">= {DEFAULT_TARGET}x",
                times(geomean(over)),
                verdict(geomean(over), DEFAULT_TARGET, "x"),
                NOTHING,
            ]
        )
    told = table(headings, rows)
    names = view.scenarios
    if len(names) < len(SCENARIOS):
        told += f"\n\nOnly {len(names)} of the {len(SCENARIOS)} scenarios have been run: {', '.join(names)}."
    return told


def elsewhere(view: View) -> str:
    """The same figures on another machine, in a sentence."""
    found = Headline.of(view)
    least, worst = times(found.least_over_tuned), found.worst or NOTHING
    against = verdict(found.least_over_tuned, 1.0, "x")
    return (
        f"On {machine_words(view.hardware)}: {ratio(found.of_bound)} of the bound, {times(found.over_default)} "
        f"the best default, {times(found.over_tuned)} the best tuned baseline; in the worst scenario ({worst}) "
        f"{least} the best tuned, target 1.0x {against}."
    )


def bursty(view: View) -> list[str]:
    """Scenarios with bursty arrivals."""
    return [name for name in view.scenarios if name in BURSTY]


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
    loose = ", ".join(bursty(view))
    told = [table(columns, lines)]
    if loose:
        told.append(f"The bound is of a run without end, over which bursts even out: it is loose for {loose}.")
    if view.kept:
        told.append(
            "The bound may give a request up midway, once it has run long. Whoever keeps what was promised may "
            "not: the second bound of the table above is for them."
        )
    apart = _pools_apart(view)
    if apart:
        told.append(f"In pools alone, ours over DistServe at its best ratio: {apart}.")
    return "\n\n".join([*told, *(["\n".join(said)] if said else [])])


def _pools_apart(view: View) -> str:
    """Ours disaggregated over DistServe tuned, by scenario, where both were run."""
    found = []
    for name in view.scenarios:
        ours = view.at(name, (OURS_NAME, "disaggregated", "tuned", view.acceptance))
        theirs = view.at(name, ("distserve", "disaggregated", "tuned", view.acceptance))
        if ours is not None and theirs is not None and theirs["mean"]:
            found.append(f"{name} {times(ours['mean'] / theirs['mean'])}")
    return ", ".join(found)


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
