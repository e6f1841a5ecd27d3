"""The bench itself: real systems that are asked by turns, and windows on them that are measured once."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from benchmarks.capacity import Cache
from benchmarks.fidelity.own_profile import Here, profile_here
from benchmarks.hardware import fitting_tpot_scale, hardware
from benchmarks.provenance import commit
from benchmarks.real.cells import Cell
from benchmarks.real.fingerprint import fingerprint
from benchmarks.real.predicted import TUNING_SEED, Machine
from benchmarks.real.running import Running, running
from benchmarks.real.site import Site
from benchmarks.real.systems import RealSystem, configuration, systems
from benchmarks.real.window import Row, measure, predicted
from benchmarks.simulator.systems import Tuning

WARM_UP_S, WARM_UP_RATE = 10.0, 2.0  # a system's first requests pay for what is made once


class OutOfTime(Exception):
    """No window may begin any more."""


@dataclass(slots=True)
class Bench:
    """What windows are measured with: one system is asked at a time, and those asked last go on running.

    No window begins after `ends_s` (monotonic). `window_s`: shorter than cells ask for, for a look.
    """

    machine: Machine
    model: str
    profile: Path
    folder: Path
    cache: Cache
    say: Callable[[str], None]
    ends_s: float = math.inf
    window_s: float | None = None
    _started: dict[tuple[RealSystem, Tuning], tuple[ExitStack, Running]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        site: Site,
        model: str | None,
        step_profile: str | None,
        profile_minutes: float,
        folder: Path,
        cache: Path,
        say: Callable[[str], None],
    ) -> Self:
        """For `model` on this machine, whose steps are measured first where no profile of them is at hand.

        Raises ConfigError for an unknown profile or model, or no device of the site, EngineStartError.
        """
        folder.mkdir(parents=True, exist_ok=True)
        model = model or site.model
        any_system = systems(1)[0]
        base = configuration(site, any_system, any_system.defaults(site), model, None)
        here = Here(site.devices()[0], site.profiles(folder), folder)
        profile = profile_here(base, step_profile, here, profile_minutes, say)
        known = hardware(profile, kv_tokens=1, max_batch_tokens=base.engine.max_batch_tokens)
        kv_tokens = int(site.kv_gib * 2**30 / known.kv_bytes_per_token)
        scale = fitting_tpot_scale(known.cost)
        machine = Machine(replace(known, kv_tokens=kv_tokens, tpot_scale=scale), site)
        return cls(machine, model, profile, folder, Cache(cache), say)

    def window(self, cell: Cell, system: RealSystem, tuning: Tuning, rate_per_s: float, seed: int) -> Row:
        """One window, from the cache if it was measured before. Raises OutOfTime."""
        seconds = self.window_s or self.machine.seconds(cell, rate_per_s)
        key = [asdict(cell), asdict(system), asdict(tuning), self.model, round(rate_per_s, 6), seed, seconds]
        key.append(self.profile.read_text(encoding="utf-8"))  # what is promised is counted by it
        code = fingerprint(system.ours, self.machine.site)
        return self.cache.kept(
            key, lambda: self._measured(cell, system, tuning, rate_per_s, seconds, seed), code
        )

    def expected(self, cell: Cell, system: RealSystem) -> tuple[Tuning, float]:
        """Settings, and the knee in requests a second, by the simulator; kept like windows."""

        def make() -> Row:
            tuning = self.machine.tuned(cell, system) if system.tuned else system.defaults(self.machine.site)
            knee = self.machine.knee(cell, system, tuning, TUNING_SEED, self.machine.guess(cell))
            return {"tuning": asdict(tuning), "knee": knee}

        key = ["expected", asdict(cell), asdict(system), self.profile.read_text(encoding="utf-8")]
        key.append(fingerprint(system.ours, self.machine.site))  # beside the simulator's own
        found = self.cache.kept(key, make)
        return Tuning(**found["tuning"]), float(found["knee"]) or self.machine.guess(cell)

    def close(self) -> None:
        """Stop what runs."""
        while self._started:
            self._stop(next(iter(self._started)))

    def _measured(
        self, cell: Cell, system: RealSystem, tuning: Tuning, rate_per_s: float, seconds: float, seed: int
    ) -> Row:
        if time.monotonic() > self.ends_s:
            raise OutOfTime
        workload = self.machine.workload(cell, rate_per_s, seconds, seed)
        slos = self.machine.promises(workload)
        text = f"{cell.text}: {system.label}, {rate_per_s:.2f} req/s, seed {seed}"
        started = self._running(cell, system, tuning)

        def tell(at_s: float) -> None:
            self.say(f"{text}, {at_s:.0f} of {seconds:.0f} s")

        row = measure(started, system, self.model, workload, slos, seed, self.folder, tell)
        return {
            "scenario": cell.scenario,
            "engines": cell.engines,
            "system": system.name,
            "settings": asdict(tuning),
            "asked_per_s": rate_per_s,
            "rate_per_s": workload.rate_per_s,
            "seed": seed,
            "seconds": seconds,
            "measured_on": {
                "device": self.machine.site.devices()[0],
                "commit": commit(),
                "date": datetime.now(UTC).date().isoformat(),
            },
            **row,
            "predicted": predicted(self.machine, system, tuning, workload, seed),
        }

    def _running(self, cell: Cell, system: RealSystem, tuning: Tuning) -> Running:
        key = (system, tuning)
        if key in self._started:
            self._started[key] = self._started.pop(key)  # the last one that was asked
            return self._started[key][1]
        site = self.machine.site
        while len(self._started) >= site.at_once:
            self._stop(next(iter(self._started)))
        config = configuration(site, system, tuning, self.model, self.profile)
        self.say(f"starting {system.label}")
        with ExitStack() as stack:
            started = stack.enter_context(running(site, system, config, self.folder, self.say))
            workload = self.machine.workload(cell, WARM_UP_RATE, WARM_UP_S, TUNING_SEED)
            slos = self.machine.promises(workload)
            measure(started, system, self.model, workload, slos, TUNING_SEED, self.folder, lambda _: None)
            self._started[key] = stack.pop_all(), started
        return started

    def _stop(self, key: tuple[RealSystem, Tuning]) -> None:
        stack, _ = self._started.pop(key)
        stack.close()
