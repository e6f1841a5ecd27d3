"""What pools go through, window by window, by what nodes tell and whom they had no room for."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

from coordinator.mirror import NodeMirror
from coordinator.pool_policy import OTHER, WINDOW_S, Move, PoolLoad, PoolPolicy
from engine.messages import Report, WorkState
from engine.request import RoleName


class PoolLoads:
    """Looks at `mirrors` whenever it is called. `lacked` counts requests that could not be promised for want
    of a pool; it is cleared at the end of each window.
    """

    def __init__(self, mirrors: Mapping[str, NodeMirror], lacked: Counter[RoleName]) -> None:
        self._mirrors = mirrors
        self._lacked = lacked
        self._window_ends_s = math.inf
        self._looks = self._busy = 0

    def forget(self) -> None:
        """Begin anew with the next look."""
        self._window_ends_s = math.inf

    def next_move(self, policy: PoolPolicy, now_s: float) -> Move | None:
        """Look at the nodes; at the end of a window, what `policy` says of it."""
        if math.isinf(self._window_ends_s):
            self._begin(now_s)
        prefilling = self._pool(RoleName.PREFILL)
        self._looks += len(prefilling)
        self._busy += sum(any(map(_promised_prompt, report.works)) for _, report in prefilling)
        if now_s < self._window_ends_s:
            return None
        loads = {role: self._load(role) for role in OTHER}
        self._begin(now_s)
        return policy.decide(loads, now_s) if all(load.nodes for load in loads.values()) else None

    def least_loaded(self, role: RoleName) -> str:
        """The node of a pool that serves least."""
        return min((mirror for mirror, _ in self._pool(role)), key=lambda mirror: mirror.requests).name

    def _begin(self, now_s: float) -> None:
        self._window_ends_s = now_s + WINDOW_S
        self._looks = self._busy = 0
        self._lacked.clear()

    def _pool(self, role: RoleName) -> list[tuple[NodeMirror, Report]]:
        return [
            (mirror, mirror.report)
            for mirror in self._mirrors.values()
            if mirror.role is role and mirror.serving and mirror.report is not None
        ]

    def _load(self, role: RoleName) -> PoolLoad:
        reports = [report for _, report in self._pool(role)]
        nodes = max(len(reports), 1)
        if role is RoleName.PREFILL:
            queue_s, used = sum(map(_prompts_s, reports)) / nodes, self._busy / max(self._looks, 1)
        else:
            queue_s, used = 0.0, sum(map(_occupied, reports)) / nodes
        return PoolLoad(len(reports), self._lacked[role], queue_s, min(used, 1.0))


def _promised_prompt(work: WorkState) -> bool:
    return work.prefill_left_tokens > 0 and not work.best_effort


def _prompts_s(report: Report) -> float:
    """What the prompts that are still to be computed there take, promised or not."""
    tokens = sum(work.prefill_left_tokens for work in report.works)
    most = report.info.max_batch_tokens
    return tokens / most * report.cost.predict(most)


def _occupied(report: Report) -> float:
    """Memory, slots or time, whichever is shortest: the share of it that is in use."""
    usage, info = report.usage, report.info
    memory = usage.used_blocks / max(usage.num_blocks, 1)
    slots = (usage.running + usage.waiting) / max(info.max_num_seqs, 1)
    paces_s = [work.tpot_s for work in report.works if not work.best_effort]
    pace = report.step_s / min(paces_s) if paces_s else 0.0
    return max(memory, slots, pace)
