"""The Ray actor that hosts a node. Ray places it, watches it and restarts it; work never passes through Ray.

What the engine prints goes to a log of the node's own, whose last lines are part of any start-up error.
"""

from __future__ import annotations

import gc
import importlib
import logging
import os
import sys
import threading
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

from engine import batch
from engine.base import Engine, EngineInfo, StepReport
from engine.cost import StepCost
from engine.errors import EngineStartError, SlosserveError
from engine.held import HeldEngine
from engine.models import resolve_model
from engine.node import Node
from engine.ports import side_channel_port
from engine.profile import StepProfile
from engine.request import RoleName
from engine.role import Role
from engine.socket import NodeSocket

LOG_TAIL_LINES = 20
# Python's own 5 ms would let a step's bookkeeping keep finished tokens from the thread that sends them.
SWITCH_INTERVAL_S = 0.0005


class Runs(Protocol):
    """What an actor hosts: a node, or a host of many."""

    def run(self) -> None:
        """Serve until `stop`."""

    def stop(self) -> None:
        """Ask `run` to return."""


class NodeActor:
    """`spec`: name, role, host, log, engine (kind and its settings), roles (name -> class path), limits.

    `step_profile` in the spec, the text of a profile, says what steps cost; without it a line is fitted at the
    start, and with `hold_steps` no step takes less. A model and a log are of the host that this runs on.
    `clock_skew_s` in the spec shifts this node's clock: a test proves that nobody depends on it.
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        self._spec = spec
        self._log = Path(spec["log"])
        self._node: Runs | None = None
        self._socket: NodeSocket | None = None
        self._lock = threading.Lock()
        self._ready: Future[None] | None = None
        _redirect_output(self._log)

    def start(self) -> dict[str, Any]:
        """Start the engine and serve, once: every call waits for the same start, or for a new one if it failed.

        Raises EngineStartError with the log's tail.
        """
        ready = self._begin()
        try:
            ready.result()
        except Exception as error:  # noqa: BLE001 - whatever it is, the caller is told
            # Ray pickles what an actor raises; a plain error of ours always survives that.
            raise EngineStartError(
                f"{self._spec['name']} did not start on {self._host()}: {error}\n"
                f"The last lines of its log ({self._log}):\n{self.log_tail(LOG_TAIL_LINES)}"
            ) from None
        return self.describe()

    def _begin(self) -> Future[None]:
        """The start that is going on or has succeeded; a new one if there is none."""
        with self._lock:
            if self._ready is None or (self._ready.done() and self._ready.exception() is not None):
                self._ready = Future()
                threading.Thread(target=self._run, args=(self._ready,), name="node", daemon=True).start()
            return self._ready

    def describe(self) -> dict[str, Any]:
        """Name, address of the socket, role now and process id."""
        assert isinstance(self._node, Node)
        assert self._socket is not None
        return {
            "name": self._spec["name"],
            "address": self._socket.address,
            "role": str(self._node.role),
            "pid": os.getpid(),
        }

    def log_tail(self, lines: int) -> str:
        """The last lines of the node's log."""
        _flush_output()
        text = self._log.read_text(errors="replace") if self._log.exists() else ""
        return "\n".join(text.splitlines()[-lines:])

    def stop(self) -> None:
        """Stop serving and free the engine."""
        if self._node is not None:
            self._node.stop()

    def _run(self, ready: Future[None]) -> None:
        try:
            node = self._build()
        except BaseException as error:
            logging.exception("start-up failed")
            ready.set_exception(error)
            return
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        gc.collect()
        gc.freeze()  # what start-up left is never garbage: looking through it again stalls a step
        ready.set_result(None)
        try:
            node.run()
        except Exception:
            # An engine that failed has lost its KV: end the process, and Ray starts a new one.
            logging.exception("the engine failed")
            time.sleep(0.3)  # let the socket say so first
            os._exit(1)

    def _host(self) -> str:
        """The address that others find this process at."""
        return self._spec["host"] or _host_in_ray()

    def _build(self) -> Runs:
        spec = self._spec
        host = self._host()
        settings = {
            **on_this_host(spec["engine"]),
            "engine_id": f"{spec['name']}-{uuid.uuid4().hex[:8]}",
            "side_channel_host": host,
            "side_channel_port": side_channel_port(host),
        }
        engine = build_engine(settings)
        if spec.get("hold_steps"):
            engine = HeldEngine(engine, StepProfile.parse(spec["step_profile"].encode()).cost)
        try:
            self._node = self._node_around(engine, engine.start(), host)
        except BaseException:
            try:
                engine.stop()
            except Exception:
                logging.exception("freeing an engine that did not start")
            raise
        return self._node

    def _node_around(self, engine: Engine, info: EngineInfo, host: str) -> Node:
        spec = self._spec
        skew_s = float(spec.get("clock_skew_s", 0.0))

        def clock() -> float:
            return time.monotonic() + skew_s

        batch.warm_up()
        cost = start_cost(engine.profile_step_times(), spec.get("step_profile"))
        roles: dict[RoleName, Role] = {RoleName(name): load(path)() for name, path in spec["roles"].items()}
        self._socket = NodeSocket(host, spec["name"], clock)
        return Node(
            spec["name"],
            engine,
            info,
            roles,
            RoleName(spec["role"]),
            cost,
            self._socket,
            clock=clock,
            max_waiting=int(spec["max_waiting"]),
            peer_silent_s=float(spec["peer_silent_s"]),
            session_ttl_s=float(spec["session_ttl_s"]),
            session_kv_share=float(spec["session_kv_share"]),
        )


def start_cost(reports: Sequence[StepReport], profile: str | None) -> StepCost:
    """What steps cost on an engine that has just started, from the steps that it measured then.

    `profile`: text of one of `slosserve profile fit`, which knows of attention what a few steps cannot tell.
    """
    return StepCost.fit(reports) if profile is None else StepProfile.parse(profile.encode()).cost_here(reports)


def on_this_host(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings with the folder that the model has here. Raises ConfigError if it is not here."""
    model = settings.get("model")
    return settings if model is None else settings | {"model": resolve_model(model)}


def build_engine(settings: dict[str, Any]) -> Engine:
    """The engine that `kind` names, with the rest as its settings."""
    kinds = {
        "vllm": ("engine.vllm:VllmEngine", "engine.vllm:VllmEngineConfig"),
        "virtual": ("engine.virtual:VirtualEngine", "engine.virtual:VirtualEngineConfig"),
    }
    settings = dict(settings)
    kind = settings.pop("kind")
    if kind not in kinds:
        raise SlosserveError(f"unknown kind of engine {kind!r}; there are {', '.join(kinds)}")
    engine_path, config_path = kinds[kind]
    engine: Engine = load(engine_path)(load(config_path)(**settings))
    return engine


def load(path: str) -> Any:
    """The object at `module:name`."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def _host_in_ray() -> str:
    """The address under which Ray knows this machine."""
    import ray

    return str(ray.util.get_node_ip_address())


def _flush_output() -> None:
    """Write out what this process has printed."""
    sys.stdout.flush()
    sys.stderr.flush()


def _redirect_output(log: Path) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.close(descriptor)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
