"""Prompts of a given length made of plain words, no two alike, except where a trace shares blocks."""

from __future__ import annotations

import numpy as np

from benchmarks.traces import Arrival
from engine.models import corpus_words

TASKS = {
    "chatbot": "Let us talk about this:",
    "coder": "Write a function that does this:",
    "summarizer": "Summarise this text:",
}
TEMPLATE_TOKENS = 20  # the chat template's own and the task's
MOONCAKE_BLOCK_TOKENS = 512


class PromptWriter:
    """Writes user messages. A word of the list is close to one token of the made models.

    `block_tokens`: length of a block that a trace's hash stands for, after lengths were divided.
    """

    def __init__(self, seed: int, block_tokens: int = MOONCAKE_BLOCK_TOKENS) -> None:
        self._words = np.array(corpus_words())
        self._rng = np.random.default_rng(seed)
        self._block_tokens = block_tokens

    def write(self, arrival: Arrival) -> str:
        """A message that gives a prompt of about `arrival.in_tokens` tokens."""
        count = max(1, arrival.in_tokens - TEMPLATE_TOKENS)
        shared = self._shared(arrival.prefix_hashes, count)
        own = self._rng.choice(self._words, count - len(shared)).tolist()
        task = TASKS.get(arrival.slo_class, "Answer this:")
        return " ".join([task, *shared, *own])

    def _shared(self, hashes: tuple[int, ...], count: int) -> list[str]:
        words: list[str] = []
        for block in hashes[:-1]:  # the last block is rarely full: what it holds is this prompt's own
            words += np.random.default_rng(block).choice(self._words, self._block_tokens).tolist()
            if len(words) >= count:
                break
        return words[:count]
