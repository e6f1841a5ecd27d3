"""Virtual engines for tests: quick ones on the wall clock, and any on a clock that stands still."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from engine.cost import StepCost
from engine.virtual import VirtualEngine
from engine.virtual_config import VirtualEngineConfig
from kv_transfer.fake import ManualClock
from kv_transfer.virtual import VirtualFabric

QUICK = StepCost.line(base_s=1e-4, per_token_s=1e-7)
BLOCK_TOKENS = 32


def virtual_config(engine_id: str, **settings: Any) -> VirtualEngineConfig:
    """A small engine; settings as of VirtualEngineConfig."""
    defaults: dict[str, Any] = {
        "model": "virtual",
        "cost": QUICK,
        "kv_tokens": 80 * BLOCK_TOKENS,
        "kv_bytes_per_token": 1024,
        "max_model_len": 1024,
        "block_size": BLOCK_TOKENS,
    }
    return VirtualEngineConfig(engine_id=engine_id, **(defaults | settings))


@contextmanager
def virtual_engine(engine_id: str, **settings: Any) -> Iterator[VirtualEngine]:
    """A started engine on the wall clock, alone in its fabric."""
    engine = VirtualEngine(virtual_config(engine_id, **settings))
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()


class Stage:
    """Engines on one manual clock and one fabric: `clock` moves when an engine waits for a batch."""

    def __init__(self, latency_s: float = 1e-3, bytes_per_s: float = 1e9) -> None:
        self.clock = ManualClock()
        self.clock.advance(100.0)
        self.fabric = VirtualFabric(self.clock, latency_s, bytes_per_s)

    def engine(self, engine_id: str, **settings: Any) -> VirtualEngine:
        """A started engine."""
        engine = VirtualEngine(virtual_config(engine_id, **settings), self.fabric, self.clock.advance)
        engine.start()
        return engine
