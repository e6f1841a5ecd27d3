"""The decode role: due tokens first, KV taken in; and the mixed role, which also prefills."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from engine.base import BatchPlan, Seq
from engine.batch import Duty, compose_decode
from engine.cost import StepCost
from engine.request import RoleName, WorkKind
from engine.role import Role


class DecodeRole(Role):
    """Takes decodes, and whole requests: what one node must serve alone is served where it decodes."""

    name = RoleName.DECODE
    kinds = frozenset({WorkKind.DECODE, WorkKind.WHOLE})

    def compose(
        self,
        seqs: Sequence[Seq],
        duties: Mapping[str, Duty],
        now_s: float,
        cost: StepCost,
        max_batch_tokens: int,
    ) -> BatchPlan:
        """Due tokens first, then prefills, earliest deadline first, in what is left of the batch."""
        return compose_decode(seqs, duties, now_s, cost, max_batch_tokens)


class MixedRole(DecodeRole):
    """Takes everything: a colocated replica."""

    name = RoleName.MIXED
    kinds = frozenset(WorkKind)
