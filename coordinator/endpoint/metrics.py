"""What an endpoint counts beside vLLM's own metrics: promises kept, KV moved. Labels are bounded."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import Counter, Histogram

from coordinator.endpoint.loops import LoopEnd
from engine.messages import Finished

HANDOFF_BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)

GAP_BUCKETS_S = (0.1, 0.2, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 60.0)


class EndpointMetrics:
    """Prometheus counters of one endpoint process, under `slosserve_`."""

    def __init__(self, classes: Sequence[str]) -> None:
        self._classes = frozenset(classes)
        self.requests = Counter(
            "slosserve_requests", "Requests that are over.", ["slo_class", "outcome", "verdict"]
        )
        self.stages = Counter(
            "slosserve_stages", "Stages of requests that carried an SLO.", ["slo_class", "stage", "met"]
        )
        self.loops = Counter(
            "slosserve_loops", "Tool loops with a deadline that are over.", ["slo_class", "met"]
        )
        self.retries = Counter("slosserve_placements_retried", "Attempts that were placed again.")
        self.gaps = Histogram(
            "slosserve_stream_gap_seconds",
            "Between two tokens of a stream whose node was lost in between.",
            buckets=GAP_BUCKETS_S,
        )
        self.kv_bytes = Counter("slosserve_handoff_bytes", "KV bytes moved between nodes.")
        self.handoffs = Histogram(
            "slosserve_handoff_seconds", "Time of a KV transfer.", buckets=HANDOFF_BUCKETS_S
        )

    def count_loop(self, loop: LoopEnd) -> None:
        """Count one loop that is over."""
        self.loops.labels(self._label(loop.class_name), str(loop.met).lower()).inc()

    def _label(self, class_name: str) -> str:
        return class_name if class_name in self._classes else "custom"

    def count(self, finished: Finished, verdict: str) -> None:
        """Count one request that is over."""
        slo_class = self._label(finished.class_name or "none")
        self.requests.labels(slo_class, finished.outcome, verdict or "none").inc()
        for stage, met in finished.stages.items():
            self.stages.labels(slo_class, stage, str(met).lower()).inc()
        if finished.handoff_s is not None:
            self.handoffs.observe(finished.handoff_s)
            self.kv_bytes.inc(finished.kv_bytes)
