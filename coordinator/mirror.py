"""The coordinator's mirror of each node: its last report, and what was placed since.

The node's own state is the truth; the mirror is late by a report. What was placed and has not yet shown up in
a report is counted as if it had arrived, so that two requests placed in one instant do not both get the last
place.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from coordinator.planner.admission import Prefill, Replica
from engine.cost import StepCost
from engine.messages import Report, WorkState
from engine.request import RoleName, WorkKind, work_id

PLACED_GRACE_S = 2.0  # a placement that no report shows by then did not reach the node
PAIR_GRACE_S = 60.0  # the decode half of a pair is submitted only when its prefill is over


@dataclass(frozen=True, slots=True)
class Placement:
    """One placement that a report does not show yet."""

    state: WorkState
    until_s: float


@dataclass(slots=True)
class NodeMirror:
    """One node as the coordinator sees it. Times are on the coordinator's clock."""

    name: str
    address: str
    role: RoleName
    report: Report | None = None
    reported_s: float = 0.0
    state: str = "starting"
    placed: dict[str, Placement] = field(default_factory=dict)

    def take_report(self, report: Report, now_s: float) -> None:
        """Adopt the node's own account; placements that it shows are no longer ours to count."""
        self.report = report
        self.reported_s = now_s
        self.role = report.role
        self.state = "ready"
        seen = {work_id(work.request_id, work.attempt) for work in report.works}
        self.placed = {
            key: placement
            for key, placement in self.placed.items()
            if key not in seen and now_s < placement.until_s
        }

    def place(self, state: WorkState, now_s: float) -> None:
        """Count a placement until a report shows it."""
        grace_s = PAIR_GRACE_S if state.kind is WorkKind.DECODE else PLACED_GRACE_S
        self.placed[work_id(state.request_id, state.attempt)] = Placement(state, now_s + grace_s)

    def forget(self, request_id: str, attempt: int) -> None:
        """This attempt at a request is over, and so is every one before it."""
        if self.placed:
            for earlier in range(1, attempt + 1):
                self.placed.pop(work_id(request_id, earlier), None)

    @property
    def requests(self) -> int:
        """Requests here, and on their way here."""
        return len(self.placed) + (0 if self.report is None else len(self.report.works))

    @property
    def serving(self) -> bool:
        """Whether work can be placed here."""
        return self.state == "ready" and self.report is not None

    def replica(self, now_s: float) -> Replica:
        """The node as the planner sees it."""
        report = self.report
        assert report is not None
        age_s = now_s - self.reported_s
        works = [*report.works, *(placement.state for placement in self.placed.values())]
        promised = [work for work in works if not work.best_effort]
        return Replica(
            cost=StepCost(report.cost_base_s, report.cost_per_token_s),
            max_batch_tokens=report.info.max_batch_tokens,
            free_kv_tokens=self._free_kv_tokens(report, works),
            free_seqs=report.info.max_num_seqs - len(promised),
            prefills=[_prefill(work, age_s) for work in promised if work.prefill_left_tokens > 0],
            decode_tpots_s=[work.tpot_s for work in promised if _decodes(work)],
        )

    def _free_kv_tokens(self, report: Report, works: Iterable[WorkState]) -> int:
        """Tokens of KV that no promise needs. A promise is charged prompt + max_tokens to its end."""
        charged = 0
        for work in works:
            if not work.best_effort:
                output = 1 if work.kind is WorkKind.PREFILL else work.max_tokens
                charged += work.prompt_tokens + output
        return report.info.num_blocks * report.info.block_size - charged


def _decodes(work: WorkState) -> bool:
    return work.kind is not WorkKind.PREFILL and work.prefill_left_tokens == 0


def _prefill(work: WorkState, age_s: float) -> Prefill:
    tpot_s = None if work.kind is WorkKind.PREFILL else work.tpot_s
    return Prefill(work.prefill_left_tokens, work.first_token_left_s - age_s, tpot_s)
