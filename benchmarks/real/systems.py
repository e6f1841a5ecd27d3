"""The systems that are measured on real engines, and the cluster or the servers that each of them needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.real.site import Site
from benchmarks.simulator.systems import OURS_NAME, Tuning
from coordinator.config import ClusterConfig, load_config
from engine.errors import ConfigError

FLOORS = ("chatbot", "coder", "summarizer", "tool", "reasoning")


@dataclass(frozen=True, slots=True)
class RealSystem:
    """One system on one or two engines.

    `design` and `mode`: what the simulator takes for it. Ours has pools by its mode; stock vLLM on two engines
    is asked by turns, or prompts at the first and the rest at the second where it is `disaggregated`.
    `drafts`: tokens that n-gram speculation drafts, for ours at most. `tuned`: budget and batch cap are chosen.
    """

    name: str
    label: str
    engines: int
    design: str
    mode: str = "colocated"
    tuned: bool = False
    drafts: int = 0

    @property
    def untuned(self) -> RealSystem:
        """The same as it comes: with the same settings, nothing is different."""
        return SYSTEMS[self.name.removesuffix("-tuned")]

    @property
    def ours(self) -> bool:
        """Whether our planner is in charge."""
        return self.design == OURS_NAME

    def defaults(self, site: Site) -> Tuning:
        """As it comes, in the words of the simulator."""
        base = site.our_defaults if self.ours else site.stock_defaults
        return replace(base, prefill=1, decode=1) if self.mode == "disaggregated" else base


SYSTEMS: Mapping[str, RealSystem] = {
    system.name: system
    for system in (
        RealSystem("vllm", "vLLM", 1, "sarathi"),
        RealSystem("vllm-tuned", "vLLM, tuned", 1, "sarathi", tuned=True),
        RealSystem("ours", "slosserve", 1, OURS_NAME),
        RealSystem("vllm-ngram", "vLLM, n-gram drafts", 1, "sarathi", drafts=3),
        RealSystem("ours-ngram", "slosserve, n-gram drafts", 1, OURS_NAME, drafts=5),
        RealSystem("vllm-2", "vLLM, two by turns", 2, "sarathi"),
        RealSystem("vllm-2-tuned", "vLLM, two by turns, tuned", 2, "sarathi", tuned=True),
        RealSystem("vllm-1p1d", "vLLM, 1P1D over NIXL", 2, "distserve", "disaggregated"),
        RealSystem("ours-2", "slosserve, colocated", 2, OURS_NAME),
        RealSystem("ours-mixed", "slosserve, mixed", 2, OURS_NAME, "mixed"),
        RealSystem("ours-1p1d", "slosserve, 1P1D", 2, OURS_NAME, "disaggregated"),
    )
}


def systems(engines: int, names: list[str] | None = None, *, drafting: bool = True) -> list[RealSystem]:
    """Those on so many engines, of `names` if given. Raises ConfigError for a name that there is not."""
    unknown = sorted(set(names or ()) - set(SYSTEMS))
    if unknown:
        raise ConfigError(f"no system {unknown[0]!r}; there are {', '.join(SYSTEMS)}")
    chosen = [one for one in SYSTEMS.values() if one.engines == engines and (not names or one.name in names)]
    return [one for one in chosen if drafting or not one.drafts]


def configuration(
    site: Site, system: RealSystem, tuning: Tuning, model: str, profile: Path | None
) -> ClusterConfig:
    """Of our cluster, or of the engines of stock vLLM: the same arguments for both."""
    pools = {"mixed": system.engines, "prefill": 0, "decode": 0}
    if system.mode == "disaggregated":
        pools = {"mixed": 0, "prefill": 1, "decode": 1}
    overrides: dict[str, Any] = {
        "name": f"bench-real-{system.name}",
        "model": model,
        "dtype": "auto",
        "endpoint.port": 0,
        "engine.kv_cache_gib": site.kv_gib,
        "engine.max_model_len": site.max_model_len,
        "engine.max_num_seqs": tuning.max_seqs,
        "engine.max_batch_tokens": tuning.token_budget,
        "planner.pairs": system.mode != "colocated",
        **{f"pools.{role}": count for role, count in pools.items()},
        # As in the paper: a promise is a multiple of the prefill, however short.
        **{f"slo_classes.{name}.ttft_floor_ms": 0.0 for name in FLOORS},
    }
    if profile is not None:
        overrides["engine.step_profile"] = str(profile)
    if system.drafts:
        overrides["engine.speculative"] = {
            "method": "ngram",
            "num_speculative_tokens": system.drafts,
            "prompt_lookup_max": 4,
            "prompt_lookup_min": 2,
        }
    return load_config(site.config, overrides)
