"""Public traces are listed with where they come from, and a copy of one appears whole or not at all."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from benchmarks import traces_cli
from benchmarks.traces import read_trace
from benchmarks.traces_cli import PUBLIC_TRACES, app
from engine.errors import ConfigError

COMPACT = "t_s,in_tokens,out_tokens\n"
AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    "2023-11-16 18:15:46.5000000,374,44\n2023-11-16 18:15:50.7500000,396,109\n"
)


@dataclass
class Web:
    """What a server answers, in turn; the last one from then on. `asked`: the paths it was asked for."""

    answers: list[tuple[int, bytes]]
    asked: list[str] = field(default_factory=list)
    url: str = ""

    def next(self) -> tuple[int, bytes]:
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    """azure-conv is at a server of this machine, and nothing is at hand."""
    web = Web([(200, AZURE.encode())])

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            web.asked.append(self.path)
            status, body = web.next()
            self.send_response(status)
            self.send_header("content-length", str(len(body) + (status == 206) * 10))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    web.url = f"http://127.0.0.1:{server.server_port}/conv.csv"
    _at(monkeypatch, web.url)
    yield web
    server.shutdown()
    thread.join()
    server.server_close()


def _at(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(traces_cli, "FIRST_WAIT_S", 0.001)
    monkeypatch.setitem(PUBLIC_TRACES, "azure-conv", replace(PUBLIC_TRACES["azure-conv"], address=address))  # type: ignore[arg-type]


def _run(data: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, arguments, env={"SLOSSERVE_DATA": str(data), "COLUMNS": "200"})


def _write(folder: Path, name: str, text: str) -> None:
    (folder / "traces").mkdir(exist_ok=True)
    (folder / "traces" / str(PUBLIC_TRACES[name].local_file)).write_bytes(gzip.compress(text.encode()))


def _error(done: Result) -> str:
    assert isinstance(done.exception, ConfigError), done.output
    return str(done.exception)


def test_help_shows_an_example(tmp_path: Path) -> None:
    for arguments in (["--help"], ["list", "--help"], ["get", "--help"]):
        assert "Example: slosserve traces" in _run(tmp_path, *arguments).output


def test_every_trace_is_listed_with_licence_and_address(tmp_path: Path) -> None:
    done = _run(tmp_path, "list")
    assert done.exit_code == 0, done.output
    for name, trace in PUBLIC_TRACES.items():
        assert f"{name}: {trace.address}" in done.output
        assert trace.licence in done.output


def test_a_local_copy_is_described(tmp_path: Path) -> None:
    _write(tmp_path, "mooncake", COMPACT + "0,100,10\n1,200,20\n4,600,30\n")
    _write(tmp_path, "agent-sessions", "trace,t_s,in_tokens,out_tokens\na,0,9,1\na,0,9,1\n")
    rows = {row["name"]: row for row in json.loads(_run(tmp_path, "list", "--json").output)["traces"]}
    mooncake = rows["mooncake"]
    assert (mooncake["rows"], mooncake["rate_per_s"], mooncake["in_tokens"]["mean"]) == (3, 0.5, 300)
    assert mooncake["out_tokens"]["p50"] == 20
    assert rows["agent-sessions"]["rate_per_s"] is None
    assert rows["azure-conv"]["local"] is None
    assert "300 / 200 / 592" in _run(tmp_path, "list").output


def test_a_local_copy_is_used_with_all_its_columns(tmp_path: Path, web: Web) -> None:
    text = "t_s,in_tokens,out_tokens,reason_ratio\n0,1,2,0.5\n"
    _write(tmp_path, "azure-conv", text)
    for file in ("a.csv", "a.csv.gz"):
        out = tmp_path / "new" / file
        done = _run(tmp_path, "get", "azure-conv", "--out", str(out))
        assert done.exit_code == 0, done.output
        read = gzip.decompress(out.read_bytes()) if file.endswith(".gz") else out.read_bytes()
        assert read.decode() == text
    assert not web.asked


@pytest.mark.parametrize("file", ["conv.csv", "conv.csv.gz"])
def test_a_trace_is_fetched_and_converted(tmp_path: Path, web: Web, file: str) -> None:
    out = tmp_path / file
    done = _run(tmp_path, "get", "azure-conv", "--out", str(out))
    assert done.exit_code == 0, done.output
    assert web.asked == ["/conv.csv"]
    read = gzip.decompress(out.read_bytes()) if file.endswith(".gz") else out.read_bytes()
    assert read.decode() == COMPACT + "0.0,374,44\n4.25,396,109\n"
    assert [(a.in_tokens, a.out_tokens) for a in read_trace(out)] == [(374, 44), (396, 109)]
    assert list(tmp_path.iterdir()) == [out]
    assert "CC-BY-4.0" in done.output


def test_jsonl_is_converted_too(tmp_path: Path, web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    web.answers = [
        (200, b'{"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46]}\n')
    ]
    _at(monkeypatch, web.url.replace("conv.csv", "trace.jsonl"))
    out = tmp_path / "m.csv"
    assert _run(tmp_path, "get", "azure-conv", "--out", str(out)).exit_code == 0
    assert out.read_text() == COMPACT + "0.0,6955,52\n"


def test_a_busy_server_is_asked_again(tmp_path: Path, web: Web) -> None:
    web.answers = [(503, b""), (429, b""), (206, AZURE[:20].encode()), (200, AZURE.encode())]
    out = tmp_path / "conv.csv"
    done = _run(tmp_path, "get", "azure-conv", "--out", str(out))
    assert done.exit_code == 0, done.output
    assert len(web.asked) == 4
    assert len(read_trace(out)) == 2


def test_what_is_gone_is_not_asked_for_again(tmp_path: Path, web: Web) -> None:
    web.answers = [(404, b"")]
    done = _run(tmp_path, "get", "azure-conv", "--out", str(tmp_path / "conv.csv"))
    assert "404" in _error(done)
    assert len(web.asked) == 1


@pytest.mark.parametrize("status", [200, 500])
def test_nothing_half_written_is_left_and_the_old_file_stays(tmp_path: Path, web: Web, status: int) -> None:
    web.answers = [(status, AZURE.encode() + b"2023-11-16 18:15:50,many,1\n")]
    out = tmp_path / "conv.csv"
    out.write_text("old")
    _error(_run(tmp_path, "get", "azure-conv", "--out", str(out)))
    assert list(tmp_path.iterdir()) == [out]
    assert out.read_text() == "old"


def test_without_a_network_it_says_what_where_and_what_to_do(
    tmp_path: Path, web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = "http://127.0.0.1:1/conv.csv"
    _at(monkeypatch, nowhere)
    said = _error(_run(tmp_path, "get", "azure-conv", "--out", str(tmp_path / "conv.csv")))
    assert f"trace azure-conv could not be fetched from {nowhere}" in said
    assert "on another machine" in said


def test_what_cannot_be_fetched_is_named(tmp_path: Path) -> None:
    out = ("--out", str(tmp_path / "x.csv"))
    said = _error(_run(tmp_path, "get", "servegen-reasoning", *out))
    assert "https://github.com/alibaba/ServeGen" in said
    assert "traces/servegen_reason_deepseekr1_4rps.csv.gz" in said
    assert "choose from azure-conv, azure-code" in _error(_run(tmp_path, "get", "poems", *out))
    assert not list(tmp_path.iterdir())
