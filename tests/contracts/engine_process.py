"""An engine in a process of its own: vLLM allows one per process, and a source must be free to die."""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


class EngineProcess:
    """What `make` makes there; every method of it can be called here."""

    def __init__(self, make: Callable[..., Any], *args: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(make, args, theirs), daemon=True)
        self._process.start()
        self._started = False

    def ready(self) -> None:
        """Wait until the engine has started. Safe to repeat."""
        if not self._started:
            self._answer(timeout_s=240.0)
            self._started = True

    def call(self, method: str, *args: Any) -> Any:
        """Call a method there. What it raises is raised here."""
        self._pipe.send((method, args))
        return self._answer(timeout_s=120.0)

    def _answer(self, timeout_s: float) -> Any:
        if not self._pipe.poll(timeout_s):
            raise TimeoutError("the engine's process does not answer")
        error, value = self._pipe.recv()
        if error is not None:
            raise error
        return value

    def stop(self) -> None:
        """SIGSTOP."""
        os.kill(self._pid, signal.SIGSTOP)

    def wake(self) -> None:
        """SIGCONT."""
        os.kill(self._pid, signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL, and wait."""
        self._process.kill()
        self._process.join(10)

    @property
    def _pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid


def _serve(make: Callable[..., Any], args: tuple[Any, ...], pipe: Connection) -> None:
    try:
        engine = make(*args)
    except Exception as error:  # noqa: BLE001 - the caller decides
        traceback.print_exc()
        pipe.send((RuntimeError(f"{type(error).__name__}: {error}"), None))
        return
    pipe.send((None, None))
    while True:
        try:
            method, values = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((None, getattr(engine, method)(*values)))
        except Exception as error:  # noqa: BLE001 - the caller decides
            traceback.print_exc()
            pipe.send((error, None))
