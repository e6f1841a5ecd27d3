"""Whether Ray's head is there. Requests and streams do not need it; the restart of a node does.

A process that talks to Ray kills itself when the head (its GCS) has been gone for
`RAY_gcs_rpc_server_reconnect_timeout_s`, 60 s by default: the coordinator, the nodes, and the raylet of each
host, which takes its nodes along. Ours are told to wait for longer; a raylet is told by whoever starts it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import Any

logger = logging.getLogger(__name__)

PATIENCE = {"RAY_gcs_rpc_server_reconnect_timeout_s": "86400"}
LOOK_EVERY_S = 1.0
ANSWER_S = 1.0
MOST_UNANSWERED = 2
LOST = (
    "Ray's head at {address} is gone. Running streams and new requests go on. A node that dies meanwhile does"
    " not come back, nodes cannot be added, and a host whose raylet was not started with"
    " RAY_gcs_rpc_server_reconnect_timeout_s ends its nodes after 60 s. With RAY_REDIS_ADDRESS: start the head"
    " again as it was. Without, Ray has forgotten the cluster: `slosserve down`, start Ray and `up` anew."
)


class RayHead:
    """Looks now and then whether somebody listens at `address`, HOST:PORT."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._unanswered = 0
        self._lost_s: float | None = None

    def state(self) -> dict[str, Any]:
        """For `/cluster`: where it is, whether it is there, and what its loss means."""
        if self._lost_s is None:
            return {"address": self._address, "head": "ready"}
        words = LOST.format(address=self._address)
        lost_s = round(time.monotonic() - self._lost_s, 1)
        return {"address": self._address, "head": "lost", "lost_s": lost_s, "says": words}

    async def watch(self) -> None:
        """Until cancelled."""
        while True:
            self._note(await self._answers())
            await asyncio.sleep(LOOK_EVERY_S)

    def _note(self, answers: bool) -> None:
        self._unanswered = 0 if answers else self._unanswered + 1
        if answers and self._lost_s is not None:
            logger.warning("Ray's head at %s is back", self._address)
            self._lost_s = None
        elif self._unanswered == MOST_UNANSWERED:
            logger.warning("%s", LOST.format(address=self._address))
            self._lost_s = time.monotonic()

    async def _answers(self) -> bool:
        host, _, port = self._address.rpartition(":")
        with contextlib.suppress(OSError, TimeoutError):
            _, writer = await asyncio.wait_for(asyncio.open_connection(host, int(port)), ANSWER_S)
            writer.close()
            return True
        return False
