"""The role contract: what a node in a role takes on. How it composes its batches is the same in every role."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from engine.base import BatchPlan, Seq
from engine.batch import Duty, Moment, compose
from engine.request import RoleName, WorkKind


class Role:
    """A rule that a node follows until the coordinator gives it another. Holds no state of its own."""

    name: RoleName
    kinds: frozenset[WorkKind]

    def declines(self, kind: WorkKind) -> str | None:
        """Why a node in this role will not take a kind of work; None if it will."""
        return None if kind in self.kinds else f"a {self.name} node takes no {kind} work"

    def compose(self, seqs: Sequence[Seq], duties: Mapping[str, Duty], moment: Moment) -> BatchPlan:
        """The next batch. Called in the step thread before every batch; must be quick and must not fail."""
        return compose(seqs, duties, moment)
