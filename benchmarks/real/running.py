"""Systems that run: started, kept to their cores, asked by a client that is a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import httpx
import msgspec
import psutil

from benchmarks.cluster_facts import TIMEOUT_S, Facts
from benchmarks.own_server import own_server
from benchmarks.real.client import Job, Seen
from benchmarks.real.site import Site
from benchmarks.real.systems import RealSystem
from benchmarks.startup import step
from coordinator.config import ClusterConfig
from coordinator.process_tree import end_with_parent
from engine.errors import EngineError

CLIENT = "benchmarks.real.client"
Answer = TypeVar("Answer")
ENGINE_TITLE = "EngineCore"  # what vLLM's server calls the process with the engine in it


@dataclass(frozen=True, slots=True)
class Running:
    """A system that takes requests. `pair`: prompts at the first target, the rest at the second."""

    targets: tuple[str, ...]
    pair: bool
    model: str
    client_cores: tuple[int, ...]

    def nodes(self) -> list[Facts]:
        """What the nodes of our cluster say of themselves."""
        response = httpx.get(f"{self.targets[0]}/cluster", timeout=TIMEOUT_S)
        response.raise_for_status()
        nodes: list[Facts] = response.json()["nodes"]
        return nodes

    def ask(self, job: Job, folder: Path, tell: Callable[[float], None]) -> list[Seen]:
        """Run a client process with this job, and read what it saw. Raises EngineError if it fails."""
        return self.run(CLIENT, job, list[Seen], folder, tell)

    def run(
        self,
        client: str,
        job: msgspec.Struct,
        answer: type[Answer],
        folder: Path,
        tell: Callable[[float], None],
    ) -> Answer:
        """The same with a client of another kind: a module that is given two files, the job and the answer."""
        asked, answered = folder / "job.json", folder / "seen.json"
        answered.unlink(missing_ok=True)
        asked.write_bytes(msgspec.json.encode(job))
        command = [sys.executable, "-m", client, str(asked), str(answered)]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=end_with_parent
        ) as process:
            os.sched_setaffinity(process.pid, self.client_cores)
            assert process.stdout is not None
            assert process.stderr is not None
            for line in process.stdout:
                tell(float(line))
            errors = process.stderr.read()
        if process.returncode != 0 or not answered.exists():
            raise EngineError(f"the client ended with status {process.returncode}:\n{errors[-2000:]}")
        return msgspec.json.decode(answered.read_bytes(), type=answer)


@contextmanager
def running(
    site: Site, system: RealSystem, config: ClusterConfig, logs: Path, tell: Callable[[str], None]
) -> Iterator[Running]:
    """Start it; everything ends with the block."""
    with (_ours if system.ours else _stock)(site, system, config, logs, tell) as started:
        yield started


def cores_of(engines: int, each: int = 1) -> tuple[tuple[tuple[int, ...], ...], tuple[int, ...]]:
    """The cores of each engine, and those of everything else: all of them, if none would be left.

    An engine has fewer than `each` where there are too few of them.
    """
    cores = sorted(os.sched_getaffinity(0))
    each = max(min(each, (len(cores) - 1) // engines), 1)
    own = tuple(tuple(cores[len(cores) - each * (at + 1) :][:each]) for at in reversed(range(engines)))
    return own, tuple(cores[: -engines * each]) or tuple(cores)


@contextmanager
def _ours(
    site: Site, system: RealSystem, config: ClusterConfig, logs: Path, tell: Callable[[str], None]
) -> Iterator[Running]:
    from coordinator.cluster_process import ClusterProcess

    with ClusterProcess.start(config, None, lambda event: tell(step(event))) as cluster:
        engines, others = cores_of(system.engines, site.engine_cores)
        everybody = [psutil.Process(pid) for pid in cluster.pids.values()]
        family = {one.pid for process in everybody for one in [process, *process.children(recursive=True)]}
        started = Running((cluster.base_url,), False, served_model(cluster.base_url), others)
        keep_apart(family, [int(node["pid"]) for node in started.nodes()], engines, others)
        yield started


@contextmanager
def _stock(
    site: Site, system: RealSystem, config: ClusterConfig, logs: Path, tell: Callable[[str], None]
) -> Iterator[Running]:
    others_children = {one.pid for one in psutil.Process().children(recursive=True)}  # of systems beside it
    with ExitStack() as stack:
        targets = []
        for number in range(system.engines):
            tell(f"vLLM's own server, {number + 1} of {system.engines}")
            server = own_server(config, logs / f"vllm-{number}.log", site.environment(number))
            targets.append(stack.enter_context(server))
        engines, others = cores_of(system.engines, site.engine_cores)
        family = psutil.Process().children(recursive=True)
        children = [one for one in family if one.pid not in others_children]
        found = sorted(one.pid for one in children if ENGINE_TITLE in _title(one))
        if len(found) != system.engines:
            raise EngineError(f"vLLM's servers have {len(found)} engine processes, not {system.engines}")
        keep_apart({one.pid for one in children}, found, engines, others)
        yield Running(tuple(targets), system.mode == "disaggregated", served_model(targets[0]), others)


def keep_apart(
    everybody: set[int], engines: Sequence[int], cores: Sequence[tuple[int, ...]], others: tuple[int, ...]
) -> None:
    """The thread that steps an engine alone on its core, as far as this run goes, and all the rest elsewhere.

    An engine's other threads wake a hundred times a second each, a dozen of them or more (gloo's for one): on
    its core they took a twentieth of its time, and what was in the caches.
    """
    for pid in everybody - set(engines):
        _pin(pid, others)
    for pid, core in zip(engines, cores, strict=True):
        _pin(pid, core[1:] or others)
        os.sched_setaffinity(_busiest_thread(pid), core[:1])


def _busiest_thread(pid: int) -> int:
    """The one that has computed most so far: it has loaded and warmed up the engine that it steps."""
    used = psutil.Process(pid).threads()
    return int(max(used, key=lambda thread: thread.user_time + thread.system_time).id)


def _pin(pid: int, cores: tuple[int, ...]) -> None:
    """With all the threads that it has; new ones follow the one that makes them."""
    try:
        threads = psutil.Process(pid).threads()
    except psutil.NoSuchProcess:
        return  # a helper that has ended
    for thread in threads:
        with suppress(ProcessLookupError):
            os.sched_setaffinity(thread.id, cores)


def _title(process: psutil.Process) -> str:
    try:
        return " ".join([process.name(), *process.cmdline()])
    except psutil.NoSuchProcess:
        return ""


def served_model(base_url: str) -> str:
    """The name that clients use."""
    response = httpx.get(f"{base_url}/v1/models", timeout=TIMEOUT_S)
    response.raise_for_status()
    return str(response.json()["data"][0]["id"])
