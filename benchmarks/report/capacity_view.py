"""What capacity.json holds, one table at a time: who held which rate, and how that compares."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.capacity_file import on_as_many_gpus
from benchmarks.hardware import HARDWARE, hardware
from benchmarks.report.markdown import is_number
from benchmarks.scenarios import SCENARIOS
from benchmarks.simulator.systems import DESIGNS, MODES, OURS_NAME

Row = Mapping[str, Any]
Key = tuple[str, str, str, float | None]  # system, mode, column, acceptance
HEAD_SHARE = 0.9
SHORT = {"vllm-spec": "vLLM + speculation", "sarathi-edf": "Sarathi-EDF"}
NOT_A_DEFAULT = ("sarathi-edf", OURS_NAME)  # what nobody ships: compared only as tuned


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """The rows of one hardware, share and acceptance; of baselines also those that run without speculation.

    `blind`: bounds for those who do not know lengths; `kept`: the same for those who give nobody up, either.
    """

    hardware: str
    share: float
    acceptance: float | None
    rows: Sequence[Row]
    blind: Mapping[str, float]
    kept: Mapping[str, float]

    @classmethod
    def of(cls, file: Row, machine: str, share: float, acceptance: float | None) -> View:
        """Those of capacity.json."""
        taken = (None, acceptance)
        rows = [
            row
            for row in file.get("rows", [])
            if (row["hardware"], row["share"]) == (machine, share)
            and (row["acceptance"] == acceptance or (row["system"] != OURS_NAME and row["acceptance"] in taken))
        ]
        bounds = [
            row
            for row in file.get("bounds", [])
            if (row["hardware"], row["acceptance"]) == (machine, acceptance) and is_number(row["blind_per_gpu"])
        ]
        blind = {row["scenario"]: row["blind_per_gpu"] for row in bounds}
        kept = {row["scenario"]: row["kept_per_gpu"] for row in bounds if is_number(row.get("kept_per_gpu"))}
        return cls(machine, share, acceptance, rows, blind, kept)

    @property
    def own(self) -> list[Row]:
        """Ours."""
        return [row for row in self.rows if row["system"] == OURS_NAME]

    @property
    def scenarios(self) -> list[str]:
        """The six, in their order, as far as they were run."""
        return [name for name in SCENARIOS if any(row["scenario"] == name for row in self.rows)]

    @property
    def traces(self) -> list[str]:
        """Recorded ones that were run."""
        return [name for name in dict.fromkeys(row["scenario"] for row in self.rows) if name not in SCENARIOS]

    @property
    def keys(self) -> list[Key]:
        """Baselines as tuned and as they come, then ours by mode."""
        found = {key_of(row) for row in self.rows}
        names, columns = list(DESIGNS), ("tuned", "default")
        return sorted(
            found, key=lambda k: (names.index(k[0]), columns.index(k[2]), MODES.index(k[1]), k[3] is not None)
        )

    def at(self, scenario: str, key: Key) -> Row | None:
        """One cell."""
        return next((row for row in self.rows if row["scenario"] == scenario and key_of(row) == key), None)

    def ours(self, scenario: str) -> Row | None:
        """Ours, in its best mode of those on as many GPUs."""
        return best(on_as_many_gpus(row for row in self.own if row["scenario"] == scenario))

    def rival(self, scenario: str, column: str) -> Row | None:
        """The best of the others, tuned, or of what is shipped as it comes."""
        left_out = (OURS_NAME,) if column == "tuned" else NOT_A_DEFAULT
        return best(
            row
            for row in self.rows
            if row["scenario"] == scenario and row["column"] == column and row["system"] not in left_out
        )

    def over(self, scenario: str, column: str) -> float | None:
        """Ours against `rival`."""
        ours, rival = self.ours(scenario), self.rival(scenario, column)
        return None if ours is None or rival is None or not rival["mean"] else ours["mean"] / rival["mean"]

    def over_undrafted(self, scenario: str) -> float | None:
        """Ours against the best of what is shipped, which drafts nothing: how the paper compares."""
        ours = self.ours(scenario)
        rows = (
            row
            for row in self.rows
            if (row["scenario"], row["column"], row["acceptance"]) == (scenario, "default", None)
            and row["system"] not in NOT_A_DEFAULT
        )
        rival = best(rows)
        return None if ours is None or rival is None or not rival["mean"] else ours["mean"] / rival["mean"]

    def of_bound(self, scenario: str) -> float | None:
        """Ours against the length-blind bound. Bounds are of 90 %."""
        ours, blind = self.ours(scenario), self.blind.get(scenario)
        return None if ours is None or not blind or self.share != HEAD_SHARE else ours["mean"] / blind

    def of_kept(self, scenario: str) -> float | None:
        """Ours against the bound for those who give nobody up."""
        ours, kept = self.ours(scenario), self.kept.get(scenario)
        return None if ours is None or not kept or self.share != HEAD_SHARE else ours["mean"] / kept


def views(file: Row) -> Iterator[View]:
    """Every table of capacity.json, the headline first."""
    machines = list(dict.fromkeys(row["hardware"] for row in file.get("rows", [])))
    shares = sorted({row["share"] for row in file.get("rows", [])})
    drafted = sorted({row["acceptance"] for row in file.get("rows", []) if row["acceptance"] is not None})
    for acceptance in (None, *drafted):
        for machine in machines:
            for share in shares:
                view = View.of(file, machine, share, acceptance)
                if view.own:
                    yield view


def machine_words(name: str) -> str:
    """Model and GPU of a hardware of ours; of one that is not known, its name."""
    if name not in HARDWARE:
        return name
    known = hardware(name)
    return f"{known.model} on {known.gpu}{f' x{known.tp}' if known.tp > 1 else ''} (`{name}`)"


def geomean(values: Iterable[float]) -> float | None:
    """None of nothing, 0 if one is 0."""
    listed = list(values)
    if not listed:
        return None
    return math.exp(sum(map(math.log, listed)) / len(listed)) if min(listed) > 0 else 0.0


def best(rows: Iterable[Row]) -> Row | None:
    return max(
        (row for row in rows if is_number(row["mean"])), key=lambda row: float(row["mean"]), default=None
    )


def key_of(row: Row) -> Key:
    return row["system"], row["mode"], row["column"], row["acceptance"]


def label_of(key: Key, acceptance: float | None) -> str:
    system, mode, column, drafts = key
    if system == OURS_NAME:
        return f"slosserve, {mode}"
    plain = ", no drafts" if acceptance is not None and drafts is None else ""
    return f"{name_of(system)}{plain}, {column}"


def name_of(system: str) -> str:
    """Short, for tables."""
    return SHORT.get(system, DESIGNS[system].label)
