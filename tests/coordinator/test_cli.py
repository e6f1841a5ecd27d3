"""The command line: help, clear errors, and a real cluster that comes and goes without a trace."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from coordinator.cli.client import ClusterClient
from coordinator.cli.main import VERBS
from coordinator.process_tree import processes_of
from coordinator.run_state import STATE_FILE, RunState, read_state
from engine.errors import RequestError

COMMAND = [sys.executable, "-c", "from coordinator.cli import main; main()"]
ENDED_S = 90.0  # a raylet sits there for ten seconds, and longer on a busy machine


def run_cli(
    *arguments: str, run_dir: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("SLOSSERVE_")}
    env |= environment | ({"SLOSSERVE_RUN_DIR": str(run_dir)} if run_dir else {})
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, check=False, env=env, timeout=300
    )


# ---- help and errors -------------------------------------------------------------------------------------


def test_help_is_quick_and_names_every_verb() -> None:
    began_s = time.process_time(), os.times().children_user
    done = run_cli("--help")
    cpu_s = os.times().children_user - began_s[1]
    assert done.returncode == 0
    assert all(f" {verb} " in done.stdout for verb in [*VERBS, "demo"])
    assert cpu_s < 1.0


@pytest.mark.parametrize("verb", [*VERBS, "demo"])
def test_every_verb_has_help_with_an_example(verb: str) -> None:
    arguments = [verb, "make", "--help"] if verb == "model" else [verb, "--help"]
    done = run_cli(*arguments, COLUMNS="120")
    assert done.returncode == 0, done.stderr
    assert re.search(rf"Example: slosserve {verb}\b", done.stdout)


def test_version_is_that_of_the_package() -> None:
    from importlib.metadata import version

    assert run_cli("--version").stdout.strip() == f"slosserve {version('slosserve')}"


def assert_clear(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode in (1, 2)
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr, done.stderr


def test_unknown_verb_is_refused() -> None:
    assert_clear(run_cli("upp"), "upp")


def test_unknown_key_is_told_before_anything_starts(tmp_path: Path) -> None:
    done = run_cli("up", "--set", "endpoint.prot=1", run_dir=tmp_path)
    assert_clear(done, "error:", "endpoint.prot", 'Did you mean "port"?')
    assert not list(tmp_path.iterdir())


def test_port_in_use_is_told_with_who_has_it(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run_cli("up", "--port", str(port), run_dir=tmp_path)
    assert_clear(done, f"port {port}", f"pid {os.getpid()}", "--port")
    assert not list(tmp_path.glob(f"*/{STATE_FILE}"))


def test_model_that_does_not_exist_is_told_before_anything_starts(tmp_path: Path) -> None:
    done = run_cli("up", "--port", "0", "--model", str(tmp_path / "none"), run_dir=tmp_path)
    assert_clear(done, str(tmp_path / "none"), "does not exist")
    assert not list(tmp_path.glob(f"*/{STATE_FILE}"))


@pytest.mark.parametrize(
    "verb", [["status"], ["pools"], ["rebalance", "--prefill", "1", "--decode", "1"], ["down"]]
)
def test_no_cluster_is_told_with_what_to_do(verb: list[str], tmp_path: Path) -> None:
    assert_clear(run_cli(*verb, run_dir=tmp_path), "no cluster runs", "slosserve up")


def test_unreachable_cluster_is_told_with_its_address() -> None:
    assert_clear(run_cli("status", "--url", "http://127.0.0.1:9"), "http://127.0.0.1:9", "Is it up?")


# ---- against an endpoint that answers as it is told ------------------------------------------------------


@dataclass
class StandIn:
    """An endpoint whose nodes keep their roles unless `obedient`."""

    obedient: bool = True
    admin_key: str | None = None
    roles: dict[str, str] = field(default_factory=lambda: {"a": "prefill", "b": "decode"})

    def answer(self, method: str, body: dict[str, Any], key: str) -> tuple[int, Any]:
        if method == "GET":
            nodes = [{"name": name, "role": role} for name, role in self.roles.items()]
            return 200, {"nodes": nodes}
        if self.admin_key is not None and key != f"Bearer {self.admin_key}":
            return 401, {"error": {"message": "this call needs the admin key"}}
        if body["prefill"] + body["decode"] + body["mixed"] != len(self.roles):
            return 400, {"error": {"message": "there are 2 nodes"}}
        wanted = [role for role in ("prefill", "decode", "mixed") for _ in range(body[role])]
        after = dict(zip(self.roles, wanted, strict=True))
        if self.obedient and not body["dry_run"]:
            self.roles = after
        return 200, {"after": after}


@pytest.fixture
def stand_in() -> Iterator[tuple[StandIn, str]]:
    endpoint = StandIn()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._reply("GET", {})

        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            self._reply("POST", json.loads(self.rfile.read(length)))

        def _reply(self, method: str, body: dict[str, Any]) -> None:
            status, answer = endpoint.answer(method, body, self.headers.get("Authorization", ""))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield endpoint, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def rebalance(url: str, *extra: str, **environment: str) -> subprocess.CompletedProcess[str]:
    arguments = ["rebalance", "--prefill", "0", "--decode", "2", "--url", url, *extra]
    return run_cli(*arguments, run_dir=None, **environment)


def test_a_request_is_explained_by_the_endpoint_that_served_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def answered(method: str, url: str, **_: Any) -> httpx.Response:
        known = url == "http://b/explain/an%20id"
        body = {"request_id": "an id"} if known else {"error": {"message": "no request is remembered here"}}
        return httpx.Response(200 if known else 404, json=body, request=httpx.Request(method, url))

    monkeypatch.setattr(httpx, "request", answered)
    cluster = ClusterClient("http://a", others=("http://b", "http://c"))
    assert cluster.explain("an id") == {"request_id": "an id"}
    with pytest.raises(RequestError, match="remembered"):
        cluster.explain("another")


@pytest.mark.parametrize("extra", [("--dry-run",), ("--wait",), ("--prefill", "1"), ("--mixed", "2")])
def test_following_the_load_goes_with_nothing_that_would_be_left_out(extra: tuple[str, ...]) -> None:
    assert_clear(run_cli("rebalance", "--auto", *extra, "--url", "http://127.0.0.1:9"), "--auto", "alone")


def test_rebalance_believes_the_nodes_not_the_answer(stand_in: tuple[StandIn, str]) -> None:
    endpoint, url = stand_in
    endpoint.obedient = False
    done = rebalance(url)
    assert done.returncode == 1
    assert "not those wanted" in done.stdout


def test_dry_run_changes_nothing_and_says_what_would_change(stand_in: tuple[StandIn, str]) -> None:
    endpoint, url = stand_in
    done = rebalance(url, "--dry-run")
    assert done.returncode == 0
    assert "prefill -> decode" in done.stdout
    assert endpoint.roles == {"a": "prefill", "b": "decode"}


def test_errors_of_the_endpoint_are_told_in_its_words(stand_in: tuple[StandIn, str]) -> None:
    done = run_cli("rebalance", "--prefill", "3", "--decode", "1", "--url", stand_in[1])
    assert_clear(done, "there are 2 nodes", "HTTP 400")


def test_admin_key_comes_from_flag_or_environment(stand_in: tuple[StandIn, str]) -> None:
    endpoint, url = stand_in
    endpoint.admin_key = "sesame"
    assert_clear(rebalance(url), "admin key")
    assert rebalance(url, "--admin-key", "sesame").returncode == 0
    assert rebalance(url, SLOSSERVE_ENDPOINT__ADMIN_KEY="sesame").returncode == 0


def test_something_that_is_no_endpoint_of_ours_is_told(stand_in: tuple[StandIn, str]) -> None:
    endpoint, url = stand_in
    endpoint.answer = lambda method, body, key: (200, ["?"])  # type: ignore[method-assign]
    assert_clear(run_cli("status", "--url", url), "is it a slosserve endpoint?")


def _heed_signals() -> None:
    """What a shell starts in the background ignores them, and so do its children."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


