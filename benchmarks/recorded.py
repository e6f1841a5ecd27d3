"""Recorded traces as columns, read once, and the part of one that a run replays.

Times are kept in units of the trace's mean gap, so that a rate only compresses them: for one seed a higher
rate replays the same requests in the same order, and more of them.
"""

from __future__ import annotations

import csv
import gzip
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.traces import data_directory, read_lengths, read_trace
from benchmarks.workload import Floats, Ints
from engine.errors import ConfigError

CACHED_FILES = 16


@dataclass(frozen=True, slots=True, eq=False)
class Recording:
    """Columns of shape [rows] in order of time. `at_gaps`: arrival in mean gaps after the first request."""

    mean_gap_s: float
    at_gaps: Floats
    prompt_tokens: Ints
    output_tokens: Ints
    thinking_tokens: Ints

    def __len__(self) -> int:
        return len(self.at_gaps)

    def window(self, rate_per_s: float, duration_s: float, start_gaps: float) -> tuple[Ints, Floats]:
        """Rows replayed and when each arrives [s], from `start_gaps` of the recording on, for `duration_s`.

        The whole recording has `rate_per_s` on average, a window of a bursty one more or less. It goes round:
        one mean gap after the last request the first comes again, as often as it takes to fill the time.
        """
        size = len(self)
        laps, rest = divmod(start_gaps + rate_per_s * duration_s, size)
        first = int(np.searchsorted(self.at_gaps, start_gaps))
        end = int(laps) * size + int(np.searchsorted(self.at_gaps, rest))
        lap, rows = np.divmod(np.arange(first, end), size)
        return rows, (self.at_gaps[rows] + size * lap - start_gaps) / rate_per_s

    def rows_from(self, start_gaps: float, count: int) -> Ints:
        """`count` rows of the same round, for other arrivals."""
        return (int(np.searchsorted(self.at_gaps, start_gaps)) + np.arange(count)) % len(self)


@dataclass(frozen=True, slots=True, eq=False)
class Sessions:
    """Calls of agents, column by column, session behind session.

    `first_row` and `calls` are of shape [sessions], the rest [calls]. `think_s` is the pause before a call,
    `elapsed_s` its time after the start of its session. `prefix_tokens` of its prompt are the prompt and
    output of the call before.
    """

    first_row: Ints
    calls: Ints
    prompt_tokens: Ints
    output_tokens: Ints
    prefix_tokens: Ints
    elapsed_s: Floats
    think_s: Floats
    ends_turn: npt.NDArray[np.bool_]

    def on_a_circle(self, calls: int, duration_s: float, rng: np.random.Generator) -> tuple[Ints, Ints, Floats]:
        """Exactly `calls` calls spread over `duration_s`: row, parent and arrival [s] of each, as in Workload.

        Sessions start anywhere in the time with equal chance, which is a Poisson process once their number is
        given. They last for hours: what passes the end comes at the beginning, as of a session that began
        before, so that calls come at a steady rate from the start. Of a session each such lap is a chain, and
        its first call finds nothing cached: many of these fall into the first tenth of the time. More calls
        are the same sessions at the same times, and further ones.
        """
        picking, starting = rng.spawn(2)
        rounds = calls // int(self.calls.sum()) + 1
        picked = np.concatenate([picking.permutation(len(self.calls)) for _ in range(rounds)])
        used = int(np.searchsorted(np.cumsum(self.calls[picked]), calls)) + 1
        picked = picked[:used]
        session, nth = positions(self.calls[picked])
        session, nth = session[:calls], nth[:calls]
        rows = self.first_row[picked][session] + nth
        lap, at_s = np.divmod(starting.uniform(0, duration_s, used)[session] + self.elapsed_s[rows], duration_s)
        is_first = (nth == 0) | (np.diff(lap, prepend=-1) != 0)
        head = np.maximum.accumulate(np.where(is_first, np.arange(calls), 0))
        order = np.argsort(at_s[head], kind="stable")  # stable: calls of a chain stay together
        parent = np.where(is_first[order], -1, np.arange(calls) - 1)
        return rows[order], parent, at_s[head][order]


def positions(sizes: Ints) -> tuple[Ints, Ints]:
    """For groups of these sizes laid one behind the other: the group of each member, and its place in it."""
    group = np.repeat(np.arange(len(sizes)), sizes)
    return group, np.arange(len(group)) - (np.cumsum(sizes) - sizes)[group]


def trace_file(file: str, data: Path | None) -> Path:
    """`traces/FILE.csv.gz` in the folder `data`, else in the one of SLOSSERVE_DATA. ConfigError if absent."""
    folder = data if data is not None else data_directory()
    path = None if folder is None else folder / "traces" / f"{file}.csv.gz"
    if path is None or not path.is_file():
        raise ConfigError(
            f"no traces/{file}.csv.gz in {folder or 'any folder of data'}: give the folder by data or "
            "SLOSSERVE_DATA (slosserve traces list shows where public traces come from)"
        )
    return path


