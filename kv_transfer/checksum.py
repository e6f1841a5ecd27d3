"""A checksum of each block of KV, over all layers: whether what was pulled is what was offered.

A block is taken as 32-bit words, all layers one after the other. Its checksum is the sum of word times weight
in 64-bit arithmetic that wraps around; the weights are fixed 31-bit numbers, one for each place in a block. A
change of one word always shows, since no product wraps. Any other change (blocks or layers exchanged, zeroes,
bytes of another time) is missed by a chance of at most 2**-30: given all weights but one, at most one of 2**30
values of that one makes up for the change.

It is computed where the KV lies; one number a block goes to the host. On a CPU torch would write every product
to memory, at 0.3 GB/s; compiled, the sum runs at the speed of memory (README).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

WORD_BYTES = 4
ALL_GROUPS = -1
_CHUNK_WORDS = 4 << 20  # most that is copied at once on a device, where products take 8 bytes each

BlockIds = Sequence[Sequence[int]]  # of each cache group


@dataclass(frozen=True, slots=True)
class Plane:
    """Where the words of one layer lie: `words` is a view of int32, [blocks, words of a block].

    `group`: the cache group whose blocks these are; ALL_GROUPS: those of any.
    """

    words: Any
    group: int = ALL_GROUPS


def plane(cache: Any, address: int, num_blocks: int, block_bytes: int, stride_bytes: int, group: int) -> Plane:
    """The plane that begins at `address`, inside the memory of the tensor `cache`.

    Raises ValueError if its blocks are not made of whole words.
    """
    import torch

    storage = cache.untyped_storage()
    offset = address - storage.data_ptr()
    if offset % WORD_BYTES or block_bytes % WORD_BYTES or stride_bytes % WORD_BYTES:
        raise ValueError(f"blocks of {block_bytes} bytes, {stride_bytes} apart, are not made of 32-bit words")
    words = torch.empty(0, dtype=torch.int32, device=cache.device).set_(
        storage,
        offset // WORD_BYTES,
        (num_blocks, block_bytes // WORD_BYTES),
        (stride_bytes // WORD_BYTES, 1),
    )
    return Plane(words, group)


def weights(plane_index: int, num_words: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    """The weights of a plane, the same in every process: SplitMix64 of the place, odd, below 2**31."""
    places = np.arange(num_words, dtype=np.uint64) + (np.uint64(plane_index + 1) << np.uint64(32))
    mixed = places * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return (mixed >> np.uint64(33)).astype(np.int32) | np.int32(1)


class BlockSums:
    """Checksums of blocks. The planes must be of one device, and in the same order on both ends."""

    def __init__(self, planes: Sequence[Plane]) -> None:
        import torch

        devices = {plane.words.device for plane in planes}
        if len(devices) != 1:
            raise ValueError(f"checksums need all layers of the KV on one device, not on {devices}")
        (device,) = devices
        self._sum = _SUMS.get(device.type, _sum_on_device)
        self.planes = planes
        self._weights = [
            torch.from_numpy(weights(index, plane.words.shape[1])).to(device)
            for index, plane in enumerate(planes)
        ]

    def of(self, block_ids: BlockIds) -> list[list[int]]:
        """The checksum of every block, by group."""
        return [self._of_group(group, ids) for group, ids in enumerate(block_ids)]

    def _of_group(self, group: int, ids: Sequence[int]) -> list[int]:
        if not len(ids):
            return []
        layers = [
            (plane.words, of_word)
            for plane, of_word in zip(self.planes, self._weights, strict=True)
            if plane.group in (group, ALL_GROUPS)
        ]
        return self._sum(layers, ids)


def _sum_on_cpu(layers: Sequence[tuple[Any, Any]], ids: Sequence[int]) -> list[int]:
    add_rows = _compiled()
    sums, rows = np.zeros(len(ids), np.int64), np.asarray(ids, np.int64)
    for words, of_word in layers:
        add_rows(words.numpy(), rows, of_word.numpy(), sums)
    return list(map(int, sums))


def _sum_on_device(layers: Sequence[tuple[Any, Any]], ids: Sequence[int]) -> list[int]:
    import torch

    device = layers[0][0].device
    sums, rows = torch.zeros(len(ids), dtype=torch.int64, device=device), torch.tensor(ids, device=device)
    for words, of_word in layers:
        at_once = max(_CHUNK_WORDS // words.shape[1], 1)
        wide = of_word.long()  # or the products would be cut to 32 bits
        for some, where in zip(sums.split(at_once), rows.split(at_once), strict=True):
            some += (words.index_select(0, where) * wide).sum(1)
    return list(map(int, sums.tolist()))


@cache
def _compiled() -> Any:
    # Not before an engine has started: vLLM 0.32 looks into every loaded module on a CPU, and fails at numba's.
    import numba

    return numba.njit(nogil=True)(_add_rows)


def _add_rows(words: Any, rows: Any, of_word: Any, sums: Any) -> None:
    for place in range(len(rows)):
        row = words[rows[place]]
        total = np.int64(0)
        for word in range(row.shape[0]):
            total += np.int64(row[word]) * np.int64(of_word[word])
        sums[place] += total


_SUMS: dict[str, Callable[[Sequence[tuple[Any, Any]], Sequence[int]], list[int]]] = {"cpu": _sum_on_cpu}