# ---- how a verb ends -------------------------------------------------------------------------------------

STARTS_SOMETHING = """
import sys, time
from coordinator.cli import main as cli

def hold():
    try:
        print("started", flush=True)
        time.sleep(60)
    finally:
        print("ended", flush=True)

sys.modules["holding"] = type(sys)("holding")
sys.modules["holding"].hold = hold
sys.modules[cli.__module__].VERBS["hold"] = ("holding:hold", "Hold.")
sys.argv = ["slosserve", "hold"]
cli()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_whatever_ends_a_verb_ends_what_it_has_started(number: signal.Signals) -> None:
    command = [sys.executable, "-c", STARTS_SOMETHING]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=_heed_signals) as verb:
        assert verb.stdout is not None
        assert verb.stdout.readline() == "started\n"
        verb.send_signal(number)
        assert verb.stdout.read() == "ended\n"
    assert verb.returncode not in (0, -number)


def test_a_verb_under_nohup_outlives_its_terminal() -> None:
    def nohup() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    command = [sys.executable, "-c", STARTS_SOMETHING]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=nohup) as verb:
        assert verb.stdout is not None
        assert verb.stdout.readline() == "started\n"
        verb.send_signal(signal.SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            verb.wait(timeout=0.3)
        verb.send_signal(signal.SIGTERM)
        assert verb.stdout.read() == "ended\n"


# ---- a real cluster --------------------------------------------------------------------------------------


def processes_and_ports(state: RunState) -> list[str]:
    """What is left of a run: its processes by name, and its ports that are still taken."""
    left = [str(process) for process in processes_of(state.run_id, state.processes.values())]
    for port in state.ports:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                left.append(f"port {port}")
    return left


def wait_until_gone(state: RunState) -> None:
    deadline_s = time.monotonic() + ENDED_S
    while left := processes_and_ports(state):
        assert time.monotonic() < deadline_s, left
        time.sleep(0.1)


@pytest.mark.engines
@pytest.mark.parametrize(
    ("number", "when"),
    [
        (signal.SIGHUP, "endpoint-0: starting"),
        (signal.SIGINT, "prefill-0: loading"),
        (signal.SIGKILL, "prefill-0: loading"),
    ],
)
def test_up_that_is_cut_short_leaves_nothing_behind(number: signal.Signals, when: str, tmp_path: Path) -> None:
    """Cut while Ray starts, or the nodes' actors are being made; SIGKILL gives `up` no chance to clean up."""
    env = os.environ | {"SLOSSERVE_RUN_DIR": str(tmp_path)}
    command = [*COMMAND, "up", "--port", "0", "--name", "cut-short"]
    with subprocess.Popen(
        command, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=_heed_signals
    ) as up:
        assert up.stderr is not None
        for line in up.stderr:
            if when in line:
                break
        state = read_state(tmp_path / "cut-short")
        assert state is not None
        assert processes_and_ports(state)
        assert state.ray_folder is not None
        up.send_signal(number)
        up.communicate()
    assert up.returncode != 0
    wait_until_gone(state)
    if number == signal.SIGKILL:  # its files are what the next `up` or `down` removes
        assert run_cli("down", "--name", "cut-short", run_dir=tmp_path).returncode == 0
    assert not Path(state.ray_folder).exists()
    assert not (tmp_path / "cut-short" / STATE_FILE).exists()


