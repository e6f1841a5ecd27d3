"""Compiling: numba, with a cache that a change of any compiled file empties.

numba looks only at the file of a function to tell whether its cached code is still good. Code that was built
into a caller in another file would go on running after a change of the callee, so the cache has a folder of its
own for each state of all compiled sources.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numba

MARK = "engine.compiled import"  # how a source says that it has compiled functions
PACKAGES = ("engine", "coordinator", "benchmarks")


def compiled(function: Callable[..., Any]) -> Any:
    """`function`, compiled at its first call, or loaded from the cache (SLOSSERVE_CACHE, else ~/.cache)."""
    return _cached(function)


def compiled_bare(function: Callable[..., Any]) -> Any:
    """`compiled`, of one that allocates no array: references to those that it is given are not counted.

    Counting takes longer than the rest of an inner loop, where arrays come in tuples.
    """
    return _cached(function, _nrt=False)


def inlined(function: Callable[..., Any]) -> Any:
    """`compiled_bare`, as a part of each compiled function that calls it."""
    return numba.njit(inline="always", error_model="numpy", _nrt=False)(function)


def _cached(function: Callable[..., Any], **options: Any) -> Any:
    before = numba.config.CACHE_DIR
    if not before:  # NUMBA_CACHE_DIR: somebody knows better
        numba.config.CACHE_DIR = str(_folder())  # read when the function is wrapped, by everybody's functions
    try:
        return numba.njit(cache=True, nogil=True, error_model="numpy", **options)(function)
    finally:
        numba.config.CACHE_DIR = before


@lru_cache(maxsize=1)
def _folder() -> Path:
    root = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256(numba.__version__.encode())
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            source = path.read_bytes()
            if MARK.encode() in source:
                digest.update(source)
    cache = os.environ.get("SLOSSERVE_CACHE") or Path.home() / ".cache" / "slosserve"
    return Path(cache) / "compiled" / digest.hexdigest()[:16]
