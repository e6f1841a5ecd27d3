"""What a candidate costs its replica: budget that it can no longer give to the tiers served there.

One tight request among loose ones shrinks every batch, and so costs much; beside others of its kind it costs a
token a batch. Taking the candidate that loses least gathers classes by itself.
"""

from __future__ import annotations

from coordinator.planner.admission import Problem
from coordinator.planner.budget import capacity
from coordinator.planner.given import NEWCOMER, PREFILL


def loss_s(problem: Problem, residence_s: float) -> float:
    """Seconds of this replica that the newcomers of `problem` take: their prompts, and what their decodes
    take away from every batch while they stay (`residence_s` each). They decode plainly."""
    before, after = budget_rate(problem, joined=False), budget_rate(problem, joined=True)
    idle = float(problem.load[0]) / problem.full_s
    prompts = float(problem.tokens[problem.newcomers].sum())
    return prompts / max(before, 1.0) + max(before - after, 0.0) / idle * residence_s


def budget_rate(problem: Problem, *, joined: bool) -> float:
    """Prefill tokens a second left beside the decodes, for ever: B(L, n) / L. `joined`: with the newcomers."""
    counts = problem.running.copy()
    for kind, tier in zip(problem.kinds.tolist(), problem.tiers.tolist(), strict=True):
        if tier >= 0 and (kind == PREFILL or (kind == NEWCOMER and joined)):
            counts[tier] += 1
    length_s = float(min([problem.full_s, *problem.period_s[counts > 0]]))
    others = counts - problem.running
    tokens = capacity(
        length_s,
        length_s,
        problem.line,
        problem.load,
        problem.period_s,
        others,
        problem.tier_s,
        problem.joined_s,
    )
    decodes = float((counts * problem.slots * length_s / problem.period_s).sum()) if len(counts) else 0.0
    return (float(tokens) - decodes) / length_s
