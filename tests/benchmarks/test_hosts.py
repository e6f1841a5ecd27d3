"""Hosts made of namespaces: they reach each other, a cut is a cut, and nothing of them is left."""

from __future__ import annotations

import subprocess
import sys

import psutil
import pytest

from benchmarks.chaos.hosts import check_possible, hosts
from engine.errors import ConfigError

LISTEN = """
import socket, sys, time
server = socket.create_server((sys.argv[1], 5000))
print("up", flush=True)
time.sleep(60)
"""
CONNECT = "import socket, sys; socket.create_connection((sys.argv[1], 5000), float(sys.argv[2]))"


@pytest.fixture
def possible() -> None:
    try:
        check_possible()
    except ConfigError as error:
        pytest.skip(str(error))


@pytest.mark.usefixtures("possible")
def test_hosts_reach_each_other_unless_the_link_is_cut_and_leave_nothing() -> None:
    with hosts(2) as (one, other):
        server = subprocess.Popen(
            one.command([sys.executable, "-c", LISTEN, one.address]), stdout=subprocess.PIPE
        )
        assert server.stdout is not None
        assert server.stdout.readline() == b"up\n"
        connect = [sys.executable, "-c", CONNECT, one.address]
        other.run([*connect, "5"])
        other.cut()
        with pytest.raises(ConfigError, match="timed out"):
            other.run([*connect, "0.5"])
        other.mend()
        other.run([*connect, "5"])
        with one.entered():
            assert one.address in {at.address for at in psutil.net_if_addrs()["eth0"]}
        assert [process.pid for process in one.processes()] == [server.pid]
    server.wait(5)
    server.stdout.close()
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert one.name not in left
    assert one.lan not in left


def test_who_may_not_make_hosts_is_told_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(ConfigError, match="run this as root"), hosts(2):
        pass
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(ConfigError, match="install iproute2"), hosts(2):
        pass
