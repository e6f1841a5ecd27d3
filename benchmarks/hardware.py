"""The machines of the benchmark: what a step costs on each, how much KV it holds, and the links between them.

`python -m benchmarks.hardware --data DIR` fits the tables of step times under DIR/steps and writes the fits to
configs/hardware, where they ship: running a benchmark needs no data file. Step times that are sums of operators
leave out the host's share, so every fit has HOST_S added.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

import configs
from benchmarks.as_module import start
from coordinator.config_layers import did_you_mean
from engine.cost import Piece, StepCost
from engine.errors import ConfigError
from engine.models import MODEL_NAMES, load_recipe
from engine.profile import StepProfile
from engine.step_table import StepTable
from kv_transfer.base import Link

CONFIGS = Path(configs.__path__[0])
HOST_S = 2e-3  # a step of the engines of 2026 spends 1 to 3 ms on the host, those of 2024 spent 3 to 20
DRAFT_STEP_SHARE = 0.05  # of the shortest step; no draft model was measured beside these machines
FP16_BYTES = 2
BATCH_TOKENS = 2048  # vLLM's own default, and about the largest batch of the tables
SCALE_KV_TOKENS = 20_000
TIGHTEST_TPOT_S = 0.05  # of the SLO classes
LARGEST_FLOOR = 0.6  # of that pace, for the shortest step; on the paper's machine it is 0.5


def _kv_bytes(layers: int, kv_heads: int, head_dim: int, value_bytes: int = FP16_BYTES) -> int:
    """Bytes of a token's keys and values in all layers."""
    return 2 * layers * kv_heads * head_dim * value_bytes


KV_BYTES_PER_TOKEN = {
    "OPT-6.7B": _kv_bytes(32, 32, 128),
    "OPT-13B": _kv_bytes(40, 40, 128),
    "Llama-2-7B": _kv_bytes(32, 32, 128),
    "Llama-3.1-8B": _kv_bytes(32, 8, 128),
}
OTHER_KV_BYTES_PER_TOKEN = KV_BYTES_PER_TOKEN["Llama-2-7B"]  # of a profile that does not name a model of these


@dataclass(frozen=True, slots=True)
class Hardware:
    """One replica: `tp` GPUs that hold `kv_tokens` together. Raises ValueError for sizes that no machine has.

    `speculative_cost` is what steps cost while a draft model runs before them, `cost` otherwise. `tpot_scale`:
    by how much the TPOTs of the SLO classes are longer for this model. `kv_bytes_per_token` is what a handoff
    moves, over all GPUs of the replica. `max_batch_tokens`: the largest batch, also in which T0 is counted.
    """

    name: str
    gpu: str
    model: str
    tp: int
    cost: StepCost
    speculative_cost: StepCost
    kv_tokens: int
    kv_bytes_per_token: int
    source: str
    tpot_scale: float = 1.0
    max_batch_tokens: int = BATCH_TOKENS

    def __post_init__(self) -> None:
        for name in ("tp", "kv_tokens", "kv_bytes_per_token", "tpot_scale", "max_batch_tokens"):
            if getattr(self, name) <= 0:
                raise ValueError(f"hardware {self.name}: {name} is {getattr(self, name)}, and must be above 0")


@dataclass(frozen=True, slots=True)
class LinkKind:
    """A kind of link, one way: its rate, and what a transfer takes before its first byte."""

    bytes_per_s: float
    latency_s: float

    def between(self, source: str, target: str) -> Link:
        """Such a link between two nodes."""
        return Link(source, target, self.latency_s, self.bytes_per_s)


# Latencies are round figures: launching a peer copy and seeing its end, 10 us each; posting RDMA reads, the
# wire and the notice of their end; two passes through the kernels' TCP and a wake-up. 100 tokens of a 7B take
# 0.26, 4.4 and 44 ms at these rates, so twice the latency would make that handoff 8 % longer at most.
LINKS: Mapping[str, LinkKind] = {
    "nvlink": LinkKind(200e9, 20e-6),
    "100gbe": LinkKind(12e9, 50e-6),
    "10gbe": LinkKind(1.2e9, 200e-6),
}


@dataclass(frozen=True, slots=True)
class Measured:
    """A machine whose step times were published: its table, and what the table does not say."""

    gpu: str
    model: str
    kv_tokens: int
    table: str
    made_of: str
    tp: int = 1
    tpot_scale: float = 1.0