@pytest.mark.engines
@pytest.mark.timeout(600)
def test_detached_cluster_answers_status_and_rebalance_and_goes_down(tmp_path: Path) -> None:
    pools = ("--config", "virtual", "--prefill", "1", "--decode", "1", "--mixed", "0")
    up = run_cli("up", "--detach", *pools, "--port", "0", "--name", "detached", run_dir=tmp_path)
    state = read_state(tmp_path / "detached")
    try:
        assert up.returncode == 0, up.stderr
        assert state is not None
        assert_roles(tmp_path, ["prefill", "decode"])
        assert " prefill " in run_cli("status", run_dir=tmp_path, COLUMNS="160").stdout
        dry = rebalance(state.urls[0], "--dry-run", "--json")
        assert json.loads(dry.stdout)["read_back"] == {"prefill-0": "prefill", "decode-0": "decode"}
        done = rebalance(state.urls[0], "--json")
        assert done.returncode == 0, done.stderr
        assert_roles(tmp_path, ["decode", "decode"])
        second = run_cli("up", "--port", "0", "--name", "detached", run_dir=tmp_path)
        assert_clear(second, "runs already", "slosserve down")
        assert psutil.pid_exists(state.processes["coordinator"].pid)
        for label in ("coordinator", "endpoint-0"):
            assert_comes_back(tmp_path, label)
            assert_roles(tmp_path, ["decode", "decode"])
        state = read_state(tmp_path / "detached")
    finally:
        down = run_cli("down", run_dir=tmp_path)
    assert down.returncode == 0, down.stderr
    assert processes_and_ports(state) == []


def assert_comes_back(run_dir: Path, label: str) -> None:
    """A process of a detached cluster that dies is started again."""
    before = read_state(run_dir / "detached")
    assert before is not None
    os.kill(before.processes[label].pid, signal.SIGKILL)
    log, deadline_s = run_dir / "detached/logs/keeper.log", time.monotonic() + 60
    while not (log.exists() and f"{label} is back" in log.read_text()):
        assert time.monotonic() < deadline_s, f"{label} was not started again"
        time.sleep(0.2)
    after = read_state(run_dir / "detached")
    assert after is not None
    assert after.processes[label].pid != before.processes[label].pid


def assert_roles(run_dir: Path, roles: list[str]) -> None:
    done = run_cli("status", "--json", run_dir=run_dir)
    assert done.returncode == 0, done.stderr
    assert sorted(node["role"] for node in json.loads(done.stdout)["nodes"]) == sorted(roles)
