"""What a virtual engine says: tokens that follow from the tokens before them, and from nothing else.

So a work gets the same tokens alone or among others, after a preemption, handed over, or resumed elsewhere
with what was said so far as part of its prompt. One number stands for all tokens up to a place (a polynomial
in them, modulo 2^64); the next token is a hash of it, and full blocks of equal prefixes have equal numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache

import msgspec
import numpy as np
import numpy.typing as npt

from engine.errors import ProtocolError

_MASK = (1 << 64) - 1
_BASE = 0x9E3779B97F4A7C15
_MAGIC = b"virtual/1 "
# Of a vocabulary: pieces of characters stand at its bottom and control tokens at its top, and a detokenizer
# holds back the one and drops the other.
_SAID_FROM, _SAID_TO = 1 / 8, 7 / 8


class VirtualSampling(msgspec.Struct, frozen=True):
    """How a virtual engine samples. `stop_after`: it ends by itself after so many tokens; None: never."""

    stop_after: int | None = None

    def encode(self) -> bytes:
        """For `Work.sampling`."""
        return _MAGIC + msgspec.msgpack.encode(self)

    @classmethod
    def decode(cls, blob: bytes) -> VirtualSampling:
        """What `encode` gave. vLLM's own encoding says nothing that a virtual engine could follow: the default.

        Raises ProtocolError for a blob that begins as ours and is none.
        """
        if not blob.startswith(_MAGIC):
            return cls()
        try:
            return msgspec.msgpack.decode(blob[len(_MAGIC) :], type=cls)
        except msgspec.MsgspecError as error:
            raise ProtocolError(f"sampling of a virtual engine cannot be read: {error}") from error


class Said:
    """All tokens of a work so far, as numbers: of the whole, and of each full block of `block_tokens`."""

    __slots__ = ("_block_tokens", "_count", "_salt", "blocks", "state")

    def __init__(self, prompt: Sequence[int], block_tokens: int, salt: str | None = None) -> None:
        self._block_tokens = block_tokens
        self._count = len(prompt)
        self._salt = _salt(salt)
        self.blocks: list[int] = []
        self.state = 0
        tokens = np.asarray(prompt, dtype=np.int64).astype(np.uint64) + np.uint64(1)
        whole = len(tokens) // block_tokens * block_tokens
        powers = _powers(block_tokens)
        shift = pow(_BASE, block_tokens, 1 << 64)
        for value in (tokens[:whole].reshape(-1, block_tokens) * powers).sum(axis=1, dtype=np.uint64).tolist():
            self.state = (self.state * shift + value) & _MASK
            self.blocks.append(mixed(self.state ^ self._salt))
        for token in tokens[whole:].tolist():
            self.state = (self.state * _BASE + token) & _MASK

    def add(self, token: int) -> None:
        """One token more."""
        self.state = (self.state * _BASE + token + 1) & _MASK
        self._count += 1
        if self._count % self._block_tokens == 0:
            self.blocks.append(mixed(self.state ^ self._salt))

    def next(self, vocab_size: int) -> int:
        """The token that follows, which is not added."""
        first = int(vocab_size * _SAID_FROM)
        choices = max(int(vocab_size * _SAID_TO) - first, 1)
        return first + (mixed(self.state) * choices >> 64)


def mixed(x: int) -> int:
    """A number in which every bit depends on every bit of `x` (the finalizer of splitmix64)."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def _salt(salt: str | None) -> int:
    if salt is None:
        return 0
    return int.from_bytes(hashlib.blake2b(salt.encode(), digest_size=8).digest(), "big")


@cache
def _powers(count: int) -> npt.NDArray[np.uint64]:
    """Powers of the base, the highest first."""
    return np.array([pow(_BASE, count - 1 - at, 1 << 64) for at in range(count)], dtype=np.uint64)
