"""The port of a side channel is free, and is none that an outgoing connection may be given meanwhile."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from engine import ports
from engine.errors import EngineStartError
from engine.ports import LAST_PORT, side_channel_port


def test_no_connection_is_given_the_port_meanwhile() -> None:
    given = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii").split()
    assert int(given[0]) > LAST_PORT
    assert side_channel_port("127.0.0.1") <= LAST_PORT


def test_a_port_that_is_taken_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        taken = holder.getsockname()[1]
        monkeypatch.setattr(ports, "FIRST_PORT", taken)
        monkeypatch.setattr(ports, "LAST_PORT", taken)
        with pytest.raises(EngineStartError, match="free some"):
            side_channel_port("127.0.0.1")
