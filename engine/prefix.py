"""Names of prompt prefixes, on which endpoints, the coordinator and the engines' caches agree.

One number stands for all tokens up to a place: a polynomial in them, modulo 2^64. It can be extended from any
place, so blocks of every size lead to the same names. A name is that number and the cache salt, mixed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache

import numpy as np
import numpy.typing as npt

PREFIX_BLOCK_TOKENS = 128  # prefixes have names at multiples of this

_MASK = (1 << 64) - 1
_BASE = 0x9E3779B97F4A7C15


def prefix_hashes(token_ids: Sequence[int], salt: str | None = None) -> list[int]:
    """One 63-bit number per full block: equal numbers, equal tokens up to there (and the same cache salt)."""
    salted = salt_number(salt)
    return [name_of(number, salted) for number in numbers_of_blocks(0, token_ids, PREFIX_BLOCK_TOKENS)]


def numbers_of_blocks(number: int, token_ids: Sequence[int], block_tokens: int) -> list[int]:
    """The number after each full block of tokens that follow on those that `number` stands for."""
    whole = len(token_ids) // block_tokens * block_tokens
    if whole == 0:
        return []
    tokens = np.asarray(token_ids[:whole], dtype=np.int64).astype(np.uint64) + np.uint64(1)
    shift = pow(_BASE, block_tokens, 1 << 64)
    numbers = []
    blocks = tokens.reshape(-1, block_tokens) * _powers(block_tokens)
    for value in blocks.sum(axis=1, dtype=np.uint64).tolist():
        number = (number * shift + value) & _MASK
        numbers.append(number)
    return numbers


def number_after(number: int, token: int) -> int:
    """The number with one token more."""
    return (number * _BASE + token + 1) & _MASK


def name_of(number: int, salted: int) -> int:
    """The name, of 63 bits, of a prefix with this number. `salted`: the `salt_number` of its cache salt."""
    return mixed(number ^ salted) >> 1


def salt_number(salt: str | None) -> int:
    """What a cache salt does to names: nobody finds the prefix of another salt."""
    if salt is None:
        return 0
    return int.from_bytes(hashlib.blake2b(salt.encode(), digest_size=8).digest(), "big")


def mixed(x: int) -> int:
    """A number in which every bit depends on every bit of `x` (the finalizer of splitmix64)."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


@cache
def _powers(count: int) -> npt.NDArray[np.uint64]:
    """Powers of the base, the highest first."""
    return np.array([pow(_BASE, count - 1 - at, 1 << 64) for at in range(count)], dtype=np.uint64)
