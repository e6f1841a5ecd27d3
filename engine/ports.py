"""A port for an engine that binds it only later, when its model is loaded; and the interface of an address."""

from __future__ import annotations

import random
import socket

import psutil

from engine.errors import EngineStartError

# Below those that systems give to outgoing connections, which would take one that is free now by chance:
# vLLM waits for ever for a side channel that it cannot bind.
FIRST_PORT, LAST_PORT = 20_000, 29_999
MOST_TRIES = 100


def side_channel_port(host: str) -> int:
    """One that is free at `host` and that nobody is given who does not ask for it.

    Raises EngineStartError where none is found.
    """
    for _ in range(MOST_TRIES):
        port = random.randint(FIRST_PORT, LAST_PORT)
        with socket.socket() as probe:
            try:
                probe.bind((host, port))
            except OSError:
                continue
            return port
    raise EngineStartError(
        f"no free port between {FIRST_PORT} and {LAST_PORT} at {host}: free some, or check that {host} is an "
        "address of this machine"
    )


def interface_of(host: str) -> str | None:
    """The network interface of this machine that has the address `host`, None if it has none."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == host for address in addresses):
            return name
    return None
