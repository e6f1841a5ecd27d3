"""A step profile of this very machine: the shape of step times differs from processor to processor."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.provenance import provenance
from coordinator.config_layers import find_profile
from engine.errors import ConfigError, EngineStartError
from engine.profile import StepProfile

CLI = [sys.executable, "-c", "from coordinator.cli import main; main()", "profile"]


def profile_here(
    model: str,
    given: str | None,
    folder: Path,
    minutes: float,
    max_batch_tokens: int,
    tell: Callable[[str], None],
) -> Path:
    """The profile that is given; else the one that ships for `model`, if it is of this processor; else a new
    one, measured in about `minutes` and left in `folder`. Raises ConfigError, EngineStartError.
    """
    try:
        known = find_profile(given, model)
    except ValueError as error:
        raise ConfigError(f"--step-profile: {error}") from error
    if known is not None and (given is not None or _is_of_this_processor(StepProfile.load(known))):
        return known
    rows, fitted = folder / f"{model}-steps.csv.gz", folder / f"{model}-profile.json"
    tell(f"measuring the steps of {model} on this processor, about {minutes:g} minutes")
    sizes = ["--minutes", str(minutes), "--max-batch-tokens", str(max_batch_tokens)]
    _run("run", "--model", model, "--out", str(rows), *sizes, "--json")
    _run("fit", "--steps", str(rows), "--out", str(fitted), "--json")
    return fitted.resolve()


def _is_of_this_processor(profile: StepProfile) -> bool:
    return profile.about.get("hardware", "").startswith(str(provenance(0)["hardware"]["cpu"]))


def _run(*arguments: str) -> None:
    # A process of its own: vLLM stays in a process that has loaded it, and this one is a client afterwards.
    done = subprocess.run([*CLI, *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise EngineStartError(f"slosserve profile {arguments[0]} failed:\n{done.stderr[-2000:]}")
