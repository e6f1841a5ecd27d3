"""A NIXL agent as vLLM's connector sees it, with the reads of KV watched.

vLLM attaches the notification that frees the source's blocks to the read itself. Here it is held back until
the lease word was checked; and what every request read is counted from NIXL's own telemetry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# How long NIXL's progress thread may sleep when nothing comes. It wakes up for what does.
_PROGRESS_SLEEP_US = 1000


class _RestingBinding:
    """NIXL's binding, but for the agents made by it: their progress thread sleeps."""

    def __init__(self, binding: Any) -> None:
        self._binding = binding

    def __getattr__(self, name: str) -> Any:
        return getattr(self._binding, name)

    def nixlAgent(self, name: str, config: Any) -> Any:  # noqa: N802 - the binding's name
        config.pthrDelay = _PROGRESS_SLEEP_US
        return self._binding.nixlAgent(name, config)


@contextmanager
def resting_progress(agent_class: Any) -> Iterator[None]:
    """Agents of `agent_class` made in here do not spin.

    NIXL 1.5.1 sets a delay of 0 in Python, with no way to ask for another: its progress thread then takes a
    whole core of an idle engine, and on two cores makes every read slower (README).
    """
    scope = agent_class.__init__.__globals__
    binding = scope["nixlBind"]
    scope["nixlBind"] = _RestingBinding(binding)
    try:
        yield
    finally:
        scope["nixlBind"] = binding


def is_under_way(agent: Any, handle: Any) -> bool:
    """Whether a read may still bring bytes. An error ends it: a failed endpoint delivers nothing more."""
    try:
        return bool(agent.check_xfer_state(handle) == "PROC")
    except Exception:  # noqa: BLE001 - NIXL has one exception class per status
        return False


class WatchedAgent:
    """Passes everything on to the agent, but for reads made between `watch` and `stop_watching`."""

    def __init__(self, agent: Any, moved: Callable[[str, int], None]) -> None:
        self._agent = agent
        self._moved = moved
        self._request_id: str | None = None
        self._held_back: list[bytes] = []
        self._readers: dict[Any, str] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._agent, name)

    def watch(self, request_id: str) -> None:
        """Reads from now on belong to `request_id`, and carry no notification."""
        self._request_id = request_id

    def stop_watching(self) -> list[bytes]:
        """The notifications that were held back since `watch`."""
        self._request_id = None
        held, self._held_back = self._held_back, []
        return held

    def make_prepped_xfer(self, operation: str, *sides: Any, notif_msg: bytes = b"", **kwargs: Any) -> Any:
        """As NIXL's own; a watched read goes without its notification."""
        if self._request_id is None or operation != "READ":
            return self._agent.make_prepped_xfer(operation, *sides, notif_msg=notif_msg, **kwargs)
        handle = self._agent.make_prepped_xfer(operation, *sides, **kwargs)
        self._readers[handle] = self._request_id
        if notif_msg:
            self._held_back.append(notif_msg)
        return handle

    def get_xfer_telemetry(self, handle: Any) -> Any:
        """As NIXL's own; vLLM asks once for every read that is done."""
        telemetry = self._agent.get_xfer_telemetry(handle)
        if (reader := self._readers.get(handle)) is not None:
            self._moved(reader, telemetry.totalBytes)
        return telemetry

    def release_xfer_handle(self, handle: Any) -> None:
        """As NIXL's own. Raises what NIXL raises if the handle cannot be released."""
        self._agent.release_xfer_handle(handle)
        self._readers.pop(handle, None)
