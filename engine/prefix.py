"""Names of prompt prefixes: a chain of hashes, one for every full block of tokens and all before it."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

PREFIX_BLOCK_TOKENS = 128


def prefix_hashes(token_ids: Sequence[int], salt: str | None = None) -> list[int]:
    """One 63-bit number per full block: equal numbers, equal tokens up to there (and the same cache salt)."""
    hashes: list[int] = []
    before = b"" if salt is None else salt.encode()
    for start in range(0, len(token_ids) - PREFIX_BLOCK_TOKENS + 1, PREFIX_BLOCK_TOKENS):
        block = array("q", token_ids[start : start + PREFIX_BLOCK_TOKENS]).tobytes()
        before = hashlib.blake2b(before + block, digest_size=8).digest()
        hashes.append(int.from_bytes(before, "big") >> 1)
    return hashes
