"""Runs of a study, some at a time in processes of their own, under one bar; and where its figures go."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Job:
    """One thing to measure; `measure` can be pickled. `weight`: about how long it takes, for the bar."""

    text: str
    measure: Callable[[], Row]
    weight: float = 1.0


class Crew:
    """Workers and their bar, for jobs that weigh `total` together. One worker is this process itself."""

    def __init__(self, console: Console, workers: int, total: float) -> None:
        # Not forked: the bar has a thread, and what it holds would be held in the child for ever.
        spawning = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(workers, mp_context=spawning) if workers > 1 else None
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=console)
        self._task = self._progress.add_task("starting", total=total)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._progress.stop()

    def run(self, jobs: Sequence[Job]) -> list[Row]:
        """What each job measures, in their order. The heaviest begin first, so that workers end together."""
        if self._pool is None:
            return [self._here(job) for job in jobs]
        by_weight = sorted(range(len(jobs)), key=lambda at: -jobs[at].weight)
        futures: dict[Future[Row], int] = {self._pool.submit(jobs[at].measure): at for at in by_weight}
        rows: list[Row] = [{} for _ in jobs]
        for future in as_completed(futures):
            at = futures[future]
            rows[at] = future.result()
            self._done(jobs[at])
        return rows

    def _here(self, job: Job) -> Row:
        self._progress.update(self._task, description=job.text)
        row = job.measure()
        self._done(job)
        return row

    def _done(self, job: Job) -> None:
        self._progress.update(self._task, advance=job.weight, description=job.text)


def write(out: Path, results: Mapping[str, Any]) -> None:
    """The figures, as JSON. A run that is interrupted leaves the ones before."""
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_suffix(".part")
    unfinished.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    unfinished.rename(out)
