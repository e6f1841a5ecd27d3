"""What a virtual engine pretends to be: sizes, speed, links, and the facts of a model that is not loaded."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from engine.cost import StepCost
from kv_transfer.virtual import VirtualFabric

UNKNOWN_VOCABULARY, UNKNOWN_MODEL_LEN = 32_000, 8192


@dataclass(frozen=True, slots=True)
class VirtualEngineConfig:
    """What a virtual engine pretends to be. Sizes are tokens, but for `block_size` tokens a block.

    `max_model_len` and `vocab_size` None: of the model's config.json, if `model` is a folder. `acceptance`:
    chance that a draft is right. The link is that between any two engines of the process.
    """

    model: str
    engine_id: str
    cost: StepCost
    kv_tokens: int
    kv_bytes_per_token: int
    max_model_len: int | None = None
    vocab_size: int | None = None
    block_size: int = 16
    max_num_seqs: int = 256
    max_batch_tokens: int = 2048
    enable_prefix_caching: bool = True
    max_draft_tokens: int = 0
    acceptance: float = 0.7
    lease_s: float = 30.0
    link_latency_s: float = 50e-6
    link_bytes_per_s: float = 12e9
    side_channel_host: str = "virtual"
    side_channel_port: int = 0


@cache
def process_fabric(latency_s: float, bytes_per_s: float) -> VirtualFabric:
    """The fabric of this process for such links: engines that are started alike find each other."""
    return VirtualFabric(time.monotonic, latency_s, bytes_per_s)


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Of a model that is not loaded."""

    vocab_size: int = UNKNOWN_VOCABULARY
    max_model_len: int = UNKNOWN_MODEL_LEN


def model_facts(model: str) -> ModelFacts:
    """What the model's own configuration says, if it is a folder."""
    path = Path(model) / "config.json"
    if not path.is_file():
        return ModelFacts()
    facts = json.loads(path.read_text(encoding="utf-8"))
    return ModelFacts(
        int(facts.get("vocab_size", UNKNOWN_VOCABULARY)),
        int(facts.get("max_position_embeddings", UNKNOWN_MODEL_LEN)),
    )
