"""An engine whose steps are held until a profile says that they would end: a small model at a large one's pace.

Tokens, KV and transfers are real, and the hardware of the profile is not needed: it rehearses a cluster whose
engines would otherwise share cores, or be too large for the machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from engine.base import Composer, Engine, EngineInfo, StepReport, StepResult, Usage, Work
from engine.cost import StepCost
from engine.prefix_log import PrefixLog
from kv_transfer.base import KvPort


class HeldEngine(Engine):
    """`engine`, no step of which takes less than `cost` says. One that takes longer is not made any faster."""

    def __init__(self, engine: Engine, cost: StepCost, sleep: Callable[[float], None] = time.sleep) -> None:
        self._engine = engine
        self._cost = cost
        self._sleep = sleep

    def start(self) -> EngineInfo:
        """As the engine does."""
        return self._engine.start()

    def submit(self, work: Work) -> None:
        """As the engine does."""
        self._engine.submit(work)

    def cancel(self, work_ids: Sequence[str], *, ended: bool = False) -> None:
        """As the engine does."""
        self._engine.cancel(work_ids, ended=ended)

    def step(self, compose: Composer) -> StepResult:
        """Run one batch, and wait until it is due to end."""
        result = self._engine.step(compose)
        if result.report is None:
            return result
        report = self._held(result.report)
        if report.seconds > result.report.seconds:
            self._sleep(report.seconds - result.report.seconds)
        return replace(result, report=report)

    def has_work(self) -> bool:
        """As the engine does."""
        return self._engine.has_work()

    def usage(self) -> Usage:
        """As the engine does."""
        return self._engine.usage()

    def kept(self) -> dict[str, int]:
        """As the engine does."""
        return self._engine.kept()

    def kept_tokens(self) -> int:
        """As the engine does."""
        return self._engine.kept_tokens()

    def give_up(self, sessions: Sequence[str]) -> None:
        """As the engine does."""
        self._engine.give_up(sessions)

    @property
    def kv(self) -> KvPort:
        """The engine's."""
        return self._engine.kv

    @property
    def prefixes(self) -> PrefixLog:
        """The engine's."""
        return self._engine.prefixes

    def reset_prefix_cache(self) -> bool:
        """As the engine does."""
        return self._engine.reset_prefix_cache()

    def profile_step_times(self) -> list[StepReport]:
        """What these steps take when they are held; nobody waits for that."""
        return [self._held(report) for report in self._engine.profile_step_times()]

    def stop(self) -> None:
        """As the engine does."""
        self._engine.stop()

    def _held(self, report: StepReport) -> StepReport:
        return replace(report, seconds=max(report.seconds, self._cost.of(report)))
