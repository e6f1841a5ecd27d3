"""A simulated twin of a node that runs: the same step times, memory, limits and promises, and no engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import numpy as np

from benchmarks.capacity import Point, capacity
from benchmarks.hardware import Hardware, hardware
from benchmarks.scenarios import make
from benchmarks.simulator.outcome import Outcome
from benchmarks.simulator.run import promises, run
from benchmarks.simulator.systems import OURS_NAME, Deployment, Tuning, roles_for
from benchmarks.workload import Workload
from coordinator.config import ClusterConfig, SloClass
from engine.cost import StepCost
from engine.errors import ConfigError
from engine.request import Slo

DIVIDE = 6.0  # of lengths, for the scale model
LEAST_LEFT_S = 1e-4  # of a promise whose time is over before the node has heard of it: nobody keeps that


@dataclass(frozen=True, slots=True)
class Twin:
    """What a node said of itself. `cost` is that of its engine as measured when it started.

    Steps of the twin take `slowdown` times that, and `host_s` in everything around the engine. `latency_s` from
    the client to the node and back comes off what is left to a first token. What requests are promised comes
    from `cost` alone, as in the cluster.
    """

    cost: StepCost
    kv_tokens: int
    block_tokens: int
    max_seqs: int
    max_batch_tokens: int
    slo_classes: Mapping[str, SloClass]
    host_s: float = 0.0
    latency_s: float = 0.0
    slowdown: float = 1.0

    @classmethod
    def of(cls, facts: Mapping[str, Any], config: ClusterConfig) -> Twin:
        """From GET /cluster of a cluster with one node. Raises ConfigError for any other."""
        nodes = facts["nodes"]
        if len(nodes) != 1 or not facts.get("idle_cost") or config.engine.block_size is None:
            raise ConfigError("a twin is made of one node that serves, with engine.block_size set")
        return cls(
            cost=msgspec.convert(facts["idle_cost"], StepCost),
            kv_tokens=int(nodes[0]["num_blocks"]) * config.engine.block_size,
            block_tokens=config.engine.block_size,
            max_seqs=config.engine.max_num_seqs,
            max_batch_tokens=config.engine.max_batch_tokens,
            slo_classes=config.slo_classes,
        )

    def workload(self, scenario: str, rate_per_s: float, seconds: float, seed: int) -> Workload:
        """Requests with lengths for the scale model, Poisson, promised what the cluster promises."""
        made = make(scenario, rate_per_s, seconds, seed, divide=DIVIDE, arrivals="poisson")
        unknown = sorted(set(made.class_names) - set(self.slo_classes))
        if unknown:
            raise ConfigError(f"the cluster has no SLO class {unknown[0]!r}")
        promised = {name: self.slo_classes[name] for name in made.class_names}
        return replace(made, slo_classes=promised)

    def promises(self, workload: Workload) -> list[Slo]:
        """The SLO of each request, as the endpoint makes it."""
        return promises(workload, self._hardware(self.cost))

    def serve(self, workload: Workload, seed: int, stop_below: float | None = None) -> Outcome:
        """The same requests in simulated time, as seen at the node: a client sees all `latency_s` later."""
        left = [
            replace(slo, ttft_s=max(slo.ttft_s - self.latency_s, LEAST_LEFT_S))
            for slo in self.promises(workload)
        ]
        return run(workload, self._deployment(), seed=seed, stop_below=stop_below, slos=left)

    def capacity(
        self, scenario: str, seconds: float, seed: int, share: float, guess: float
    ) -> tuple[float, list[Point]]:
        """Highest rate at which the twin keeps `share` of its promises, and the points that were tried."""

        def at(rate_per_s: float) -> Point:
            workload = self.workload(scenario, rate_per_s, seconds, seed)
            out = self.serve(workload, seed, stop_below=share)
            return Point(rate_per_s, workload.rate_per_s, out.attainment, out.drained, {})

        return capacity(at, share, guess)

    def guess(self, scenario: str) -> float:
        """A rate that one replica is about busy with: where a search may begin."""
        some = make(scenario, 10.0, 60.0, 0, divide=DIVIDE)
        half = self.max_seqs // 2
        context = int(half * np.mean(some.prompt_tokens + some.output_tokens / 2))
        decode_s = self.cost.predict(half, seqs=half, context_tokens=context) / half
        prefill_s = self.cost.prefill_alone_s(int(some.prompt_tokens.mean()), self.max_batch_tokens)
        return 1.0 / (prefill_s + float(some.output_tokens.mean()) * decode_s)

    def _hardware(self, cost: StepCost) -> Hardware:
        known = hardware("scale")
        return replace(
            known,
            cost=cost,
            speculative_cost=cost,
            kv_tokens=self.kv_tokens,
            max_batch_tokens=self.max_batch_tokens,
        )

    def _deployment(self) -> Deployment:
        cost = self.cost.scaled(self.slowdown)
        pieces = tuple(replace(piece, base_s=piece.base_s + self.host_s) for piece in cost.pieces)
        return Deployment(
            OURS_NAME,
            self._hardware(replace(cost, pieces=pieces)),
            roles_for("colocated", 1),
            Tuning(token_budget=self.max_batch_tokens, max_seqs=self.max_seqs),
            block_tokens=self.block_tokens,
            one_node=True,
        )
