"""Batches worth measuring: decodes, prefill chunks and both together, in all sizes that a replica takes."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass
from typing import Literal

MIN_CHUNK_TOKENS = 16
DECODE_ONLY, PREFILL_ONLY = 0.3, 0.25  # shares of the shapes; the rest hold both
WHOLE_PROMPTS = 0.4  # of the chunks: nothing of their prompt is computed yet
MAX_CHUNKS = 3

Contexts = Literal["short", "long", "any"]
_CONTEXTS: tuple[Contexts, ...] = ("short", "long", "any")


@dataclass(frozen=True, slots=True)
class Limits:
    """What a batch may hold. `max_kv_tokens`: most tokens of a prompt computed before its chunk."""

    max_decodes: int
    max_batch_tokens: int
    max_kv_tokens: int
    block_size: int


@dataclass(frozen=True, slots=True)
class Shape:
    """A batch to measure: decodes over short, long or any contexts; chunks of new tokens, computed before."""

    decodes: int
    contexts: Contexts = "any"
    chunks: tuple[tuple[int, int], ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens of the batch."""
        return self.decodes + sum(chunk for chunk, _ in self.chunks)


def draw_shapes(count: int, limits: Limits, seed: int) -> list[Shape]:
    """`count` shapes, the same for the same seed. Sizes are spread evenly on a log scale."""
    draw = random.Random(seed)
    return [_shape(draw, limits) for _ in range(count)]


def _shape(draw: random.Random, limits: Limits) -> Shape:
    kind = draw.random()
    contexts = draw.choice(_CONTEXTS)
    if kind < DECODE_ONLY:
        return Shape(_log_uniform(draw, 1, limits.max_decodes), contexts)
    if kind < DECODE_ONLY + PREFILL_ONLY:
        return Shape(0, contexts, _chunks(draw, limits, limits.max_batch_tokens))
    most = min(limits.max_decodes, limits.max_batch_tokens - MIN_CHUNK_TOKENS)
    decodes = _log_uniform(draw, 1, most)
    return Shape(decodes, contexts, _chunks(draw, limits, limits.max_batch_tokens - decodes))


def _chunks(draw: random.Random, limits: Limits, room: int) -> tuple[tuple[int, int], ...]:
    """Chunks of together at most `room` tokens, the total log-uniform."""
    total = _log_uniform(draw, MIN_CHUNK_TOKENS, room)
    count = min(draw.randint(1, MAX_CHUNKS), total // MIN_CHUNK_TOKENS)
    cuts = sorted(draw.randint(0, total - count * MIN_CHUNK_TOKENS) for _ in range(count - 1))
    edges = [0, *cuts, total - count * MIN_CHUNK_TOKENS]
    sizes = [high - low + MIN_CHUNK_TOKENS for low, high in itertools.pairwise(edges)]
    return tuple((size, _computed(draw, limits)) for size in sizes)


def _computed(draw: random.Random, limits: Limits) -> int:
    """Tokens computed before a chunk: whole blocks, as only those can be found in the prefix cache."""
    blocks = limits.max_kv_tokens // limits.block_size
    if blocks == 0 or draw.random() < WHOLE_PROMPTS:
        return 0
    return _log_uniform(draw, 1, blocks) * limits.block_size


def _log_uniform(draw: random.Random, low: int, high: int) -> int:
    return min(max(round(math.exp(draw.uniform(math.log(low), math.log(high + 0.5)))), low), high)
