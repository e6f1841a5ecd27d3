"""Loops of tool calls in simulated time: the same three ways, on replicas of a GPU's profile."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from benchmarks.agents.client import SeenCall, SeenLoop
from benchmarks.agents.load import Loop, busy_s, draw_loops
from benchmarks.agents.measure import Row, add_up, loop_seconds
from benchmarks.hardware import Hardware
from benchmarks.simulator.outcome import Outcome
from benchmarks.simulator.prefixes import Keeping
from benchmarks.simulator.run import run
from benchmarks.simulator.systems import Deployment, design, roles_for
from benchmarks.workload import Workload
from coordinator.config import SloClass
from engine.request import Slo

SIMULATED_ON = "rtxpro6000-llama-3.1-8b"
LOADS = (0.9, 1.2, 1.5)  # the highest is about as much as stock vLLM keeps 90 % of
TIMES = 8  # as long as the loops of real engines here: a system prompt of thousands of tokens
SLO_CLASS = "tool"
MOST_OUTPUT = 64 * TIMES  # that a client asks for: it does not know how long an answer becomes
BLOCK_TOKENS = 16


@dataclass(frozen=True, slots=True)
class SimulatedWay:
    """A system, and whose history it keeps between calls."""

    system: str
    keeping: Keeping
    sticky: bool = False


WAYS: Mapping[str, SimulatedWay] = {
    "sessions": SimulatedWay("ours", Keeping.SESSIONS),
    "no-sessions": SimulatedWay("ours", Keeping.ALL),
    "vllm": SimulatedWay("vllm", Keeping.ALL, sticky=True),
}


@dataclass(slots=True)
class SimulatedAgents:
    """What windows are simulated with: `engines` replicas that prefill and decode."""

    hardware: Hardware
    device: str
    engines: int
    seconds: float
    say: Callable[[str], None]
    seen: dict[tuple[str, float, int], list[float | None]] = field(default_factory=dict)

    def windows(
        self, loads: Sequence[tuple[float, float]], seeds: Sequence[int], keep: Callable[[Row], None]
    ) -> None:
        """Every way at every (load, rate) and seed; `keep` is told of each window as it ends."""
        for load, rate in loads:
            for seed in seeds:
                loops = draw_loops(self.hardware, rate, self.seconds, seed, TIMES)
                for name in WAYS:
                    self.say(f"{name}: {rate:.3f} loops/s, seed {seed}")
                    keep(self._window(name, loops, load, rate, seed))

    def most_per_s(self) -> float:
        """Loops a second that the replicas could compute, were no history computed twice."""
        return self.engines / busy_s(self.hardware, draw_loops(self.hardware, 1.0, 200.0, 0, TIMES))

    def _window(self, name: str, loops: list[Loop], load: float, rate: float, seed: int) -> Row:
        way = WAYS[name]
        deployment = Deployment(
            way.system,
            self.hardware,
            roles_for("colocated", self.engines),
            design(way.system).defaults,
            keeping=way.keeping,
            sticky=way.sticky,
        )
        workload = as_workload(loops, self.seconds)
        out = run(workload, deployment, seed=seed, slos=slos_of(loops))
        seen = as_seen(loops, out, ours=way.system == "ours")
        self.seen[name, load, seed] = loop_seconds(loops, seen)
        about = {"way": name, "load": load, "rate_per_s": rate, "seed": seed, "seconds": self.seconds}
        return {**about, **add_up(loops, seen, BLOCK_TOKENS)}


def as_workload(loops: Sequence[Loop], seconds: float) -> Workload:
    """The calls of loops as chains: each comes when the one before it has ended and its tool is done."""
    calls = [(loop, number, call) for loop in loops for number, call in enumerate(loop.calls)]
    count = len(calls)
    follows = np.array([number > 0 for _, number, _ in calls], dtype=np.bool_)
    outputs = np.array([call.output_tokens for *_, call in calls], dtype=np.int64)
    delays = [loop.calls[number - 1].tool_s if number else 0.0 for loop, number, _ in calls]
    return Workload(
        name="agents",
        duration_s=seconds,
        arrival_s=np.array([loop.at_s for loop, *_ in calls]),
        prompt_tokens=np.array([call.prompt_tokens for *_, call in calls], dtype=np.int64),
        output_tokens=outputs,
        thinking_tokens=np.zeros(count, dtype=np.int64),
        max_tokens=np.full(count, MOST_OUTPUT, dtype=np.int64),
        class_index=np.zeros(count, dtype=np.int64),
        class_names=(SLO_CLASS,),
        slo_classes={SLO_CLASS: SloClass()},
        parent=np.where(follows, np.arange(count) - 1, -1),
        delay_s=np.array(delays),
        prefix_tokens=np.array([call.reusable_tokens for *_, call in calls], dtype=np.int64),
    )


def slos_of(loops: Sequence[Loop]) -> list[Slo]:
    """What each call is promised."""
    return [Slo(SLO_CLASS, call.ttft_s, call.tpot_s) for loop in loops for call in loop.calls]


def as_seen(loops: Sequence[Loop], out: Outcome, *, ours: bool) -> list[SeenLoop]:
    """A run as clients would have seen it. A loop goes as far as its calls were answered."""
    world, seen, at = out.world, list[SeenLoop](), 0
    for loop in loops:
        calls = []
        for request in range(at, at + len(loop.calls)):
            if not np.isfinite(world.arrived_s[request]):
                break
            ended = np.isfinite(world.ended_s[request]) and not world.dropped[request]
            first = world.first_time[request]
            times_s = world.token_times_s[first : world.first_time[request + 1]] - world.arrived_s[request]
            calls.append(
                SeenCall(
                    token_times_s=times_s.tolist() if ended else [],
                    cached_tokens=int(world.reused_tokens[request]) // BLOCK_TOKENS * BLOCK_TOKENS,
                    verdict=("admitted" if out.admitted[request] else "best_effort") if ours else None,
                    error=None if ended else "it did not end",
                )
            )
        last = at + len(loop.calls) - 1
        whole = len(calls) == len(loop.calls) and calls[-1].error is None
        seen.append(SeenLoop(calls, float(world.ended_s[last] - world.arrived_s[at]) if whole else None))
        at += len(loop.calls)
    return seen