_AICONFIGURATOR = "operator times of vLLM 0.14 (NVIDIA aiconfigurator, Apache-2.0), added up per layer"
_VIDUR = "linear operators from Vidur (Microsoft, MIT), attention from aiconfigurator (NVIDIA, Apache-2.0)"
_SERVING_SIM = "vLLM 0.19, batches measured whole (LLMServingSim, MIT)"
MEASURED = {
    "a100-opt-6.7b": Measured("A100-80G", "OPT-6.7B", 110_000, "a100_opt-6.7b_tp1", _AICONFIGURATOR),
    "a100-opt-13b": Measured(
        "A100-80G", "OPT-13B", 60_000, "a100_opt-13b_tp1", _AICONFIGURATOR, tpot_scale=2.0
    ),
    "a100-opt-13b-tp2": Measured(
        "A100-80G", "OPT-13B", 150_000, "a100_opt-13b_tp2", _AICONFIGURATOR, tp=2, tpot_scale=2.0
    ),
    "a100-llama-2-7b": Measured("A100-80G", "Llama-2-7B", 100_000, "a100_llama-2-7b_tp1", _VIDUR),
    "h100-llama-2-7b": Measured("H100-80G", "Llama-2-7B", 100_000, "h100_llama-2-7b_tp1", _VIDUR),
    "rtxpro6000-llama-3.1-8b": Measured(
        "RTX PRO 6000", "Llama-3.1-8B", 500_000, "rtxpro6000_llama-3.1-8b_tp1_joint", _SERVING_SIM
    ),
}
HARDWARE = ("paper", *MEASURED, "scale")


def hardware(
    name_or_path: str | Path,
    *,
    kv_tokens: int | None = None,
    kv_bytes_per_token: int | None = None,
    tp: int | None = None,
    tpot_scale: float | None = None,
    max_batch_tokens: int | None = None,
) -> Hardware:
    """The machine of this name, or one whose step profile (JSON of `slosserve profile fit`) is at this path.

    What is given replaces what is known. A profile of one's own needs `kv_tokens`, unless it is of published
    coefficients; without `kv_bytes_per_token` it has those of its model, or of a 7B without grouped queries.
    Raises ConfigError for a name that is none of HARDWARE, an unreadable profile, and sizes that cannot be.
    """
    given: dict[str, Any] = {
        "kv_tokens": kv_tokens,
        "kv_bytes_per_token": kv_bytes_per_token,
        "tp": tp,
        "tpot_scale": tpot_scale,
        "max_batch_tokens": max_batch_tokens,
    }
    wanted = {field: value for field, value in given.items() if value is not None}
    try:
        return replace(_known(str(name_or_path), kv_tokens), **wanted)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _known(name: str, kv_tokens: int | None) -> Hardware:
    if name == "paper":
        return _paper()
    if name == "scale":
        return _of_profile(CONFIGS / "profiles" / "scale.json", SCALE_KV_TOKENS)
    if name in MEASURED:
        measured = MEASURED[name]
        machine = _of_profile(CONFIGS / "hardware" / f"{name}.json", measured.kv_tokens)
        return replace(machine, tpot_scale=measured.tpot_scale)
    if Path(name).is_file():
        return _of_profile(Path(name), kv_tokens)
    raise ConfigError(
        f"no hardware {name!r}: neither a machine of the benchmark nor a file."
        f"{did_you_mean(name, HARDWARE)} Choose one of {', '.join(HARDWARE)}, "
        "or give the JSON of `slosserve profile fit`"
    )


def _paper() -> Hardware:
    """OPT-7B on an A100-40G as SLOs-Serve measured it, and with its draft model of 125M parameters."""
    base = Piece(24.8e-3, 6.88e-5)
    return Hardware(
        name="paper",
        gpu="A100-40G",
        model="OPT-6.7B",
        tp=1,
        cost=StepCost((base,)),
        speculative_cost=StepCost((replace(base, per_draft_step_s=1.2e-6), Piece(3.0e-3, 7.52e-5, 3.46e-3))),
        kv_tokens=40_000,
        kv_bytes_per_token=KV_BYTES_PER_TOKEN["OPT-6.7B"],
        source="SLOs-Serve's own fits (arXiv 2504.08784)",
    )


