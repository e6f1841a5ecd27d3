"""Where real engines run: a core of this machine each, or a GPU each; and what is different for that."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import configs
from benchmarks.provenance import provenance
from benchmarks.simulator.systems import Tuning
from engine.errors import ConfigError

VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True, slots=True)
class Site:
    """A kind of machine, and the model that suits it.

    `config`: what ships for one replica there. `kv_gib`: memory for KV, of every engine. Lengths of scenarios
    are divided by `divide`, outputs of a scenario once more by `further`. `engine_cores`: kept for each engine.
    `at_once`: systems that run on the same devices and are asked by turns; one that idles costs memory alone.
    """

    name: str
    config: str
    model: str
    kv_gib: float
    block_tokens: int
    max_model_len: int
    divide: float
    stock_defaults: Tuning
    our_defaults: Tuning
    engine_cores: int
    at_once: int
    further: Mapping[str, float] = field(default_factory=dict)

    @property
    def on_gpus(self) -> bool:
        """Whether engines run on GPUs."""
        return self.name == "gpu"

    def devices(self) -> list[str]:
        """What engines can run on, one each, by name. Raises ConfigError where a GPU is meant and none is."""
        if not self.on_gpus:
            return [str(provenance(0)["hardware"]["cpu"])] * (os.cpu_count() or 1)
        found = [name for _, name in _visible(_gpus())]
        if not found:
            raise ConfigError(
                "--gpu: nvidia-smi shows no GPU here. Leave --gpu out to run on this machine's cores"
            )
        return found

    def profiles(self, folder: Path) -> Path:
        """Where a profile that is measured here is left: those of GPUs among the ones that ship."""
        return Path(configs.__path__[0]) / "profiles" if self.on_gpus else folder

    def environment(self, engine: int) -> dict[str, str]:
        """Of a server of its own, that it runs on the device that is meant for it."""
        return {VISIBLE: _visible(_gpus())[engine][0]} if self.on_gpus else {}


# vLLM's own token budgets, online; on a GPU of 80 GB and more 8,192.
CPU = Site(
    "cpu",
    "colocated",
    "scale",
    kv_gib=0.25,  # 21,000 tokens, in float32 half: about as many requests fit as on 80 GB, or on 40, undivided
    block_tokens=32,
    max_model_len=4096,
    divide=6.0,  # the scale model prefills at about a sixth of an A100's speed
    further={"reasoning": 5.0},  # outputs of 5,500 tokens make windows of a quarter of an hour; so 180
    stock_defaults=Tuning(token_budget=2048, max_seqs=256),
    our_defaults=Tuning(token_budget=2048, max_seqs=64),
    engine_cores=1,
    at_once=3,  # 3 GiB each
)
GPU = Site(
    "gpu",
    "one-gpu",
    "llama-8b",
    kv_gib=20.0,  # 160,000 tokens
    block_tokens=16,
    max_model_len=32768,  # reasoning goes beyond 16,384
    divide=1.0,
    stock_defaults=Tuning(token_budget=8192, max_seqs=1024),
    our_defaults=Tuning(token_budget=8192, max_seqs=256),
    engine_cores=2,
    at_once=1,
)


def _visible(names: Sequence[str]) -> list[tuple[str, str]]:
    """Ids and names of the GPUs that CUDA may use: all, unless the environment says which."""
    chosen = os.environ.get(VISIBLE)
    if chosen is None:
        return [(str(index), name) for index, name in enumerate(names)]
    ids = [one.strip() for one in chosen.split(",") if one.strip()]
    return [(one, names[int(one)] if one.isdecimal() and int(one) < len(names) else one) for one in ids]


def _gpus() -> list[str]:
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []
