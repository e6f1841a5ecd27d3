"""Of what a window is made: windows of older code, or of another processor, are not taken for those of now."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

from benchmarks.real.site import Site

ROOT = Path(__file__).resolve().parent.parent.parent
# What makes the load, and starts and scores what is measured.
LOAD = (
    "benchmarks/open_loop.py",
    "benchmarks/own_server.py",
    "benchmarks/parts.py",
    "benchmarks/real/cells.py",
    "benchmarks/real/client.py",
    "benchmarks/real/running.py",
    "benchmarks/real/site.py",
    "benchmarks/real/systems.py",
    "benchmarks/real/window.py",
    "benchmarks/scenarios.py",
    "benchmarks/traffic.py",
    "configs/colocated.yaml",
    "configs/one-gpu.yaml",
    "engine/score.py",
    "kv_transfer/params.py",
)
PRODUCT = ("coordinator", "decode_node", "engine", "kv_transfer", "prefill_node")


def fingerprint(ours: bool, site: Site) -> str:
    """A hash of the sources behind a window, of the whole product where it is `ours`; with the processor, or
    the GPU."""
    return _hashed(ours, site.devices()[0])


@cache
def _hashed(ours: bool, device: str) -> str:
    names = [ROOT / name for name in LOAD]
    if ours:
        names += [path for folder in PRODUCT for path in (ROOT / folder).rglob("*.py")]
    digest = hashlib.sha256(device.encode())
    for path in sorted(set(names)):
        digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]
