"""The coordinator process: `python -m coordinator.serve RUN_DIR`.

Joins the cluster's Ray, starts what nodes are not there yet, finds those that are, and serves. Prints lines of
JSON about its start: {"event": "node", "name", "state", "detail"}, then {"event": "ready", "address"}, or
{"event": "failed", "error"}. Its address is written to RUN_DIR/coordinator.json, where endpoints look for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
import sys
from pathlib import Path
from typing import Any

import zmq.asyncio  # noqa: F401 - before uvloop takes over the event loop

from coordinator.cluster import Cluster
from coordinator.config import ClusterConfig
from coordinator.endpoint.links import ADDRESS_FILE
from coordinator.service import Coordinator
from engine.errors import SlosserveError
from engine.request import RoleName

logger = logging.getLogger(__name__)


def say(event: str, **details: Any) -> None:
    """One line of progress for the parent."""
    print(json.dumps({"event": event, **details}), flush=True)


def node_names(config: ClusterConfig) -> dict[str, RoleName]:
    """The nodes that a configuration asks for, by name, with the role that each starts in."""
    return {
        f"{role}-{index}": role
        for role in RoleName
        for index in range(getattr(config.pools, str(role)))
    }


async def serve(run_dir: Path) -> None:
    """Serve until SIGTERM or SIGINT."""
    config = ClusterConfig.read(run_dir)
    cluster = Cluster(config, run_dir)

    async def revive(name: str) -> str | None:
        return await asyncio.to_thread(cluster.revive, name)

    coordinator = Coordinator(
        config.model,
        f"tcp://{config.endpoint.host if config.ray.address is None else cluster.host}",
        node_silent_s=config.timeouts.node_silent_s,
        revive=revive,
    )
    _write_address(run_dir, coordinator.address)
    names = node_names(config)
    coordinator.expect(names)
    serving = asyncio.create_task(coordinator.run())
    await asyncio.to_thread(cluster.connect)
    await asyncio.gather(*(_start(cluster, coordinator, name, role) for name, role in names.items()))
    while not coordinator.ready:
        await asyncio.sleep(0.05)
    say("ready", address=coordinator.address)
    await serving


async def _start(cluster: Cluster, coordinator: Coordinator, name: str, role: RoleName) -> None:
    say("node", name=name, state="loading", role=str(role))
    try:
        node = await asyncio.to_thread(cluster.start_node, name, role)
    except SlosserveError as error:
        say("node", name=name, state="failed", detail=str(error))
        raise
    coordinator.add_node(name, node["address"])
    say("node", name=name, state="ready", detail=f"pid {node['pid']}", role=node["role"])


def _write_address(run_dir: Path, address: str) -> None:
    temporary = run_dir / (ADDRESS_FILE + ".new")
    temporary.write_text(json.dumps({"address": address}), encoding="utf-8")
    temporary.replace(run_dir / ADDRESS_FILE)


def main() -> None:
    """Entry point."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with contextlib.suppress(KeyboardInterrupt):
        try:
            asyncio.run(serve(Path(sys.argv[1])))
        except SystemExit:
            raise
        except BaseException as error:
            say("failed", error=str(error))
            raise


if __name__ == "__main__":
    main()
