"""What `/cluster` shows of a node, and of the pools."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from coordinator.mirror import NodeMirror
from engine.messages import Report
from engine.request import RoleName, WorkKind

LEAVING = "leaving"


def node_state(mirror: NodeMirror, now_s: float) -> dict[str, Any]:
    """A node: its role and state, what it holds and does, and what its steps cost."""
    report = mirror.report
    described: dict[str, Any] = {
        "name": mirror.name,
        "role": str(mirror.role),
        "state": LEAVING if mirror.leaving else mirror.state,
        "address": mirror.address,
        "placed": len(mirror.placed),
    }
    if report is not None:
        decoding = sum(work.kind is not WorkKind.PREFILL for work in report.works)
        described |= {
            "used_blocks": report.usage.used_blocks,
            "num_blocks": report.usage.num_blocks,
            "running": report.usage.running,
            "waiting": report.usage.waiting,
            "requests": len(report.works),
            "decoding": decoding,
            "leases": len(report.leases),
            "of_former_role": _of_former_role(report),
            "role_pause_ms": None if report.role_pause_s is None else report.role_pause_s * 1e3,
            "steps": report.steps,
            "step_ms": report.step_s * 1e3,
            "tally": asdict(report.tally),
            "cost_base_ms": report.cost.predict(1) * 1e3,
            "cost_per_token_ms": _per_token_s(report) * 1e3,
            "cost_drift": report.cost.drift,
            "cost_margin": report.cost_margin,
            "promises_preempted": report.promises_preempted,
            "promises_starved": report.promises_starved,
            "local_prefills": report.local_prefills,
            "corrupt_pulls": report.corrupt_pulls,
            "sessions": report.sessions,
            "session_tokens": report.session_tokens,
            "age_s": now_s - mirror.reported_s,
            "pid": report.pid,
        }
    return described


def _of_former_role(report: Report) -> int:
    """Works that a node of its role would not be given: they were here before it changed, and go on."""
    match report.role:
        case RoleName.PREFILL:
            return sum(work.kind is not WorkKind.PREFILL for work in report.works)
        case RoleName.DECODE:
            return sum(work.kind is WorkKind.PREFILL for work in report.works)
        case RoleName.MIXED:
            return 0


def mode_of(pools: Mapping[str, int]) -> str:
    """In which mode pools of these sizes serve."""
    pairs = pools.get("prefill", 0) > 0 and pools.get("decode", 0) > 0
    if pairs and pools.get("mixed", 0):
        return "mixed"
    return "disaggregated" if pairs else "colocated"


def _per_token_s(report: Report) -> float:
    """What one token more costs, on average up to the largest batch."""
    most = max(report.info.max_batch_tokens, 2)
    return (report.cost.predict(most) - report.cost.predict(1)) / (most - 1)
