"""What the cluster has promised and kept, by class and stage; where requests went; what KV was moved."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engine.messages import Finished, LoopEnded

RECENT_HANDOFFS = 4096
RECENT_PLACINGS = 8192


@dataclass(slots=True)
class Scorecard:
    """What was promised and kept, by class and stage; and where requests went."""

    requests: Counter[str] = field(default_factory=Counter)
    met: Counter[str] = field(default_factory=Counter)
    strict: Counter[str] = field(default_factory=Counter)
    goodput: Counter[str] = field(default_factory=Counter)
    stages: dict[str, dict[str, Counter[str]]] = field(default_factory=dict)
    loops: dict[str, Counter[str]] = field(default_factory=dict)
    placements: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    handoffs: int = 0
    kv_bytes: int = 0
    recent: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=RECENT_HANDOFFS))
    placing_s: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=RECENT_PLACINGS))

    def count(self, finished: Finished) -> None:
        """Count one request that is over."""
        self.outcomes[finished.outcome] += 1
        if finished.placement != "none":
            self.placements[finished.placement] += 1
            self.placements["best_effort"] += finished.verdict == "best_effort"
        if finished.handoff_s is not None:
            self.handoffs += 1
            self.kv_bytes += finished.kv_bytes
            self.recent.append((finished.handoff_s, finished.kv_bytes))
        if not finished.stages:
            return
        name = finished.class_name or "none"
        self.requests[name] += 1
        self.met[name] += finished.met
        self.strict[name] += finished.strict
        self.goodput[name] += finished.goodput
        for stage, met in finished.stages.items():
            counts = self.stages.setdefault(name, {}).setdefault(stage, Counter())
            counts["total"] += 1
            counts["met"] += met

    def count_loop(self, loop: LoopEnded) -> None:
        """Count a tool loop that is over."""
        counts = self.loops.setdefault(loop.class_name, Counter())
        counts["total"] += 1
        counts["met"] += loop.met
        counts["calls"] += loop.calls

    def loop_summary(self) -> dict[str, dict[str, int]]:
        """Tool loops with a deadline, by class: how many, how many in time, and their calls."""
        return {name: dict(counts) for name, counts in self.loops.items()}

    def placing_summary(self) -> dict[str, Any]:
        """What the last placements took here, and how much of it the processor worked on them, in ms."""
        if not self.placing_s:
            return {"count": 0}
        (p50, cpu_p50), (p99, cpu_p99) = np.quantile(
            np.array(self.placing_s) * 1e3, (0.5, 0.99), axis=0
        ).tolist()
        return {
            "count": len(self.placing_s),
            "p50_ms": p50,
            "p99_ms": p99,
            "cpu_p50_ms": cpu_p50,
            "cpu_p99_ms": cpu_p99,
        }

    def attainment(self) -> dict[str, Any]:
        """By class: requests, how many met every stage, each stage; and the share by two stricter measures."""
        return {
            name: {
                "requests": total,
                "met": self.met[name],
                "attainment": self.met[name] / total,
                "strict": self.strict[name] / total,
                "goodput": self.goodput[name] / total,
                "stages": {stage: dict(counts) for stage, counts in self.stages.get(name, {}).items()},
            }
            for name, total in self.requests.items()
        }

    def handoff_summary(self) -> dict[str, Any]:
        """Count, bytes, time percentiles and bandwidth of KV transfers."""
        seconds = np.array([seconds for seconds, _ in self.recent])
        moved = sum(kv_bytes for _, kv_bytes in self.recent)
        total_s = float(seconds.sum())
        return {
            "count": self.handoffs,
            "kv_bytes": self.kv_bytes,
            "p50_s": float(np.percentile(seconds, 50)) if len(seconds) else None,
            "p99_s": float(np.percentile(seconds, 99)) if len(seconds) else None,
            "bytes_per_s": moved / total_s if total_s > 0 else None,
        }
