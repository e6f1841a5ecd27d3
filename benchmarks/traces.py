"""Recorded requests: Azure CSV, Mooncake jsonl, and our compact CSV, each gzipped or not."""

from __future__ import annotations

import csv
import gzip
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import ConfigError

NOT_A_TIME = int(np.iinfo(np.int64).min)  # what numpy makes of an empty time


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request: seconds after the start, tokens in and out, class, hashes of its prompt's blocks."""

    at_s: float
    in_tokens: int
    out_tokens: int
    slo_class: str = ""
    prefix_hashes: tuple[int, ...] = ()


def data_directory() -> Path | None:
    """Where recorded traces are: SLOSSERVE_DATA, or `shared/data` beside the project; None if absent."""
    named = os.environ.get("SLOSSERVE_DATA")
    if named:
        if not Path(named).is_dir():
            raise ConfigError(
                f"SLOSSERVE_DATA={named}: no such folder; unset it or give the folder of the data"
            )
        return Path(named)
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    return beside if beside.is_dir() else None


def read_trace(path: Path) -> list[Arrival]:
    """Requests of a trace file in order of time, the first at 0 s.

    Formats, by name and header: jsonl (Mooncake), CSV with TIMESTAMP (Azure), CSV with t_s (ours).
    Raises ConfigError with file, line and what was expected there.
    """
    reader = _mooncake if ".jsonl" in path.suffixes or path.suffix == ".json" else _csv_trace
    arrivals = sorted(reader(path), key=lambda arrival: arrival.at_s)
    if not arrivals:
        raise ConfigError(f"{path}: no requests in it")
    return [replace(a, at_s=a.at_s - arrivals[0].at_s) for a in arrivals]


def read_lengths(path: Path) -> np.ndarray:
    """(in_tokens, out_tokens) of each row of a CSV, [rows, 2]. Raises ConfigError as read_trace does."""
    rows = list(_csv_rows(path))
    if not rows:
        raise ConfigError(f"{path}: no rows in it")
    lengths = [
        (_tokens(path, line, row, "in_tokens"), _tokens(path, line, row, "out_tokens")) for line, row in rows
    ]
    return np.array(lengths, dtype=np.int64)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number, text) of each line, from 1."""
    opened: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8", newline="") as file:
            yield from enumerate(file, start=1)
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a text file: {error}") from error


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(text for _, text in _lines(path))
    for row in reader:
        yield reader.line_num, row


def _csv_trace(path: Path) -> Iterator[Arrival]:
    for line, row in _csv_rows(path):
        if "TIMESTAMP" in row:
            columns, at_s = ("ContextTokens", "GeneratedTokens"), _timestamp(path, line, row["TIMESTAMP"])
        elif "t_s" in row:
            columns, at_s = ("in_tokens", "out_tokens"), _seconds(path, line, row, "t_s")
        else:
            expected = "TIMESTAMP,ContextTokens,GeneratedTokens or t_s,in_tokens,out_tokens"
            raise ConfigError(
                f"{path}: line 1: expected the header {expected}, found {','.join(map(str, row))}"
            )
        yield Arrival(at_s, _tokens(path, line, row, columns[0]), _tokens(path, line, row, columns[1]))


def _mooncake(path: Path) -> Iterator[Arrival]:
    for line, text in _lines(path):
        if not text.strip():
            continue
        row = _object(path, line, text)
        hashes = row.get("hash_ids", [])
        if not isinstance(hashes, list) or not all(isinstance(value, int) for value in hashes):
            raise ConfigError(f"{path}: line {line}: expected hash_ids to be a list of integers")
        yield Arrival(
            _seconds(path, line, row, "timestamp") / 1000,
            _tokens(path, line, row, "input_length"),
            _tokens(path, line, row, "output_length"),
            prefix_hashes=tuple(hashes),
        )


def _object(path: Path, line: int, text: str) -> dict[str, Any]:
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: line {line}: expected one JSON object: {error}") from error
    if not isinstance(row, dict):
        raise ConfigError(f"{path}: line {line}: expected one JSON object, found {text.strip()[:40]!r}")
    return row


def _tokens(path: Path, line: int, row: Mapping[str, Any], column: str) -> int:
    value = _value(path, line, row, column)
    try:
        number = float(value)
        count = int(number)
    except (TypeError, ValueError, OverflowError):
        number, count = -1.0, -1
    if count < 0 or count != number:
        raise ConfigError(
            f"{path}: line {line}: expected a whole number of tokens in {column}, found {value!r}"
        )
    return count


def _seconds(path: Path, line: int, row: Mapping[str, Any], column: str) -> float:
    value = _value(path, line, row, column)
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = np.nan
    if not np.isfinite(seconds) or seconds < 0:
        raise ConfigError(f"{path}: line {line}: expected a time of 0 or more in {column}, found {value!r}")
    return seconds


def _timestamp(path: Path, line: int, value: str | None) -> float:
    """Seconds of `2023-11-16 18:15:46.6805900`, with or without the `+00:00` of the 2024 files."""
    try:
        moment = int(np.datetime64((value or "").strip().removesuffix("+00:00"), "ns").astype(np.int64))
    except ValueError:
        moment = NOT_A_TIME
    if moment == NOT_A_TIME:
        raise ConfigError(f"{path}: line {line}: expected a date and time in TIMESTAMP, found {value!r}")
    return float(moment) / 1e9


def _value(path: Path, line: int, row: Mapping[str, Any], column: str) -> Any:
    value = row.get(column)
    if value is None:
        raise ConfigError(f"{path}: line {line}: expected a column {column}, found {', '.join(map(str, row))}")
    return value
