"""A whole cluster as one thing to start and stop: Ray, the coordinator process, the endpoint processes.

The coordinator and the endpoints say how they get on by lines of JSON on stdout, which goes to a file: who
started them may leave, and they go on. What goes wrong while starting ends everything that was started.
"""

from __future__ import annotations

import os
import secrets
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from coordinator.cluster import node_environment
from coordinator.config import ClusterConfig, load_config
from coordinator.listeners import check_ports_free, free_ports, is_loopback
from coordinator.process_events import ProcessEvents, tail
from coordinator.process_tree import MARK, ProcessId, is_alive, spawn
from coordinator.ray_process import LOOPBACK_ENVIRONMENT, RayHandle, start_ray
from coordinator.run_state import COORDINATOR, ENDPOINT, KEEPER, RAY, RunState, read_state, run_directory
from coordinator.run_stop import deaf_to_interrupts, stop_run
from engine.errors import ConfigError, EngineStartError
from engine.models import resolve_model

Progress = Callable[[dict[str, Any]], None]
POLL_S = 0.05
COORDINATOR_MODULE = "coordinator.serve"
ENDPOINT_MODULE = "coordinator.endpoint.serve"
KEEPER_MODULE = "coordinator.keeper"


@dataclass(slots=True)
class ClusterProcess:
    """A cluster that runs. Leaving the `with` block, or `stop()`, ends every process of it.

    Made by `start`. `detach` leaves it running after this process ends; until then `stop` works all the same.
    """

    config: ClusterConfig
    run_dir: Path
    state: RunState
    detach: bool = False
    coordinator_module: str = COORDINATOR_MODULE
    endpoint_module: str = ENDPOINT_MODULE
    progress: Progress = field(default=lambda event: None)
    _events: dict[str, ProcessEvents] = field(default_factory=dict)

    @classmethod
    def start(
        cls,
        config: ClusterConfig | str | Path,
        overrides: Mapping[str, Any] | None = None,
        progress: Progress | None = None,
        *,
        detach: bool = False,
        coordinator_module: str = COORDINATOR_MODULE,
        endpoint_module: str = ENDPOINT_MODULE,
    ) -> Self:
        """Start everything and wait until it is ready, within `timeouts.ready_s`.

        `config`: ready-made (then `overrides` must be empty), a file, or the name of one that ships. Call it
        from the main thread. Raises ConfigError before anything is started, EngineStartError after.
        """
        if not isinstance(config, ClusterConfig):
            config = load_config(config, overrides)
        elif overrides:
            raise ConfigError("overrides go with a file or a name; a ready-made configuration takes none.")
        progress = progress or (lambda event: None)
        run_dir = _fresh_run_directory(config)
        config = _checked(config, progress)
        config.write(run_dir)
        state = RunState(
            name=config.name,
            run_id=uuid.uuid4().hex,
            owner=None if detach else ProcessId.of(os.getpid()),
            ports=[config.endpoint.port + index for index in range(config.endpoint.count)],
        )
        cluster = cls(config, run_dir, state, detach, coordinator_module, endpoint_module, progress)
        try:
            cluster._start()
        except BaseException:
            cluster.stop()
            raise
        return cluster

    @classmethod
    def of_run(cls, run_dir: Path) -> Self:
        """The detached cluster of a run directory. Raises ConfigError if there is none."""
        state = read_state(run_dir)
        if state is None:
            raise ConfigError(f"no cluster runs in {run_dir}")
        return cls(ClusterConfig.read(run_dir), run_dir, state, detach=True)

    @property
    def base_url(self) -> str:
        """Of the first endpoint, without /v1."""
        return self.state.urls[0]

    @property
    def admin_key(self) -> str | None:
        """What the administrative routes ask for, if anything."""
        return self.config.endpoint.admin_key

    @property
    def pids(self) -> dict[str, int]:
        """Process ids by label: ray, coordinator, endpoint-0, ..."""
        return {label: process.pid for label, process in self.state.processes.items()}

    def ended(self) -> dict[str, str]:
        """Processes that ended on their own, with the last lines of their logs."""
        return {
            label: _log_tail(self.run_dir, label)
            for label, process in self.state.processes.items()
            if not is_alive(process)
        }

    def restart(self, label: str) -> None:
        """Start a new coordinator or endpoint in the place of one that ended, and wait until it is ready."""
        self._spawn(label, self._module(label))
        self._wait_ready([label])

    def stop(self) -> None:
        """End the endpoints, the coordinator, the nodes and Ray, in this order. Twice does no harm."""
        with deaf_to_interrupts():
            stop_run(self.state, self.run_dir, self.config)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _start(self) -> None:
        ray = self._start_ray()
        self.config = self.config.model_copy(
            update={"ray": self.config.ray.model_copy(update={"address": ray.address})}
        )
        self.config.write(self.run_dir)
        # An endpoint needs no Ray: it loads while Ray and the nodes do.
        endpoints = [f"{ENDPOINT}{index}" for index in range(self.config.endpoint.count)]
        for label in endpoints:
            self._spawn(label, self._module(label))
        self._wait_for_ray(ray)
        self._spawn(COORDINATOR, self._module(COORDINATOR))
        self._wait_ready([COORDINATOR, *endpoints])
        urls = [str(self._events[label].ready["url"]) for label in endpoints]
        self._keep(replace(self.state, urls=urls))
        if self.detach:
            self._spawn(KEEPER, [KEEPER_MODULE, str(self.run_dir)])

    def _module(self, label: str) -> list[str]:
        if label == COORDINATOR:
            return [self.coordinator_module, str(self.run_dir)]
        return [self.endpoint_module, str(self.run_dir), label.removeprefix(ENDPOINT)]

    def _start_ray(self) -> RayHandle:
        self._keep(self.state)
        logs = self.run_dir / "logs"
        ray = start_ray(self.config, logs, self._environment(), die_with_parent=not self.detach)
        processes = {RAY: ray.process} if ray.process else {}
        folder = str(ray.folder) if ray.folder else None
        self._keep(replace(self.state, processes=processes, ray_address=ray.address, ray_folder=folder))
        self._tell(RAY, "starting", ray.address)
        return ray

    def _wait_for_ray(self, ray: RayHandle) -> None:
        deadline_s = time.monotonic() + self.config.timeouts.ray_start_s
        while not ray.started:
            if ray.process is not None and not is_alive(ray.process):
                raise EngineStartError(f"Ray did not start:\n{_log_tail(self.run_dir, RAY)}")
            if time.monotonic() > deadline_s:
                raise EngineStartError(
                    f"Ray was not up within {self.config.timeouts.ray_start_s:.0f} s"
                    f" (timeouts.ray_start_s):\n{_log_tail(self.run_dir, RAY)}"
                )
            self._take_events()
            time.sleep(POLL_S)
        self._tell(RAY, "ready", ray.address)

    def _spawn(self, label: str, module: list[str]) -> None:
        output = self.run_dir / "logs" / f"{label}.jsonl"
        output.unlink(missing_ok=True)
        process = spawn(
            [sys.executable, "-m", *module],
            environment=self._environment(),
            output=output,
            errors=self.run_dir / "logs" / f"{label}.log",
            die_with_parent=not self.detach,
        )
        self._events[label] = ProcessEvents(label, output)
        self._keep(replace(self.state, processes={**self.state.processes, label: process}))
        self._tell(label, "starting", f"pid {process.pid}")

    def _environment(self) -> dict[str, str]:
        ours = {MARK: self.state.run_id, "PYTHONUNBUFFERED": "1"}
        own_ray = LOOPBACK_ENVIRONMENT if self.state.ray_folder else {}
        return {**os.environ, **node_environment(self.config), **own_ray, **ours}

    def _wait_ready(self, labels: list[str]) -> None:
        deadline_s = time.monotonic() + self.config.timeouts.ready_s
        while waiting := [label for label in labels if not self._events[label].ready]:
            self._take_events()
            for label in waiting:
                self._check_alive(label)
            if time.monotonic() > deadline_s:
                raise EngineStartError(
                    f"not ready within {self.config.timeouts.ready_s:.0f} s (timeouts.ready_s):"
                    f" {', '.join(waiting)}. Logs: {self.run_dir / 'logs'}\n"
                    f"{_log_tail(self.run_dir, waiting[0])}"
                )
            time.sleep(POLL_S)

    def _check_alive(self, label: str) -> None:
        if is_alive(self.state.processes[label]):
            return
        self._take_events()  # its last words may say why
        if not self._events[label].ready:
            raise EngineStartError(
                f"the {label} process ended while starting. The last lines of its log"
                f" ({self.run_dir / 'logs' / f'{label}.log'}):\n{_log_tail(self.run_dir, label)}"
            )

    def _take_events(self) -> None:
        for events in self._events.values():
            for event in events.take():
                self.progress({"process": events.label, **event})
                if event.get("event") == "failed":
                    raise EngineStartError(str(event.get("error", "no reason given")))

    def _tell(self, process: str, state: str, detail: str) -> None:
        self.progress({"event": "process", "process": process, "state": state, "detail": detail})

    def _keep(self, state: RunState) -> None:
        self.state = state
        state.write(self.run_dir)


