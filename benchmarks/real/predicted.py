"""What the simulator says of a system before it is measured: where its knee is, and which settings suit it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from benchmarks.capacity import PRECISION, Point, capacity
from benchmarks.hardware import Hardware
from benchmarks.real.cells import Cell, window_s
from benchmarks.real.site import Site
from benchmarks.real.systems import RealSystem
from benchmarks.simulator.outcome import Outcome
from benchmarks.simulator.run import promises, run
from benchmarks.simulator.systems import BUDGETS, Deployment, Tuning, design, roles_for, tuned
from benchmarks.workload import Workload
from engine.request import Slo

SHARE = 0.9
TUNING_SEED = 0
CAPS = (16, 32, 64, 128, 256)
SAMPLE_S = 60.0
ACCEPTANCE = 0.8  # about what n-gram drafts have on a model that repeats itself


@dataclass(frozen=True, slots=True)
class Machine:
    """The engines of this machine, as the simulator knows them."""

    hardware: Hardware
    site: Site

    def workload(self, cell: Cell, rate_per_s: float, seconds: float, seed: int) -> Workload:
        """Requests of a cell, with paces that suit these engines."""
        return cell.workload(self.site, rate_per_s, seconds, seed, self.hardware.tpot_scale)

    def promises(self, workload: Workload) -> list[Slo]:
        """The same for every system: from the step times that were measured beforehand."""
        return promises(workload, self.hardware)

    def seconds(self, cell: Cell, rate_per_s: float) -> float:
        """How long a window of this cell is at this rate."""
        sample = self.workload(cell, 10.0, SAMPLE_S, TUNING_SEED)
        return window_s(sample, self.promises(sample), rate_per_s)

    def serve(
        self,
        system: RealSystem,
        tuning: Tuning,
        workload: Workload,
        seed: int,
        stop_below: float | None = None,
    ) -> Outcome:
        """A window in simulated time."""
        deployment = Deployment(
            system.design,
            self.hardware,
            roles_for(system.mode, system.engines, tuning.prefill, tuning.decode),
            replace(tuning, draft_tokens=0 if system.ours else system.drafts),
            ACCEPTANCE if system.drafts else None,
            block_tokens=self.site.block_tokens,
            one_node=system.mode == "colocated",
        )
        return run(workload, deployment, seed=seed, stop_below=stop_below)

    def knee(self, cell: Cell, system: RealSystem, tuning: Tuning, seed: int, guess: float) -> float:
        """Requests a second, at the most, of which SHARE are served as promised; 0 if none are."""
        return capacity(self._at(cell, system, tuning, seed), SHARE, guess, 2 * PRECISION)[0]

    def tuned(self, cell: Cell, system: RealSystem) -> Tuning:
        """The budget and then the batch cap with the highest knee, on a seed that is not reported."""
        best, most = system.defaults(self.site), 0.0
        guess = self.guess(cell)
        tried: Sequence[tuple[str, tuple[int, ...]]] = (("token_budget", BUDGETS), ("max_seqs", CAPS))
        for field, values in tried:
            trials = [tuned(design(system.design), field, value, best) for value in values]
            for trial in dict.fromkeys([best, *trials]):
                found = self.knee(cell, system, trial, TUNING_SEED, guess)
                if found > most:
                    best, most, guess = trial, found, found
        return best

    def guess(self, cell: Cell) -> float:
        """Requests a second that the engines of a cell are about busy with: where a search may begin."""
        some, cost = self.workload(cell, 10.0, SAMPLE_S, TUNING_SEED), self.hardware.cost
        prompt, output = float(some.prompt_tokens.mean()), float(some.output_tokens.mean())
        seqs = 16
        step_s = cost.predict(seqs, seqs=seqs, context_tokens=int(seqs * (prompt + output / 2)))
        prefill_s = cost.prefill_alone_s(int(np.ceil(prompt)), self.hardware.max_batch_tokens)
        return 0.5 * cell.engines / (prefill_s + output * step_s / seqs)

    def _at(self, cell: Cell, system: RealSystem, tuning: Tuning, seed: int) -> Callable[[float], Point]:

        def at(rate_per_s: float) -> Point:
            workload = self.workload(cell, rate_per_s, self.seconds(cell, rate_per_s), seed)
            out = self.serve(system, tuning, workload, seed, stop_below=SHARE)
            return Point(rate_per_s, workload.rate_per_s, out.attainment, out.drained, {})

        return at
