"""The role contract: what a node in a role takes on, and how it composes its batches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from engine.base import BatchPlan, Seq
from engine.batch import Duty
from engine.cost import StepCost
from engine.request import RoleName, WorkKind


class Role(ABC):
    """A rule that a node follows until the coordinator gives it another. Holds no state of its own."""

    name: RoleName
    kinds: frozenset[WorkKind]

    def declines(self, kind: WorkKind) -> str | None:
        """Why a node in this role will not take a kind of work; None if it will."""
        return None if kind in self.kinds else f"a {self.name} node takes no {kind} work"

    @abstractmethod
    def compose(
        self,
        seqs: Sequence[Seq],
        duties: Mapping[str, Duty],
        now_s: float,
        cost: StepCost,
        max_batch_tokens: int,
    ) -> BatchPlan:
        """The next batch. Called in the step thread before every batch; must be quick and must not fail."""
