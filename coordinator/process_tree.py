"""Child processes that are found again and ended for certain, and no others.

Every process of a run carries the run's mark in its environment. Ray's workers overwrite theirs with a title,
so descendants of a marked process and members of its session count too.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

MARK = "SLOSSERVE_RUN_MARK"
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class ProcessId:
    """A process, told apart from a later one with the same pid by its start time (epoch seconds)."""

    pid: int
    started_s: float

    @classmethod
    def of(cls, pid: int) -> ProcessId:
        """The process that has this pid now. Raises psutil.NoSuchProcess."""
        return cls(pid, psutil.Process(pid).create_time())


def is_alive(process: ProcessId) -> bool:
    """Whether it still runs; a zombie does not."""
    return _find(process) is not None


def spawn(
    command: Sequence[str],
    *,
    environment: Mapping[str, str],
    output: Path,
    errors: Path,
    die_with_parent: bool,
) -> ProcessId:
    """Start a process in a session of its own, so that a ctrl-C in the terminal does not reach it.

    `die_with_parent`: it gets SIGTERM when the thread that called this ends; so call it from the main one.
    """
    with output.open("ab") as out, errors.open("ab") as err:
        child = _Child(
            list(command),
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
            preexec_fn=end_with_parent if die_with_parent else None,
        )
    return ProcessId.of(child.pid)


def processes_of(run_id: str, known: Iterable[ProcessId] = ()) -> list[psutil.Process]:
    """Every live process of a run except this one: marked, descended from those, or in their sessions."""
    roots = [process for process in map(_find, known) if process is not None]
    roots += [process for process in psutil.process_iter() if _mark_of(process) == run_id]
    found = {process.pid: process for process in roots}
    for root in roots:
        found.update((child.pid, child) for child in _descendants(root))
    sessions = {_session_of(process.pid) for process in roots} - {None, _session_of(os.getpid())}
    for process in psutil.process_iter():
        if _session_of(process.pid) in sessions:
            found[process.pid] = process
    found.pop(os.getpid(), None)
    return [process for process in found.values() if _runs(process)]


def end(processes: Iterable[psutil.Process], grace_s: float) -> None:
    """SIGTERM with all their descendants, and SIGKILL for those that are still there after `grace_s`."""
    everyone = {process.pid: process for process in processes}
    for process in list(everyone.values()):
        everyone.update((child.pid, child) for child in _descendants(process))
    for process in everyone.values():
        _signal(process, signal.SIGTERM)
    _, stubborn = psutil.wait_procs(list(everyone.values()), timeout=grace_s)
    for process in stubborn:
        _signal(process, signal.SIGKILL)
    psutil.wait_procs(stubborn, timeout=grace_s)


def end_one(process: ProcessId, grace_s: float) -> None:
    """SIGTERM to one process, which ends its own children; SIGKILL to it and its descendants when late."""
    found = _find(process)
    if found is None:
        _reap(process.pid)
        return
    family = [found, *_descendants(found)]
    _signal(found, signal.SIGTERM)
    _, late = psutil.wait_procs([found], timeout=grace_s)
    if late:
        for member in family:
            _signal(member, signal.SIGKILL)
        psutil.wait_procs(family, timeout=grace_s)


def end_family(process: ProcessId, grace_s: float) -> None:
    """SIGTERM to a process and all its descendants at once; SIGKILL to those there after `grace_s`."""
    found = _find(process)
    if found is None:
        _reap(process.pid)
        return
    end([found], grace_s)


def wait_gone(process: ProcessId, timeout_s: float) -> bool:
    """Whether a process that is not our child ended within `timeout_s`."""
    deadline_s = time.monotonic() + timeout_s
    while is_alive(process):
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.05)
    return True


class _Child(subprocess.Popen[bytes]):
    """Known by its ProcessId from here on: the object goes without a warning that the process runs."""

    def __del__(self) -> None:
        return


def _reap(pid: int) -> None:
    """Take the exit status of a child that ended on its own, so that no zombie stays."""
    try:
        os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return  # another process started it


def _find(process: ProcessId) -> psutil.Process | None:
    try:
        found = psutil.Process(process.pid)
        # Boot time, on which start times rest, is read anew and may round differently.
        return found if abs(found.create_time() - process.started_s) < 1 and _runs(found) else None
    except psutil.NoSuchProcess:
        return None


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _mark_of(process: psutil.Process) -> str | None:
    try:
        return process.environ().get(MARK)
    except (psutil.Error, OSError):  # of another user, or gone
        return None


def _descendants(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _session_of(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except OSError:
        return None


def _signal(process: psutil.Process, number: int) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return


def end_with_parent() -> None:
    """For `preexec_fn`: the child gets SIGTERM when the thread that starts it ends (on Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
