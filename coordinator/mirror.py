"""The coordinator's mirror of each node: its last report, and what was placed since.

The node's own state is the truth; the mirror is late by a report. What was placed and has not yet shown up in
a report is counted as if it had arrived, so that two requests placed in one instant do not both get the last
place. What an idle node is given it begins at once: until it tells, that prompt is under way for the planner.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from coordinator.planner.memory import OVERFLOW_Z, next_z
from coordinator.planner.replica import Replica
from coordinator.planner.works import Works
from engine.messages import Report, WorkState
from engine.request import RoleName, WorkKind, work_id
from engine.speculation import MAX_DEPTH

PLACED_GRACE_S = 2.0  # a placement that no report shows by then did not reach the node
MOST_MARGIN = 0.5  # of what steps take: a machine that is noisier than that is planned for as if it were not
SHORT_SHARE = 0.8  # of the blocks in use: from there on a promise is a trial of the reserve of memory
PAIR_GRACE_S = 60.0  # the decode half of a pair is submitted only when its prefill is over


@dataclass(frozen=True, slots=True)
class Placement:
    """One placement that a report does not show yet."""

    state: WorkState
    at_s: float
    until_s: float


@dataclass(slots=True)
class NodeMirror:
    """One node as the coordinator sees it. Times are on the coordinator's clock.

    `leaving`: it is given nothing new, and ended once it has nothing left. `requests` are here or on their way
    here; `tightest_s` is the tightest pace promised here, without end if none is. Both are kept and not counted
    when asked for: placement looks at every node for every request.
    """

    name: str
    address: str
    role: RoleName
    report: Report | None = None
    reported_s: float = 0.0
    state: str = "starting"
    leaving: bool = False
    overflow_z: float = OVERFLOW_Z
    requests: int = 0
    tightest_s: float = math.inf
    placed: dict[str, Placement] = field(default_factory=dict)
    reported: dict[str, WorkState] = field(default_factory=dict)  # works of the report, by work id
    _works: Works | None = None  # made when it is asked for, until something changes

    def take_report(self, report: Report, now_s: float, stuck_step_s: float = math.inf) -> None:
        """Adopt the node's own account; placements that it shows are no longer ours to count. A node that was
        lost in a step of more than `stuck_step_s` is ready again once that is over."""
        if self.report is not None and self.report.boot_id == report.boot_id:
            starved = report.promises_starved - self.report.promises_starved
            self.overflow_z = next_z(self.overflow_z, 0, starved)
        self.report = report
        self.reported_s = now_s - report.age_s
        self.role = report.role
        if self.state != "lost" or report.stuck_s <= stuck_step_s:
            self.state = "ready"
        paces_s = (work.tpot_s for work in report.works if not work.best_effort)
        self.tightest_s = min(paces_s, default=math.inf)
        self.reported = {work_id(work.request_id, work.attempt): work for work in report.works}
        self.placed = {
            key: placement
            for key, placement in self.placed.items()
            if not _shows(self.reported.get(key), placement.state) and now_s < placement.until_s
        }
        self._count()

    def place(self, state: WorkState, now_s: float) -> None:
        """Count a placement until a report shows it. A promise that is made while memory is short lets its
        reserve shrink a bit: what was promised before tells nothing of it."""
        if not state.best_effort:
            self.tightest_s = min(self.tightest_s, state.tpot_s)
            if self._memory_is_short:
                self.overflow_z = next_z(self.overflow_z, 1, 0)
        grace_s = PAIR_GRACE_S if state.kind is WorkKind.DECODE else PLACED_GRACE_S
        self.placed[work_id(state.request_id, state.attempt)] = Placement(state, now_s, now_s + grace_s)
        self._count()

    @property
    def _memory_is_short(self) -> bool:
        usage = None if self.report is None else self.report.usage
        return usage is not None and usage.used_blocks > SHORT_SHARE * usage.num_blocks

    def forget(self, request_id: str, attempt: int) -> None:
        """This attempt at a request is over, and so is every one before it."""
        if self.placed:
            for earlier in range(1, attempt + 1):
                self.placed.pop(work_id(request_id, earlier), None)
            self._count()

    def lose(self) -> None:
        """The node is gone, with what was on its way there."""
        self.state = "lost"
        self.placed.clear()
        self._count()

    def state_of(self, request_id: str, attempt: int) -> WorkState | None:
        """What the node itself last said of an attempt; None if nothing, or if it is handed on."""
        return self.reported.get(work_id(request_id, attempt))

    def _count(self) -> None:
        self._works = None
        self.requests = len(self.reported) + sum(key not in self.reported for key in self.placed)

    @property
    def _told_of_s(self) -> float:
        """The moment of which the report tells: when the batch ends that was in flight when it was made."""
        return self.reported_s + (0.0 if self.report is None else self.report.in_flight_s)

    @property
    def _begun(self) -> Placement | None:
        """The prompt that an idle node was given first, which it has begun before it could tell."""
        if self.report is None or self.report.works or self.report.in_flight_s > 0:
            return None
        first = next(iter(self.placed.values()), None)
        return None if first is None or first.state.prefill_left_tokens == 0 else first

    def _under_way(self) -> tuple[Works, float]:
        """All works as they will be when the batch in flight ends, and when that is."""
        assert self.report is not None
        if (begun := self._begun) is None:
            return self.works, self._told_of_s
        known = begun.state.prompt_tokens + begun.state.output_tokens
        computed = known - begun.state.prefill_left_tokens
        alone_s = self.report.cost.prefill_alone_s(known, self.report.info.max_batch_tokens, computed)
        ends_s = max(begun.at_s, self.reported_s) + alone_s
        later = ((one.state, one.at_s - ends_s) for one in self.placed.values() if one is not begun)
        return Works.of([_after_its_prompt(begun, ends_s)], later), ends_s

    @property
    def serving(self) -> bool:
        """Whether work can be placed here."""
        return self.state == "ready" and self.report is not None and not self.leaving

    def welcomes_pace(self, tpot_s: float) -> bool:
        """Whether a promise at this pace tightens nothing: one as tight is kept here already, or none is."""
        return self.tightest_s == math.inf or self.tightest_s <= tpot_s

    @property
    def works(self) -> Works:
        """What is here, and what is on its way here, with the times left when the last batch told of ends."""
        if self._works is None:
            reported = [] if self.report is None else self.report.works
            told_of_s = self._told_of_s
            placed = ((placement.state, placement.at_s - told_of_s) for placement in self.placed.values())
            self._works = Works.of(reported, placed)
        return self._works

    @property
    def promised_prefill_tokens(self) -> int:
        """That are still to be computed here for promised prompts."""
        works = self.works
        return sum(works.holding[at].prefill_left_tokens for at in works.prefilling.tolist())

    @property
    def promised_pull_tokens(self) -> int:
        """Of promised prompts whose KV is still to come here."""
        return self.works.pull_tokens

    def replica(self, now_s: float) -> Replica:
        """The node as the planner sees it."""
        report = self.report
        assert report is not None
        works, ends_s = self._under_way()
        return Replica(
            cost=report.cost,
            margin=min(report.cost_margin, MOST_MARGIN),
            max_depth=min(report.info.max_draft_tokens + 1, MAX_DEPTH),
            overflow_z=self.overflow_z,
            max_batch_tokens=report.info.max_batch_tokens,
            kv_tokens=report.info.num_blocks * report.info.block_size,
            block_tokens=report.info.block_size,
            max_seqs=report.info.max_num_seqs,
            works=works,
            age_s=now_s - ends_s,
            step_s=report.step_s,
        )


def _after_its_prompt(begun: Placement, at_s: float) -> WorkState:
    """As it will be at `at_s`, when its prompt has been computed and the first token said."""
    first_left_s = begun.state.first_token_left_s + begun.at_s - at_s
    return replace(
        begun.state,
        prefill_left_tokens=0,
        output_tokens=begun.state.output_tokens + 1,
        first_token_left_s=first_left_s,
        next_due_left_s=max(first_left_s, 0.0) + begun.state.tpot_s,
    )


def _shows(reported: WorkState | None, placed: WorkState) -> bool:
    """Whether a report shows a placement. One from before a promotion still says best effort."""
    return reported is not None and (placed.best_effort or not reported.best_effort)
