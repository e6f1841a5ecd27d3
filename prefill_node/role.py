"""The prefill role: earliest-deadline chunked prefill with no pace to keep, KV offered at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from engine.base import BatchPlan, Seq
from engine.batch import Duty, compose_decode, compose_prefill
from engine.cost import StepCost
from engine.request import RoleName, WorkKind
from engine.role import Role


class PrefillRole(Role):
    """Takes prefills only. Streams that were here before a change of role are finished at their pace."""

    name = RoleName.PREFILL
    kinds = frozenset({WorkKind.PREFILL})

    def compose(
        self,
        seqs: Sequence[Seq],
        duties: Mapping[str, Duty],
        now_s: float,
        cost: StepCost,
        max_batch_tokens: int,
    ) -> BatchPlan:
        """Earliest deadline first, the largest batch; with the pace of any stream that is still here."""
        still_decoding = any(seq.decoding for seq in seqs)
        compose = compose_decode if still_decoding else compose_prefill
        return compose(seqs, duties, now_s, cost, max_batch_tokens)
