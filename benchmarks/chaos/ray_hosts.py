"""A Ray of several hosts for a cluster to join, as a user starts one: a head, and the others that join it."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.chaos.hosts import Host, hosts
from coordinator.ray_process import RAY_ENVIRONMENT

PORT = 6379
# Between hosts, bytes that take a short cut through shared memory would not notice that a link is cut.
UCX_TLS = "tcp,self"
RAYLET_ENDS_S = 16.0  # then it is killed, as `ray stop` does


@dataclass(frozen=True, slots=True)
class RayHosts:
    """Hosts with a Ray, the head on the first. Without any a cluster starts a Ray of its own."""

    hosts: list[Host]

    @property
    def settings(self) -> dict[str, Any]:
        """Of a cluster that runs on them."""
        if not self.hosts:
            return {}
        return {"ray.address": f"{self.hosts[0].address}:{PORT}", "engine.env.UCX_TLS": UCX_TLS}

    def nodes_left(self) -> int:
        """Processes of engines, on all hosts."""
        names = ["".join(process.cmdline()) for host in self.hosts for process in host.processes()]
        return sum(name.startswith("ray::NodeActor") for name in names)

    def stop_ray(self) -> None:
        """As `ray stop` on every host: raylets end, and nodes with them. Without a head none else ends them."""
        raylets = [one for host in self.hosts for one in host.processes() if one.name() == "raylet"]
        for raylet in raylets:
            raylet.terminate()
        for raylet in psutil.wait_procs(raylets, RAYLET_ENDS_S)[1]:
            raylet.kill()
        deadline_s = time.monotonic() + RAYLET_ENDS_S
        while self.nodes_left() and time.monotonic() < deadline_s:
            time.sleep(0.1)


@contextmanager
def ray_hosts(count: int) -> Iterator[RayHosts]:
    """So many hosts with a Ray on them, each with the cores of the machine; this thread is on the head's.

    One is this machine as it is. Raises ConfigError where the machine cannot have more.
    """
    if count == 1:
        yield RayHosts([])
        return
    folder = Path(tempfile.mkdtemp(prefix="slr-", dir="/tmp"))
    try:
        with hosts(count) as made:
            for at, host in enumerate(made):
                _start_ray(host, made[0], folder / str(at))
            with made[0].entered():
                yield RayHosts(made)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _start_ray(host: Host, head: Host, folder: Path) -> None:
    joins = [f"--address={head.address}:{PORT}"]
    heads = ["--head", f"--port={PORT}", "--include-dashboard=false", "--include-log-monitor=false"]
    command = [
        str(Path(sys.executable).with_name("ray")),
        "start",
        *(heads if host is head else joins),
        f"--node-ip-address={host.address}",
        f"--temp-dir={folder}",
        "--disable-usage-stats",
        f"--object-store-memory={100 * 2**20}",
        f"--num-cpus={os.cpu_count() or 1}",
        "--num-gpus=0",
    ]
    host.run(command, RAY_ENVIRONMENT)
