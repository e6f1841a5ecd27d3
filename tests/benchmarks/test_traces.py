"""Every trace format is read alike, and a malformed one is answered with file, line and what was expected."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from benchmarks.traces import Arrival, data_directory, read_lengths, read_trace
from engine.errors import ConfigError

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
COMPACT = "t_s,in_tokens,out_tokens\n"


def _file(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_azure_csv(tmp_path: Path, suffix: str) -> None:
    text = AZURE + "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n"
    first, second = read_trace(_file(tmp_path, f"a.csv{suffix}", text))
    assert first == Arrival(0.0, 374, 44)
    assert (second.in_tokens, second.out_tokens) == (396, 109)
    assert second.at_s == pytest.approx(4.314579, abs=1e-5)


def test_azure_csv_with_a_time_zone(tmp_path: Path) -> None:
    text = AZURE + "2024-05-10 00:00:00.009930+00:00,2162,5\n2024-05-10 00:01:00.009930+00:00,2399,6\n"
    assert [a.at_s for a in read_trace(_file(tmp_path, "a.csv", text))] == pytest.approx([0, 60])


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_compact_csv_ignores_more_columns_and_sorts(tmp_path: Path, suffix: str) -> None:
    text = "t_s,in_tokens,out_tokens,extra\n2.5,10,4,x\n1.5,20,6,y\n"
    arrivals = read_trace(_file(tmp_path, f"c.csv{suffix}", text))
    assert arrivals == [Arrival(0.0, 20, 6), Arrival(1.0, 10, 4)]


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_mooncake_jsonl(tmp_path: Path, suffix: str) -> None:
    rows = [
        {"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47, 2353]},
        {"timestamp": 30535, "input_length": 6472, "output_length": 26, "hash_ids": [46, 2366]},
    ]
    text = "\n".join(json.dumps(row) for row in rows) + "\n\n"
    assert read_trace(_file(tmp_path, f"m.jsonl{suffix}", text)) == [
        Arrival(0.0, 6955, 52, prefix_hashes=(46, 47, 2353)),
        Arrival(pytest.approx(3.053), 6472, 26, prefix_hashes=(46, 2366)),  # type: ignore[arg-type]
    ]


def test_lengths_need_no_times(tmp_path: Path) -> None:
    path = _file(tmp_path, "l.csv", "in_tokens,out_tokens\n55,4\n829,170\n")
    assert read_lengths(path).tolist() == [[55, 4], [829, 170]]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("x.csv", "a,b\n1,2\n", r"line 1: expected the header TIMESTAMP.*t_s,in_tokens"),
        (
            "x.csv",
            COMPACT + "0,1,2\n0,one,2\n",
            r"line 3: expected a whole number of tokens in in_tokens.*'one'",
        ),
        ("x.csv", COMPACT + "0,1,-2\n", r"line 2: expected a whole number of tokens in out_tokens"),
        ("x.csv", COMPACT + "0,1,inf\n", r"line 2: expected a whole number of tokens in out_tokens"),
        ("x.csv", COMPACT + "soon,1,2\n", r"line 2: expected a time of 0 or more in t_s, found 'soon'"),
        ("x.csv", COMPACT + "0,1\n", r"line 2: expected a column out_tokens"),
        (
            "x.csv",
            AZURE + "yesterday,1,2\n",
            r"line 2: expected a date and time in TIMESTAMP, found 'yesterday'",
        ),
        ("x.csv", AZURE + ",1,2\n", r"line 2: expected a date and time in TIMESTAMP"),
        ("x.csv", "TIMESTAMP,Tokens\n2023-11-16 18:15:46,3\n", r"line 2: expected a column ContextTokens"),
        ("x.jsonl", '{"timestamp": 0}\n', r"line 1: expected a column input_length"),
        ("x.jsonl", "[1, 2]\n", r"line 1: expected one JSON object"),
        ("x.jsonl", '{"timestamp": 0,\n', r"line 1: expected one JSON object"),
        (
            "x.jsonl",
            '{"timestamp": 0, "input_length": 1, "output_length": 1, "hash_ids": "a"}\n',
            r"line 1: expected hash_ids",
        ),
        ("x.csv", COMPACT, r"no requests in it"),
        ("x.csv", "", r"no requests in it"),
    ],
)
def test_malformed_files_are_named(tmp_path: Path, name: str, text: str, expected: str) -> None:
    path = _file(tmp_path, name, text)
    with pytest.raises(ConfigError, match=expected) as raised:
        read_trace(path)
    assert str(path) in str(raised.value)


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    truncated = tmp_path / "t.csv.gz"
    truncated.write_bytes(gzip.compress((COMPACT + "0,1,2\n" * 1000).encode())[:-20])
    binary = tmp_path / "b.csv"
    binary.write_bytes(b"\xff\xfe\x00")
    for path in (truncated, binary, tmp_path / "missing.csv", tmp_path):
        with pytest.raises(ConfigError, match="cannot be read"):
            read_trace(path)


def test_data_directory_is_the_one_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLOSSERVE_DATA", str(tmp_path))
    assert data_directory() == tmp_path
    monkeypatch.setenv("SLOSSERVE_DATA", str(tmp_path / "gone"))
    with pytest.raises(ConfigError, match="SLOSSERVE_DATA"):
        data_directory()
