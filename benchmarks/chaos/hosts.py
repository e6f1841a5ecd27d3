"""Several hosts on one machine: network namespaces joined by a bridge, whose links can be cut.

with hosts(2) as (head, other):
    other.run(["ray", "start", "--address", f"{head.address}:6379"])
    with head.entered():  # this thread, and all that it starts
        ...
    other.cut()

Each has an address of its own in a network that nobody else reaches: the bridge lives in a namespace too.
Files and processes are those of the machine.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import psutil

from coordinator.process_tree import end
from engine.errors import ConfigError

NETWORK = "10.77.0"
PREFIX = "slosserve-"  # then the process that made it
MOST_HOSTS = 200
CLONE_NEWNET = 0x40000000
GRACE_S = 3.0


@dataclass(frozen=True, slots=True)
class Host:
    """One of them. `lan` is the namespace of the bridge, `port` the host's link there."""

    name: str
    address: str
    lan: str
    port: str

    def command(self, command: Sequence[str]) -> list[str]:
        """What runs `command` here."""
        return ["ip", "netns", "exec", self.name, *command]

    def run(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
        """Run to the end, and what it printed. Raises ConfigError with that if it fails."""
        return _run(self.command(command), environment)

    def cut(self) -> None:
        """Nothing comes in or goes out any more; the host reaches itself."""
        _run(["ip", "-n", self.lan, "link", "set", self.port, "down"])

    def mend(self) -> None:
        """The link is there again."""
        _run(["ip", "-n", self.lan, "link", "set", self.port, "up"])

    def slow(self, mbit_per_s: int) -> None:
        """The link carries so much each way from now on, so that a transfer lasts. It was as fast as memory."""
        bucket = ["tbf", "rate", f"{mbit_per_s}mbit", "burst", "256kb", "latency", "50ms"]
        for namespace, device in self._ends:
            _run(["tc", "-n", namespace, "qdisc", "replace", "dev", device, "root", *bucket])

    def quicken(self) -> None:
        """As fast as before `slow`."""
        for namespace, device in self._ends:
            _run(["tc", "-n", namespace, "qdisc", "del", "dev", device, "root"])

    @property
    def _ends(self) -> tuple[tuple[str, str], ...]:
        """The two ends of the link, each with its namespace."""
        return (self.lan, self.port), (self.name, "eth0")

    def processes(self) -> list[psutil.Process]:
        """What runs here, but for this process."""
        return _processes_in(self.name)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """This thread is here, and the threads and processes that it starts, until the block ends."""
        with open("/proc/thread-self/ns/net") as before, open(f"/run/netns/{self.name}") as here:
            _enter(here.fileno())
            try:
                yield
            finally:
                _enter(before.fileno())


@contextmanager
def hosts(count: int) -> Iterator[list[Host]]:
    """So many hosts, 10.77.0.1 and up; with the block ends whatever runs on them, and they.

    Raises ConfigError where the machine cannot have them.
    """
    check_possible()
    if count > MOST_HOSTS:
        raise ConfigError(f"{count} hosts are more than {MOST_HOSTS}")
    _sweep()
    prefix = f"{PREFIX}{os.getpid()}"
    lan = f"{prefix}-lan"
    made = [Host(f"{prefix}-{at}", f"{NETWORK}.{at + 1}", lan, f"host{at}") for at in range(count)]
    with ExitStack() as stack:
        _namespace(stack, lan)
        _run(["ip", "-n", lan, "link", "add", "bridge0", "type", "bridge"])
        _run(["ip", "-n", lan, "link", "set", "bridge0", "up"])
        for host in made:
            _namespace(stack, host.name)
            stack.callback(_end_all, host.name)
            _join(host)
        yield made


def check_possible() -> None:
    """Raises ConfigError, with the reason, where this user of this machine cannot make hosts."""
    if os.geteuid() != 0:
        raise ConfigError("hosts are network namespaces, which only root may make: run this as root")
    if shutil.which("ip") is None:
        raise ConfigError("hosts are made with `ip`, which is not here: install iproute2")


def _namespace(stack: ExitStack, name: str) -> None:
    _run(["ip", "netns", "add", name])
    stack.callback(_run, ["ip", "netns", "del", name])


def _join(host: Host) -> None:
    """A cable from the host to the bridge."""
    far = ["peer", "name", "eth0", "netns", host.name]
    _run(["ip", "-n", host.lan, "link", "add", host.port, "type", "veth", *far])
    _run(["ip", "-n", host.lan, "link", "set", host.port, "master", "bridge0", "up"])
    _run(["ip", "-n", host.name, "addr", "add", f"{host.address}/24", "dev", "eth0"])
    for device in ("lo", "eth0"):
        _run(["ip", "-n", host.name, "link", "set", device, "up"])


def _end_all(name: str) -> None:
    """A namespace lives as long as a process in it does."""
    end(_processes_in(name), GRACE_S)


def _processes_in(name: str) -> list[psutil.Process]:
    pids = map(int, _run(["ip", "netns", "pids", name]).split())
    return [psutil.Process(pid) for pid in pids if pid != os.getpid() and psutil.pid_exists(pid)]


def _sweep() -> None:
    """Take down the hosts of those who were killed before they could."""
    for line in _run(["ip", "netns", "list"]).splitlines():
        name = line.split()[0]
        maker = name.removeprefix(PREFIX).partition("-")[0]
        if name.startswith(PREFIX) and maker.isdigit() and not psutil.pid_exists(int(maker)):
            _end_all(name)
            _run(["ip", "netns", "del", name])


def _enter(namespace: int) -> None:
    if ctypes.CDLL(None, use_errno=True).setns(namespace, CLONE_NEWNET) != 0:
        raise ConfigError(f"the network namespace cannot be entered: {os.strerror(ctypes.get_errno())}")


def _run(command: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    merged = None if environment is None else {**os.environ, **environment}
    done = subprocess.run(command, env=merged, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip()[-2000:]
        raise ConfigError(f"`{' '.join(map(str, command))}` failed: {said}")
    return done.stdout
