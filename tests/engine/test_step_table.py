"""Tables of measured steps: written and read back, and clear about what is wrong with them."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from engine.cost import Piece, StepCost
from engine.errors import ConfigError
from engine.step_table import COLUMNS, StepTable
from tests.engine.step_rows import made_table

HEADER = ",".join(COLUMNS)
GOOD = "146,5,4,0,3922,142@1088,164578,94.105"
TABLE = made_table(StepCost((Piece(10e-3, 1e-4),)), 30)


@pytest.mark.parametrize("name", ["steps.csv", "steps.csv.gz"])
def test_rows_survive_a_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    StepTable(TABLE.rows, about={"model": "tiny", "hardware": "a: b"}).write(path)
    read = StepTable.read([path])
    assert read.about == {"model": "tiny", "hardware": "a: b"}
    assert read.seconds == pytest.approx(TABLE.seconds, abs=1e-7)
    assert [row.prefill_chunks for row in read.rows] == [row.prefill_chunks for row in TABLE.rows]
    assert read.column("prefill_kv_tokens").tolist() == TABLE.column("prefill_kv_tokens").tolist()
    assert (read.sources[0].file, read.sources[0].rows) == (name, 30)


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    paths = [tmp_path / "a.csv.gz", tmp_path / "b.csv.gz"]
    for path in paths:
        TABLE.write(path)
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_several_files_are_one_table(tmp_path: Path) -> None:
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_text(f"{HEADER}\n{GOOD}\n", encoding="utf-8")
    table = StepTable.read([tmp_path / "a.csv", tmp_path / "b.csv"])
    assert len(table.rows) == 2
    assert table.sources[0].sha256 == table.sources[1].sha256


@pytest.mark.parametrize(
    ("column", "cell", "complaint"),
    [
        ("tokens", "many", "'many' is no number"),
        ("tokens", "0", "at least 1"),
        ("seqs", "1.5", "no whole number"),
        ("decode_context_tokens", "-1", "at least 0"),
        ("prefill_work", "nan", "'nan' is no number"),
        ("step_ms", "inf", "'inf' is no number"),
        ("step_ms", "0", "more than 0 ms"),
        ("prefill_chunks", "12x3", "'12x3' is not CHUNK@KV"),
        ("prefill_chunks", "0@3", "is not CHUNK@KV"),
    ],
)
def test_a_bad_cell_is_named_by_file_row_and_column(
    tmp_path: Path, column: str, cell: str, complaint: str
) -> None:
    cells = dict(zip(COLUMNS, GOOD.split(","), strict=True)) | {column: cell}
    path = tmp_path / "bad.csv"
    path.write_text(f"# model: tiny\n{HEADER}\n{GOOD}\n{','.join(cells.values())}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=rf"bad\.csv: row 4, column {column}: .*{complaint}"):
        StepTable.read([path])


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "column tokens is missing"),
        (HEADER.encode(), "has no rows"),
        (b"tokens,seqs\n1,1\n", "column decode_seqs is missing"),
        (f"{HEADER}\n146,5\n".encode(), "row 2, column step_ms"),
        (gzip.compress(f"{HEADER}\n{GOOD}\n".encode())[:-20], "neither CSV nor gzipped CSV"),
        (b"\xff\xfe\x00", "neither CSV nor gzipped CSV"),
    ],
)
def test_what_is_no_table_is_an_error(tmp_path: Path, content: bytes, complaint: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"bad\.csv: .*{complaint}"):
        StepTable.read([path])


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.csv: cannot be read"):
        StepTable.read([tmp_path / "none.csv"])
