"""TCP ports of this machine: whether they are free, and who has them."""

from __future__ import annotations

import ipaddress
import random
import socket
from collections.abc import Iterable

import psutil

from engine.errors import ConfigError

# Below those that systems give to outgoing connections (32768 and up, or 49152): one of these could take a port
# between its choice and its use. Side channels of NIXL begin at 20000.
CHOSEN_PORTS = range(10_240, 20_000)


def check_ports_free(host: str, ports: Iterable[int]) -> None:
    """Raises ConfigError naming the first port that cannot be had, who has it, and what to do."""
    for port in ports:
        trouble = _trouble(host, port)
        if trouble:
            raise ConfigError(
                f"port {port} on {host} {trouble}. Stop what uses it, or choose another port with --port."
            )


def free_ports(count: int) -> int:
    """The first of `count` free ports in a row. Raises ConfigError if there are none to be found."""
    chance = random.SystemRandom()  # whoever seeds the usual one would get the ports of somebody else
    for _ in range(100):
        first = chance.choice(CHOSEN_PORTS)
        if not any(_trouble("", port) for port in range(first, first + count)):
            return first
    raise ConfigError(f"no {count} free ports in a row on this machine. Choose them with --port.")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens at `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listener(port: int) -> str | None:
    """Name and pid of the process that listens on a port, as far as this user may know."""
    for connection in psutil.net_connections(kind="tcp"):
        at = connection.laddr[1:2]
        if connection.status == psutil.CONN_LISTEN and at == (port,) and connection.pid:
            return f"{psutil.Process(connection.pid).name()} (pid {connection.pid})"
    return None


def _trouble(host: str, port: int) -> str | None:
    try:
        family, _, _, _, address = socket.getaddrinfo(host or "0.0.0.0", port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        return f"cannot be had: {error}"
    with socket.socket(family) as probe:
        # As the server will: a port in TIME_WAIT is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            by = _named(port)
            return f"is in use by {by}" if by else f"cannot be had: {error.strerror}"
    return None


def _named(port: int) -> str | None:
    try:
        return listener(port)
    except psutil.Error:
        return None