def _checked(config: ClusterConfig, progress: Progress) -> ClusterConfig:
    """With ports and the model's folder filled in; the model is made if it is one of ours.

    Raises ConfigError for what cannot start.
    """
    endpoint = config.endpoint
    if endpoint.port == 0:
        endpoint = endpoint.model_copy(update={"port": free_ports(endpoint.count)})
    if endpoint.admin_key is None and not is_loopback(endpoint.host):
        # Who may ask may not change the cluster, too. `slosserve` finds the key in the run's configuration.
        endpoint = endpoint.model_copy(update={"admin_key": secrets.token_urlsafe(24)})
    check_ports_free(endpoint.host, range(endpoint.port, endpoint.port + endpoint.count))
    progress({"event": "process", "process": "model", "state": "starting", "detail": config.model})
    model = resolve_model(config.model)
    progress({"event": "process", "process": "model", "state": "ready", "detail": model})
    served = config.served_model_name or config.model
    # Found by the model's name, which is about to become a path.
    profile = None if config.engines == "virtual" else config.step_profile
    engine = config.engine.model_copy(update={"step_profile": None if profile is None else str(profile)})
    return config.model_copy(
        update={"model": model, "served_model_name": served, "endpoint": endpoint, "engine": engine}
    )


def _fresh_run_directory(config: ClusterConfig) -> Path:
    run_dir = run_directory(config.name)
    old = read_state(run_dir)
    if old is not None and old.running:
        raise ConfigError(
            f"a cluster named {config.name!r} runs already (in {run_dir}). Stop it with"
            f" `slosserve down --name {config.name}`, or give this one another name (--set name=...)."
        )
    if old is not None:
        stop_run(old, run_dir, config)  # what a killed run has left
    # An endpoint that found the address of an earlier coordinator would wait for it.
    shutil.rmtree(run_dir, ignore_errors=True)
    (run_dir / "logs").mkdir(parents=True)
    return run_dir


def _log_tail(run_dir: Path, label: str, lines: int = 20) -> str:
    return tail(run_dir / "logs" / f"{label}.log", lines)