def _of_profile(path: Path, kv_tokens: int | None) -> Hardware:
    """`kv_tokens` None: those that the profile names. Raises ConfigError if it names none."""
    profile = StepProfile.load(path)
    about, model = profile.about, profile.about.get("model", "unknown")
    if kv_tokens is None:
        kv_tokens = _count(path, profile, "kv_tokens", None)
    rows = ", ".join(f"{source.file} (sha256 {source.sha256})" for source in profile.sources)
    return Hardware(
        name=path.stem,
        gpu=about.get("hardware", "unknown"),
        model=model,
        tp=_count(path, profile, "tp", 1),
        cost=profile.cost,
        speculative_cost=with_draft(profile.cost),
        kv_tokens=kv_tokens,
        kv_bytes_per_token=_count(path, profile, "kv_bytes_per_token", _kv_bytes_of(model)),
        max_batch_tokens=_count(path, profile, "max_batch_tokens", BATCH_TOKENS),
        source=f"{profile.family} fit to {rows}" + (f"; {about['made_of']}" if "made_of" in about else ""),
    )


def fitting_tpot_scale(cost: StepCost) -> float:
    """How many times as long paces are for a replica that is slow, as they are for models of 13B and larger: a
    whole number, so that the shortest step takes at most LARGEST_FLOOR of the tightest.
    """
    return max(float(math.ceil(cost.predict(1, seqs=1) / (LARGEST_FLOOR * TIGHTEST_TPOT_S))), 1.0)


def with_draft(cost: StepCost, share: float = DRAFT_STEP_SHARE) -> StepCost:
    """The cost with a draft model whose every step takes `share` of the shortest step."""
    draft_step_s = share * cost.predict(1, seqs=1)
    pieces = (replace(piece, per_draft_step_s=piece.per_draft_step_s + draft_step_s) for piece in cost.pieces)
    return replace(cost, pieces=tuple(pieces))


def _count(path: Path, profile: StepProfile, key: str, default: int | None) -> int:
    text = profile.about.get(key)
    if text is None and default is None:
        raise ConfigError(f"{path}: does not say how many tokens of KV a replica holds: give {key}")
    if text is None:
        return default or 0
    if not (text.isdecimal() and int(text) > 0):
        raise ConfigError(f"{path}: about.{key} is {text!r}, and must be a whole number above 0")
    return int(text)


def _kv_bytes_of(model: str) -> int:
    if model in MODEL_NAMES:
        recipe = load_recipe(model)
        head_dim = recipe.hidden_size // recipe.num_attention_heads
        value_bytes = 4 if recipe.dtype == "float32" else FP16_BYTES
        return _kv_bytes(recipe.num_hidden_layers, recipe.num_key_value_heads, head_dim, value_bytes)
    return KV_BYTES_PER_TOKEN.get(model, OTHER_KV_BYTES_PER_TOKEN)


def fit_measured(name: str, data: Path) -> StepProfile:
    """The fit of this machine's table, with the host's share. Raises ConfigError if the table is not there."""
    measured = MEASURED[name]
    folder = data / "steps" if (data / "steps").is_dir() else data
    fitted = StepProfile.fit(StepTable.read([folder / f"{measured.table}.csv.gz"])).with_host(HOST_S)
    about = {
        "model": measured.model,
        "hardware": measured.gpu,
        "tp": str(measured.tp),
        "made_of": measured.made_of,
        "made_by": "python -m benchmarks.hardware --data DIR",
    }
    return replace(fitted, about=about | fitted.about)


def fit_hardware(
    data: Annotated[Path, typer.Option(envvar="SLOSSERVE_DATA", help="Folder with steps/*.csv.gz in it.")],
    out: Annotated[
        Path, typer.Option(help="Folder where the fits go, as JSON.", show_default="configs/hardware")
    ] = CONFIGS / "hardware",
) -> None:
    """Fit the published step times of every machine of the benchmark, and keep the fits.

    Example: python -m benchmarks.hardware --data DIR
    """
    shown = Table(title="held-out steps, without the host")
    for heading in ("machine", "form", "R2", "median error", "p99 error"):
        shown.add_column(heading, justify="left" if heading in ("machine", "form") else "right")
    for name in MEASURED:
        fitted = fit_measured(name, data)
        fitted.save(out / f"{name}.json")
        scored = fitted.held_out
        errors = (f"{scored.median_error:.1%}", f"{scored.p99_error:.1%}")
        shown.add_row(name, fitted.family, f"{scored.r2:.4f}", *errors)
    console = Console(width=100, highlight=False)
    console.print(shown)
    console.print(f"fits: {out}", soft_wrap=True)


if __name__ == "__main__":
    start(fit_hardware)
