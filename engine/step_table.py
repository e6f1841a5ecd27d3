"""A table of measured steps: one row per batch, read from and written to CSV (gzipped or not).

Columns: `tokens`, `seqs`, `decode_seqs`, `spec_tokens_per_decode`, `decode_context_tokens` (sum over decodes),
`prefill_chunks` (`chunk@kv;chunk@kv`: new tokens @ tokens computed before), `prefill_work` (sum of
chunk * (kv + chunk / 2)), `step_ms`. Lines `# key: value` above the header say where the rows come from.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from engine.errors import ConfigError

Floats = npt.NDArray[np.float64]

COLUMNS = (
    "tokens",
    "seqs",
    "decode_seqs",
    "spec_tokens_per_decode",
    "decode_context_tokens",
    "prefill_chunks",
    "prefill_work",
    "step_ms",
)
GZIP_MAGIC = b"\x1f\x8b"
SHA256_DIGITS = 16


@dataclass(frozen=True, slots=True)
class StepRow:
    """One batch and its time. `prefill_chunks`: pairs of new tokens and tokens computed before."""

    tokens: int
    seqs: int
    decode_seqs: int
    decode_context_tokens: int
    prefill_chunks: tuple[tuple[int, int], ...]
    prefill_work: float
    step_ms: float
    spec_tokens_per_decode: int = 0

    @property
    def prefill_kv_tokens(self) -> int:
        """KV tokens that the chunks read."""
        return sum(kv for _, kv in self.prefill_chunks)

    def shape(self) -> str:
        """The batch in words: `8 decodes over 4096, prefill 256@1024`."""
        spec = f" x {1 + self.spec_tokens_per_decode}" if self.spec_tokens_per_decode else ""
        decodes = f"{self.decode_seqs} decodes{spec} over {self.decode_context_tokens}"
        chunks = " ".join(f"{chunk}@{kv}" for chunk, kv in self.prefill_chunks)
        parts = [decodes] if self.decode_seqs else []
        return ", ".join(parts + ([f"prefill {chunks}"] if chunks else []))


@dataclass(frozen=True, slots=True)
class Source:
    """A file of rows: its name, how many, and the start of its SHA-256."""

    file: str
    rows: int
    sha256: str


@dataclass(frozen=True)
class StepTable:
    """The rows as columns, each of shape [rows]; `about` is what the files say of themselves."""

    rows: tuple[StepRow, ...]
    sources: tuple[Source, ...] = ()
    about: Mapping[str, str] = field(default_factory=dict)

    def column(self, name: str) -> Floats:
        """A field of the rows, or `prefill_kv_tokens`. Shape [rows]."""
        return np.array([getattr(row, name) for row in self.rows], dtype=np.float64)

    @property
    def seconds(self) -> Floats:
        """Measured seconds of each step."""
        return self.column("step_ms") / 1e3

    def take(self, indices: Sequence[int] | npt.NDArray[np.intp]) -> StepTable:
        """The table with only these rows."""
        return StepTable(tuple(self.rows[index] for index in indices), self.sources, self.about)

    @classmethod
    def read(cls, paths: Sequence[Path]) -> Self:
        """All rows of these files. Raises ConfigError that names file, line and column of what is wrong."""
        rows: list[StepRow] = []
        sources: list[Source] = []
        about: dict[str, str] = {}
        for path in paths:
            data = _bytes(path)
            text = _text(path, data)
            found, said = _parse(path, text)
            rows += found
            about |= said
            digest = hashlib.sha256(data).hexdigest()[:SHA256_DIGITS]
            sources.append(Source(path.name, len(found), digest))
        return cls(tuple(rows), tuple(sources), about)

    def write(self, path: Path) -> None:
        """Write the rows as CSV; gzipped if the name ends in .gz."""
        out = io.StringIO()
        for key, value in self.about.items():
            out.write(f"# {key}: {value}\n")
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(COLUMNS)
        for row in self.rows:
            chunks = ";".join(f"{chunk}@{kv}" for chunk, kv in row.prefill_chunks)
            cells = {field.name: getattr(row, field.name) for field in fields(StepRow)}
            cells |= {"prefill_chunks": chunks, "step_ms": f"{row.step_ms:.4f}"}
            writer.writerow([cells[name] for name in COLUMNS])
        data = out.getvalue().encode()
        path.parent.mkdir(parents=True, exist_ok=True)
        # No time stamp inside: the same rows give the same bytes.
        path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from error


def _text(path: Path, data: bytes) -> str:
    try:
        return (gzip.decompress(data) if data.startswith(GZIP_MAGIC) else data).decode()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is neither CSV nor gzipped CSV ({error})") from error


def _parse(path: Path, text: str) -> tuple[list[StepRow], dict[str, str]]:
    lines = text.splitlines()
    comments = 0
    while comments < len(lines) and lines[comments].startswith("#"):
        comments += 1
    said = (line.lstrip("# ").partition(":") for line in lines[:comments])
    about = {key.strip(): value.strip() for key, _, value in said}
    reader = csv.DictReader(lines[comments:])
    try:
        missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
        if missing:
            raise ConfigError(f"{path}: column {missing[0]} is missing; there must be {', '.join(COLUMNS)}")
        rows = [_row(f"{path}: row {reader.line_num + comments}", cells) for cells in reader]
    except csv.Error as error:
        raise ConfigError(f"{path}: row {reader.line_num + comments}: is not CSV ({error})") from error
    if not rows:
        raise ConfigError(f"{path}: has no rows")
    return rows, about


def _row(where: str, cells: Mapping[str, str | None]) -> StepRow:
    def count(name: str, least: int = 0) -> int:
        value = _number(where, name, cells.get(name), least)
        if value != int(value):
            raise ConfigError(f"{where}, column {name}: {cells.get(name)!r} is no whole number")
        return int(value)

    step_ms = _number(where, "step_ms", cells.get("step_ms"), 0.0)
    if step_ms == 0:
        raise ConfigError(f"{where}, column step_ms: a step takes more than 0 ms")
    return StepRow(
        tokens=count("tokens", 1),
        seqs=count("seqs", 1),
        decode_seqs=count("decode_seqs"),
        decode_context_tokens=count("decode_context_tokens"),
        prefill_chunks=_chunks(where, cells.get("prefill_chunks") or ""),
        prefill_work=_number(where, "prefill_work", cells.get("prefill_work"), 0.0),
        step_ms=step_ms,
        spec_tokens_per_decode=count("spec_tokens_per_decode"),
    )


def _number(where: str, name: str, cell: str | None, least: float) -> float:
    try:
        value = float(cell or "")
    except ValueError:
        value = math.nan
    if not least <= value < math.inf:
        raise ConfigError(f"{where}, column {name}: {cell!r} is no number of at least {least:g}")
    return value


def _chunks(where: str, cell: str) -> tuple[tuple[int, int], ...]:
    chunks: list[tuple[int, int]] = []
    for part in filter(None, cell.split(";")):
        new, _, kv = part.partition("@")
        if not (new.isdecimal() and kv.isdecimal() and int(new) > 0):
            raise ConfigError(f"{where}, column prefill_chunks: {part[:40]!r} is not CHUNK@KV, as in 256@1024")
        chunks.append((int(new), int(kv)))
    return tuple(chunks)
