"""A step profile of this very machine: the shape of step times differs between processors, not only the speed.

(An AMD EPYC without AMX decodes in 9 ms where an Intel Xeon with it takes 25, and prefills half as fast.)
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from benchmarks.provenance import provenance
from coordinator.config import ClusterConfig
from coordinator.config_layers import find_profile
from coordinator.process_tree import end_with_parent
from engine.errors import ConfigError, EngineStartError
from engine.profile import StepProfile

CLI = [sys.executable, "-c", "from coordinator.cli import main; main()", "profile"]


@dataclass(frozen=True, slots=True)
class Here:
    """A device, by its name, and where a profile of it and the rows behind that are left."""

    device: str
    profiles: Path
    rows: Path

    def fitted(self, model: str) -> Path:
        """Where a new profile goes; among those that ship it has the device in its name."""
        if self.profiles == self.rows:
            return self.profiles / f"{model}-profile.json"
        device = re.sub(r"[^a-z0-9]+", "-", self.device.lower()).strip("-")
        return self.profiles / f"{device}-{model}.json"

    @classmethod
    def processor(cls, folder: Path) -> Self:
        """The processor of this machine; everything is left in one folder."""
        return cls(str(provenance(0)["hardware"]["cpu"]), folder, folder)


def profile_here(
    config: ClusterConfig, given: str | None, here: Here, minutes: float, tell: Callable[[str], None]
) -> Path:
    """The profile that is given; else the one that ships for the model, if it is of this device and as many
    threads; else a new one, measured in about `minutes`.

    Raises ConfigError for an unknown name, EngineStartError.
    """
    model, engine = config.model, config.engine
    try:
        known = find_profile(given, model)
    except ValueError as error:
        raise ConfigError(f"--step-profile: {error}") from error
    known = known if given is not None or not here.fitted(model).is_file() else here.fitted(model)
    if known is not None and (given is not None or _is_of(here, StepProfile.load(known), engine.env)):
        return known
    rows = here.rows / f"{model}-steps.csv.gz"
    fitted = here.fitted(model)
    tell(f"measuring the steps of {model} on {here.device}, about {minutes:g} minutes")
    sizes = ["--minutes", str(minutes), "--max-batch-tokens", str(engine.max_batch_tokens)]
    if engine.max_model_len is not None:
        sizes += ["--max-model-len", str(engine.max_model_len)]
    _run(engine.env, "run", "--model", model, "--out", str(rows), *sizes, "--json")
    _run(engine.env, "fit", "--steps", str(rows), "--out", str(fitted), "--json")
    return fitted.resolve()


def _is_of(here: Here, profile: StepProfile, env: Mapping[str, str]) -> bool:
    threads = f"{env['OMP_NUM_THREADS']} threads" if "OMP_NUM_THREADS" in env else ""
    measured_on = profile.about.get("hardware", "")
    return measured_on.startswith(here.device) and measured_on.endswith(threads)


def _run(env: Mapping[str, str], *arguments: str) -> None:
    # A process of its own: vLLM stays in a process that has loaded it, and this one is a client afterwards.
    done = subprocess.run(
        [*CLI, *arguments],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=end_with_parent,
    )
    if done.returncode != 0:
        raise EngineStartError(f"slosserve profile {arguments[0]} failed:\n{done.stderr[-2000:]}")
