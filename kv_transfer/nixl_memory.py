"""The DRAM that an engine registers with NIXL beside its KV caches: lease words, landing words, a probe area.

A lease word guards KV that may be read remotely at any time ("a seqlock over RDMA"). The source puts a fresh
random number into the word when it offers, and zero before the blocks can hold anything else. The target
reads the KV first and the word afterwards: if it still holds the number, all that was read before is whole.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any

import numpy as np

from kv_transfer.link import LARGE_PROBE_BYTES

NUM_WORDS = 4096
WORD_BYTES = 8
_TABLE_BYTES = NUM_WORDS * WORD_BYTES


@dataclass(frozen=True, slots=True)
class PeerMemory:
    """Where a peer's lease words and probe area lie, in the peer's own addresses."""

    words_address: int
    num_words: int
    probe_address: int
    probe_bytes: int

    def word_address(self, slot: int) -> int:
        """Address of a lease word. Raises IndexError for a slot that the peer does not have."""
        if not 0 <= slot < self.num_words:
            raise IndexError(f"lease slot {slot} is outside the peer's table of {self.num_words} words")
        return self.words_address + slot * WORD_BYTES


class SideMemory:
    """One allocation: this engine's lease words, words to land those of peers in, and a probe area."""

    def __init__(self) -> None:
        self._bytes = np.zeros(2 * _TABLE_BYTES + LARGE_PROBE_BYTES, dtype=np.uint8)
        self.words = self._bytes[:_TABLE_BYTES].view(np.uint64)
        self.landing = self._bytes[_TABLE_BYTES : 2 * _TABLE_BYTES].view(np.uint64)
        # Pages that were never touched would be paid for by the first probe.
        self._bytes[2 * _TABLE_BYTES :] = 1

    def register(self, agent: Any, backends: list[str]) -> Any:
        """Register with a NIXL agent. Returns the descriptors, to deregister by."""
        descs = agent.get_reg_descs([(self._bytes.ctypes.data, self._bytes.nbytes, 0, "")], "DRAM")
        agent.register_memory(descs, backends=backends)
        return descs

    def landing_address(self, slot: int) -> int:
        """Local address of a landing word."""
        return int(self.landing.ctypes.data) + slot * WORD_BYTES

    def as_peer(self) -> PeerMemory:
        """What peers need to know."""
        return PeerMemory(
            words_address=int(self.words.ctypes.data),
            num_words=NUM_WORDS,
            probe_address=int(self._bytes.ctypes.data) + 2 * _TABLE_BYTES,
            probe_bytes=LARGE_PROBE_BYTES,
        )


@dataclass(frozen=True, slots=True)
class Offer:
    """KV under a lease: its word, and the blocks that it holds."""

    slot: int
    nonce: int
    num_blocks: int


class Offers:
    """Offers of one source, by the id of the request that was prefilled. Only this writes the words."""

    def __init__(self, words: np.ndarray[Any, np.dtype[np.uint64]]) -> None:
        self._words = words
        self._free = list(range(len(words) - 1, -1, -1))
        self._open: dict[str, Offer] = {}
        self.withdrawn: set[str] = set()

    def __contains__(self, key: object) -> bool:
        return key in self._open

    def open(self, key: str, num_blocks: int) -> Offer | None:
        """Guard KV with a word from now on. None if every word is in use."""
        if key in self._open:
            raise ValueError(f"{key} is on offer already")
        if not self._free:
            return None
        offer = Offer(self._free.pop(), secrets.randbits(63) | 1, num_blocks)
        self._words[offer.slot] = offer.nonce
        self._open[key] = offer
        return offer

    def get(self, key: str) -> Offer | None:
        """The offer under `key`, None if there is none or it is withdrawn."""
        return None if key in self.withdrawn else self._open.get(key)

    def withdraw(self, key: str) -> bool:
        """Let every pull fail from now on; the blocks are still held. False if there is no such offer."""
        offer = self.get(key)
        if offer is None:
            return False
        self._words[offer.slot] = 0
        self.withdrawn.add(key)
        return True

    def close(self, key: str) -> None:
        """The blocks are about to be free: zero the word and let it be used again. Safe to repeat."""
        offer = self._open.pop(key, None)
        if offer is None:
            return
        self._words[offer.slot] = 0
        self.withdrawn.discard(key)
        self._free.append(offer.slot)
