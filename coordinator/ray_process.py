"""A Ray of our own: one head, in a session, a temporary folder and ports of its own.

It is started apart from the coordinator, so a coordinator that dies takes no node along. It is ended by its
own process tree: `ray stop` would end every Ray of this user.
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from coordinator.config import ClusterConfig
from coordinator.process_tree import ProcessId, end_family, spawn
from coordinator.ray_head import PATIENCE

RAY_ENVIRONMENT = {
    # Ray would run its workers at nice 15, and our engines are workers: whatever else runs would starve them.
    "RAY_worker_niceness": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Workers are started for our nodes and no others: two cores have better to do.
    "RAY_enable_worker_prestart": "0",
    **PATIENCE,
}
# For our own Ray and who joins it. Else Ray 2.60 replaces a loopback address by that of the machine and listens
# on every interface. The variable is that of systems where it has no clusters, and keeps to loopback therefore.
LOOPBACK_ENVIRONMENT = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
# Workers go within half a second of SIGTERM; a raylet that had detached actors sits there for ten.
GRACE_S = 2.0


@dataclass(frozen=True, slots=True)
class RayHandle:
    """A Ray to use. `process` and `folder` are None where a running one was joined: it is not ours to end."""

    address: str
    process: ProcessId | None = None
    folder: Path | None = None

    @property
    def started(self) -> bool:
        """Whether the head is up: its raylet has opened the socket that drivers use."""
        return self.folder is None or (self.folder / "session_latest/sockets/raylet").exists()


def start_ray(
    config: ClusterConfig, logs: Path, environment: Mapping[str, str], *, die_with_parent: bool
) -> RayHandle:
    """Join the Ray that the configuration names, or start one. Returns at once: poll `started`."""
    if config.ray.address is not None:
        return RayHandle(config.ray.address)
    # Unix sockets live below it, and their paths may hold 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="slr-", dir="/tmp"))
    port, client_port = free_port(), free_port()
    log = logs / "ray.log"
    process = spawn(
        _command(config, folder, port, client_port),
        environment={**environment, **RAY_ENVIRONMENT, **LOOPBACK_ENVIRONMENT},
        output=log,
        errors=log,
        die_with_parent=die_with_parent,
    )
    return RayHandle(f"127.0.0.1:{port}", process, folder)


def stop_ray(handle: RayHandle, grace_s: float) -> None:
    """End a Ray that `start_ray` started, with all its workers, and remove its folder; leave a joined one."""
    if handle.process is not None:
        end_family(handle.process, min(grace_s, GRACE_S))
    if handle.folder is not None:
        shutil.rmtree(handle.folder, ignore_errors=True)


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _command(config: ClusterConfig, folder: Path, port: int, client_port: int) -> list[str]:
    gpus = config.engine.num_gpus * config.pools.total
    return [
        str(Path(sys.executable).with_name("ray")),
        "start",
        "--head",
        "--block",
        f"--port={port}",
        "--node-ip-address=127.0.0.1",
        f"--temp-dir={folder}",
        "--include-dashboard=false",
        "--include-log-monitor=false",
        "--disable-usage-stats",
        f"--object-store-memory={config.ray.object_store_mib * 2**20}",
        f"--num-cpus={config.ray.num_cpus or os.cpu_count() or 1}",
        *([] if gpus else ["--num-gpus=0"]),
        # Port 0 lets the kernel choose: two Rays in one machine would hand out the same numbers.
        "--min-worker-port=0",
        "--max-worker-port=0",
        "--dashboard-agent-listen-port=0",
        "--metrics-export-port=0",
        f"--ray-client-server-port={client_port}",
    ]
