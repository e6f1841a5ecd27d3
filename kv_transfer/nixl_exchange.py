"""What the scheduler's and the worker's half of the connector, and the port of the node, share.

vLLM makes the two halves itself, one after the other. The engine is stepped inside the node's process, so all
three meet here, under the engine's id. Everything is used from the thread that steps the engine.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from kv_transfer.nixl_memory import Offers, SideMemory
from kv_transfer.pulls import PullLedger


@dataclass(slots=True)
class HeldPull:
    """A pull that failed with bytes under way. `blocks` once the scheduler has set them aside."""

    handles: list[Any]
    blocks: list[Any] | None = None


class Exchange:
    """State of one engine's end of the transfer. `checksum`: its blocks are summed up and compared."""

    def __init__(self, engine_id: str) -> None:
        self.engine_id = engine_id
        self.memory = SideMemory()
        self.offers = Offers(self.memory.words)
        self.pulls = PullLedger()
        self.held: dict[str, HeldPull] = {}
        self.checksum = True
        self.scheduler: Any = None
        self.worker: Any = None


@dataclass(slots=True)
class _Registry:
    exchanges: dict[str, Exchange] = field(default_factory=dict)


_REGISTRY = _Registry()


def exchange_of(engine_id: str) -> Exchange:
    """The exchange of an engine in this process; the first half of the connector that asks makes it."""
    return _REGISTRY.exchanges.setdefault(engine_id, Exchange(engine_id))


def find_exchange(engine_id: str) -> Exchange | None:
    """The exchange of an engine in this process, None if it has none (or has been shut down)."""
    return _REGISTRY.exchanges.get(engine_id)


def forget_exchange(engine_id: str) -> None:
    """The engine has shut down."""
    _REGISTRY.exchanges.pop(engine_id, None)
