"""Faults that are put into real transfers from outside, for `slosserve chaos`: none unless somebody asks.

An engine whose environment names a folder in SLOSSERVE_FAULTS looks there before it judges what a pull brought:
while a file `corrupt` lies in it, a bit of the last block flips first, as if it had done so on its way.
"""

from __future__ import annotations

import os
from pathlib import Path

from kv_transfer.checksum import ALL_GROUPS, BlockIds, BlockSums

FOLDER = "SLOSSERVE_FAULTS"  # in the environment of an engine
CORRUPT = "corrupt"


def asked_for(fault: str) -> bool:
    """Whether transfers are to have this fault now."""
    folder = os.environ.get(FOLDER)
    return folder is not None and Path(folder, fault).exists()


def flip_a_bit(sums: BlockSums, block_ids: BlockIds) -> None:
    """In one word of one layer of the last of these blocks, if there are any."""
    for group, ids in enumerate(block_ids):
        for plane in sums.planes:
            if len(ids) and plane.group in (group, ALL_GROUPS):
                plane.words[ids[-1], plane.words.shape[1] // 2] ^= 1 << 23
                return