@lru_cache(CACHED_FILES)
def load_recording(path: Path, thinking_column: str | None = None) -> Recording:
    """A trace in any format of traces.read_trace. `thinking_column`: the share of an output that is thinking.

    Raises ConfigError as read_trace does, and if the trace has no time in it. Read once in a process.
    """
    arrivals = read_trace(path)
    at_s = np.array([arrival.at_s for arrival in arrivals])
    if at_s[-1] <= 0:
        raise ConfigError(f"{path}: no time in it: give a trace with at least two arrival times")
    output = np.maximum([arrival.out_tokens for arrival in arrivals], 1)
    share = np.zeros(len(output))
    if thinking_column is not None:
        table = _Table(path)
        share = table.floats(thinking_column)[np.argsort(table.floats("t_s"), kind="stable")]
    mean_gap_s = float(at_s[-1]) / (len(at_s) - 1)
    return Recording(
        mean_gap_s,
        _fixed(at_s / mean_gap_s),
        _fixed(np.maximum([arrival.in_tokens for arrival in arrivals], 1)),
        _fixed(output),
        _fixed(np.rint(np.clip(share, 0, 1) * output).astype(np.int64)),
    )


@lru_cache(CACHED_FILES)
def load_lengths(path: Path) -> Ints:
    """(in_tokens, out_tokens) of each row, as traces.read_lengths gives them. Read once in a process."""
    lengths: Ints = _fixed(read_lengths(path))
    return lengths


@lru_cache(CACHED_FILES)
def load_sessions(path: Path, prompt_divisor: int) -> Sessions:
    """Agent sessions with prompts and their prefixes divided by `prompt_divisor`. Read once in a process.

    A prompt that is shorter than the one before, or of a sub-agent at another depth, continues no history:
    its prefix is 0. Calls come one after the other, as recorded pauses and answer times add up; an unknown
    one counts as 0. (The recorded clock does not serve: it starts anew in each sub-agent.)
    """
    table = _Table(path)
    names = np.array(table.column("trace"))
    prompt, output, depth = (table.ints(name) for name in ("in_tokens", "out_tokens", "depth"))
    first_row = np.flatnonzero(np.append(True, names[1:] != names[:-1]))
    calls = np.diff(np.append(first_row, len(names)))
    before = np.maximum(np.arange(len(names)) - 1, 0)
    goes_on = (names == names[before]) & (depth == depth[before]) & (prompt >= prompt[before])
    goes_on[0] = False
    # Divided after the sum: outputs are not divided, but what they add to the next prompt is.
    prefix = np.where(goes_on, np.minimum(prompt[before] + output[before], prompt), 0) // prompt_divisor
    scaled = np.maximum(prompt // prompt_divisor, 1)
    think_s, answer_s = table.floats("think_time_s"), table.floats("api_time_s")
    steps_s = think_s + np.append(0.0, answer_s[:-1])
    clock_s = np.cumsum(steps_s)
    return Sessions(
        _fixed(first_row),
        _fixed(calls),
        _fixed(scaled),
        _fixed(np.maximum(output, 1)),
        _fixed(np.minimum(prefix, scaled - 1)),
        _fixed(clock_s - np.repeat(clock_s[first_row], calls)),
        _fixed(think_s),
        _fixed(np.array(table.column("stop")) == "end_turn"),
    )


class _Table:
    """A CSV with a header by column. An empty number is 0. Raises ConfigError for what is not there."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
                header, *rows = csv.reader(file)
            self._columns: dict[str, Sequence[str]] = dict(zip(header, zip(*rows, strict=True), strict=True))
        except (OSError, EOFError, UnicodeDecodeError, ValueError) as error:
            raise ConfigError(f"{path}: expected a gzipped CSV with a header and rows: {error}") from error

    def column(self, name: str) -> Sequence[str]:
        if name not in self._columns:
            raise ConfigError(f"{self._path}: expected a column {name}, found {', '.join(self._columns)}")
        return self._columns[name]

    def floats(self, name: str) -> Floats:
        try:
            return np.array([value or "0" for value in self.column(name)], dtype=np.float64)
        except ValueError as error:
            raise ConfigError(f"{self._path}: expected numbers in {name}: {error}") from error

    def ints(self, name: str) -> Ints:
        return self.floats(name).astype(np.int64)


def _fixed(column: Any) -> Any:
    """The column, unwritable: it is shared by all who ask for the file."""
    column.setflags(write=False)
    return column
