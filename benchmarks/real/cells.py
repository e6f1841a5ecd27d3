"""What is served on real engines: scenarios with lengths that fit the model, smooth or in bursts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from benchmarks.real.site import Site
from benchmarks.scenarios import make
from benchmarks.workload import Workload
from engine.request import Slo

LEAST_SECONDS, MOST_SECONDS = 90.0, 300.0
RESIDENCES = 10.0  # a window lasts as many times as long as a request does
LEAST_REQUESTS = 60  # and as long as it takes for so many to come: one of ten may miss
# Smooth on one engine, in bursts on two. The rate at which one engine alone keeps 90 % of bursts of CV 3 is so
# low (a request in several seconds for us, in a minute for others) that no window has enough of them.
ARRIVALS: Mapping[int, str] = {1: "poisson", 2: "bursty"}
LAYOUTS: Mapping[int, tuple[str, ...]] = {
    1: ("chatbot", "coder", "summarizer", "tool", "reasoning"),
    2: ("chatbot", "coder", "mixed"),
}


@dataclass(frozen=True, slots=True)
class Cell:
    """A scenario on so many engines."""

    scenario: str
    engines: int

    @property
    def arrivals(self) -> str:
        """How requests come: a name of benchmarks.scenarios.ARRIVALS."""
        return ARRIVALS[self.engines]

    @property
    def text(self) -> str:
        """For people."""
        return f"{self.scenario} on {self.engines}"

    def workload(
        self, site: Site, rate_per_s: float, seconds: float, seed: int, tpot_scale: float = 1.0
    ) -> Workload:
        """Requests for `seconds`, all engines together; paces are `tpot_scale` times as long."""
        made = make(
            self.scenario,
            rate_per_s,
            seconds,
            seed,
            divide=site.divide,
            arrivals=self.arrivals,
            tpot_scale=tpot_scale,
        )
        return _shorter(made, site.further.get(self.scenario, 1.0))


def window_s(workload: Workload, slos: Sequence[Slo], rate_per_s: float) -> float:
    """How long a window must be at this rate. The workload, at any other, says how long requests stay."""
    thinking = workload.thinking_tokens
    first_pace_s = np.array([slo.first_pace_s for slo in slos])
    tpot_s = np.array([slo.tpot_s for slo in slos])
    ttft_s = np.array([slo.ttft_s for slo in slos])
    resident_s = ttft_s + thinking * first_pace_s + (workload.output_tokens - thinking) * tpot_s
    enough_s = min(LEAST_REQUESTS / rate_per_s, MOST_SECONDS)
    return max(LEAST_SECONDS, RESIDENCES * float(resident_s.mean()), enough_s)


def _shorter(workload: Workload, divide: float) -> Workload:
    """Outputs, and what clients ask for, divided once more; at least one token of an answer is left."""
    if divide == 1.0:
        return workload
    output = np.maximum(np.rint(workload.output_tokens / divide), 4).astype(np.int64)
    thinking = np.minimum(np.rint(workload.thinking_tokens / divide).astype(np.int64), output - 1)
    asked = np.maximum(np.rint(workload.max_tokens / divide).astype(np.int64), output)
    return replace(workload, output_tokens=output, thinking_tokens=thinking, max_tokens=asked)
