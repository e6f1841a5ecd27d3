"""A NIXL agent as vLLM's connector sees it, with the reads of KV watched.

vLLM attaches the notification that frees the source's blocks to the read itself. Here it is held back until
the lease word was checked; and what every request read is counted from NIXL's own telemetry.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


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
