"""The systems under test: how each sets its replicas, and who routes. What can be tuned is in `Tuning`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.hardware import Hardware
from benchmarks.simulator.pools import Colocated, Disaggregated
from benchmarks.simulator.prefixes import Keeping
from benchmarks.simulator.slosserve import Resize, Slosserve
from benchmarks.simulator.steps import CHUNKED, DECODE_ALL, EDF, OURS, PREFILL_FIRST, WHOLE_PROMPTS, Settings
from benchmarks.simulator.variants import variant
from benchmarks.simulator.world import ReplicaSpec, System
from engine.errors import ConfigError
from engine.request import RoleName

NO_CAP = 1 << 30
MAX_DEFERRED = 256
MAX_DRAFT_TOKENS = 5  # ours: it plans depths up to this


@dataclass(frozen=True, slots=True)
class Tuning:
    """What a system lets its operator set. Fields that a system has no use for stay as they are.

    `token_budget` of a batch, `max_seqs` in it, `draft_tokens` of every verify, `relegate` prompts that are
    late, `prefill` and `decode` nodes.
    """

    token_budget: int = 2048
    max_seqs: int = 256
    draft_tokens: int = 0
    relegate: bool = False
    prefill: int = 0
    decode: int = 0

    @property
    def words(self) -> str:
        """For people: what is set."""
        parts = [f"budget {self.token_budget}", f"cap {self.max_seqs}"]
        if self.draft_tokens:
            parts.append(f"drafts {self.draft_tokens}")
        if self.relegate:
            parts.append("relegates")
        if self.prefill:
            parts.append(f"{self.prefill}P{self.decode}D")
        return ", ".join(parts)


@dataclass(frozen=True, slots=True)
class Design:
    """A system: its defaults, what tuning tries beside them, and its modes. `drafts`: it needs speculation."""

    name: str
    label: str
    composer: int
    defaults: Tuning
    tried: Mapping[str, tuple[Any, ...]]
    disaggregated: bool = False
    drafts: bool = False


BUDGETS = (256, 512, 1024, 2048)
CAPS = (32, 64, 128, 256)
RATIOS = ((1, 1), (2, 1), (1, 2), (1, 3), (3, 1))  # prefill and decode nodes, of ours and of DistServe alike
DESIGNS: Mapping[str, Design] = {
    design.name: design
    for design in (
        Design("vllm", "vLLM", PREFILL_FIRST, Tuning(2048), {"max_seqs": CAPS, "token_budget": BUDGETS}),
        Design(
            "vllm-spec", "vLLM, fixed speculation", PREFILL_FIRST, Tuning(2048, draft_tokens=3),
            {"draft_tokens": tuple(range(1, 9)), "max_seqs": CAPS, "token_budget": (1024, 2048)}, drafts=True,
        ),
        Design("sarathi", "Sarathi-Serve", CHUNKED, Tuning(512), {"token_budget": BUDGETS, "max_seqs": CAPS}),
        Design(
            "sarathi-edf", "Sarathi-EDF, dynamic chunks", EDF, Tuning(2048),
            {"token_budget": BUDGETS, "max_seqs": CAPS, "relegate": (False, True)},
        ),
        Design(
            "distserve", "DistServe", WHOLE_PROMPTS, Tuning(2048, prefill=1, decode=1),
            {"ratio": RATIOS, "token_budget": BUDGETS, "max_seqs": CAPS}, disaggregated=True,
        ),
        Design(
            "ours", "slosserve", OURS, Tuning(2048),
            {"ratio": RATIOS, "token_budget": (1024, 2048), "max_seqs": (128, 256)},
        ),
    )
}  # fmt: skip
OURS_NAME = "ours"
MODES = ("colocated", "disaggregated", "mixed")


def design(name: str) -> Design:
    """A system by name. Raises ConfigError that lists them."""
    try:
        return DESIGNS[name]
    except KeyError:
        raise ConfigError(f"no system {name!r}; there are {', '.join(DESIGNS)}") from None


@dataclass(frozen=True, slots=True)
class Deployment:
    """A system on replicas. `roles` has one for each; baselines read only which of them prefill.

    `acceptance`: chance that a draft is right; None runs without speculation. `one_node`: ours serves every
    request on one replica. `variant`: ours without one of its parts. `resizes`: its pools over time, or with
    `follows_load` as the load asks for. `keeping`: whose KV stays between calls; with sessions, ours is told of
    them. `sticky`: of the baselines that serve on one replica, a chain keeps to its own.
    """

    system: str
    hardware: Hardware
    roles: tuple[RoleName, ...]
    tuning: Tuning
    acceptance: float | None = None
    kv_tokens: int | None = None
    block_tokens: int = 16
    one_node: bool = False
    variant: str = ""
    resizes: tuple[Resize, ...] = ()
    follows_load: bool = False
    keeping: Keeping = Keeping.NEXT_CALLS
    sticky: bool = False

    @property
    def gpus(self) -> int:
        """GPUs of all replicas."""
        return len(self.roles) * self.hardware.tp

    def build(self) -> tuple[list[ReplicaSpec], System, int]:
        """Replicas, who routes, and KV bytes per token. Raises ConfigError for what does not go together."""
        chosen = design(self.system)
        hardware = self.hardware
        drafts = self._draft_tokens(chosen)
        cost = hardware.speculative_cost if drafts else hardware.cost
        specs = [
            ReplicaSpec(
                cost=cost,
                kv_tokens=self.kv_tokens or hardware.kv_tokens,
                settings=self._settings(chosen, role, drafts),
                block_tokens=self.block_tokens,
                max_seqs=self.tuning.max_seqs,
                max_batch_tokens=self.tuning.token_budget if chosen.name == OURS_NAME else NO_CAP,
            )
            for role in self.roles
        ]
        return specs, self._system(chosen, drafts), hardware.kv_bytes_per_token

    def _draft_tokens(self, chosen: Design) -> int:
        if self.acceptance is None:
            if chosen.drafts:
                raise ConfigError(f"{chosen.name} needs --acceptance, the chance that a draft is right")
            return 0
        return MAX_DRAFT_TOKENS if chosen.name == OURS_NAME else self.tuning.draft_tokens

    def _settings(self, chosen: Design, role: RoleName, drafts: int) -> Settings:
        composer = chosen.composer
        if chosen.disaggregated and role is not RoleName.PREFILL:
            composer = DECODE_ALL
        fixed = 0 if chosen.name == OURS_NAME else self.tuning.draft_tokens
        return Settings(
            composer=composer,
            token_budget=self.tuning.token_budget,
            draft_tokens=fixed if drafts else 0,
            relegate=self.tuning.relegate,
            least_chunk=64,
            acceptance=self.acceptance or 0.0,
            max_draft_tokens=drafts,
        )

    def _system(self, chosen: Design, drafts: int) -> System:
        if chosen.name == OURS_NAME:
            parts = variant(self.variant)
            if parts.by_turns and set(self.roles) != {RoleName.MIXED}:
                raise ConfigError("a request can be offered to one node alone only where every node is mixed")
            return Slosserve(
                self.roles,
                parts.decider(MAX_DEFERRED, 0, why=False),
                drafts,
                one_node=self.one_node,
                variant=parts,
                resizes=self.resizes,
                follows_load=self.follows_load,
                sessions=self.keeping is Keeping.SESSIONS,
            )
        if chosen.disaggregated:
            prefill = [i for i, role in enumerate(self.roles) if role is RoleName.PREFILL]
            decode = [i for i, role in enumerate(self.roles) if role is not RoleName.PREFILL]
            if not prefill or not decode:
                raise ConfigError(f"{chosen.name} needs prefill and decode nodes: give --prefill and --decode")
            return Disaggregated(prefill, decode)
        return Colocated(sticky=self.sticky)


def roles_for(mode: str, replicas: int, prefill: int = 0, decode: int = 0) -> tuple[RoleName, ...]:
    """Roles of a cluster: `replicas` that do both, or `prefill` and `decode` nodes (mixed: with `replicas`)."""
    if mode not in MODES:
        raise ConfigError(f"no mode {mode!r}; there are {', '.join(MODES)}")
    if mode == "colocated" or (mode == "mixed" and not prefill):
        return (RoleName.MIXED,) * replicas
    pools = (RoleName.PREFILL,) * prefill + (RoleName.DECODE,) * decode
    return pools + ((RoleName.MIXED,) * replicas if mode == "mixed" else ())


def tuned(chosen: Design, field: str, value: Any, base: Tuning) -> Tuning:
    """`base` with one thing set, as `Design.tried` names it."""
    if field == "ratio":
        return replace(base, prefill=value[0], decode=value[1])
    return replace(base, **{field: value})
