"""What an admission is decided on: one replica's promises, its cost, its memory, and who asks to be let in.

Times are seconds from the start of the plan (the end of the batch in flight).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
from numpy.typing import NDArray

from engine.cost import StepCost

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Tier:
    """A pace that requests share: at most `tpot_s` per token.

    `acceptance`: chance that a drafted token of this tier is right; None: its decodes are not drafted for.
    """

    name: str
    tpot_s: float
    acceptance: float | None = None


@dataclass(frozen=True, slots=True)
class Decode:
    """A running decode that was promised: its next token is due in `due_s`, then one every TPOT of its tier."""

    id: str
    tier: str
    due_s: float
    context_tokens: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Decodes(Sequence[Decode]):
    """Running decodes as columns, [n] each: there are many, and every candidate looks at all of them.

    `tier`: the row of each in `tier_names`.
    """

    ids: Sequence[str]
    tier_names: Sequence[str]
    tier: Ints
    due_s: Floats
    context_tokens: Ints

    @classmethod
    def of(cls, decodes: Sequence[Decode]) -> Decodes:
        """The same decodes as columns."""
        if isinstance(decodes, Decodes):
            return decodes
        names: dict[str, int] = {}
        tier = [names.setdefault(decode.tier, len(names)) for decode in decodes]
        return cls(
            [decode.id for decode in decodes],
            list(names),
            np.array(tier, dtype=np.int64),
            np.array([decode.due_s for decode in decodes], dtype=np.float64),
            np.array([decode.context_tokens for decode in decodes], dtype=np.int64),
        )

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[Decode]:
        tiers = [self.tier_names[at] for at in self.tier.tolist()]
        return map(Decode, self.ids, tiers, self.due_s.tolist(), self.context_tokens.tolist())

    @overload
    def __getitem__(self, at: int) -> Decode: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[Decode]: ...
    def __getitem__(self, at: int | slice) -> Decode | Sequence[Decode]:
        return list(self)[at]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True, slots=True)
class Prefill:
    """A promised prefill: `tokens` left to compute by `deadline_s`. Without a tier it decodes elsewhere."""

    id: str
    tokens: int
    deadline_s: float
    tier: str | None = None
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Newcomer:
    """Asks to be let in. `kv_tokens`: KV that it will hold in each interval of `Instance.free_kv`.

    `tokens` are to be computed here; `cached_tokens` of its prompt have their KV here already.
    """

    id: str
    tokens: int
    deadline_s: float
    tier: str | None = None
    kv_tokens: Sequence[int] = (0,)
    value: float = 1.0
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class FreeKv:
    """KV tokens free for newcomers from `at_s` on, until the next interval begins."""

    at_s: float
    tokens: int


@dataclass(frozen=True, slots=True)
class Instance:
    """One admission problem on one replica.

    `free_seqs`: how many newcomers have a slot. `late_seqs`: decodes whose promise is broken; a token each a
    batch. Speculation: at most `max_depth` tokens a verify, `draft_step_s` for each step of the draft model
    beside what `cost` says, `theta` of the time that accepted tokens would give (see engine/speculation.py).
    """

    cost: StepCost
    max_batch_tokens: int
    tiers: Sequence[Tier]
    decodes: Sequence[Decode] = ()
    prefills: Sequence[Prefill] = ()
    newcomers: Sequence[Newcomer] = ()
    free_kv: Sequence[FreeKv] = (FreeKv(0.0, 1 << 40),)
    free_seqs: int = 1 << 30
    late_seqs: int = 0
    max_depth: int = 1
    draft_step_s: float = 0.0
    theta: float = 1.0
