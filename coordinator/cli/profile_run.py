"""One engine in this process, and the batches that are measured on it, under a bar that says how long."""

from __future__ import annotations

import os
import platform
import random
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from engine.base import Engine, EngineInfo
from engine.batch_shapes import draw_shapes
from engine.errors import EngineStartError
from engine.models import resolve_model
from engine.ports import side_channel_port
from engine.step_meter import Measured, StepMeter, median_rows
from engine.step_table import StepTable

WARM_UP = 5  # shapes that run first and are not counted
FEWEST_SHAPES = 80  # that are measured however long it takes
LOG_TAIL_LINES = 20


@dataclass(frozen=True, slots=True)
class Settings:
    """What to measure, and on what."""

    model: str
    shapes: int
    repeats: int
    limit_s: float
    max_batch_tokens: int
    max_model_len: int
    kv_cache_gib: float | None
    seed: int


def measure(settings: Settings, out: Path) -> tuple[StepTable, dict[str, Any]]:
    """Rows, and facts of the run. The engine's own output goes to a log beside `out`.

    Raises EngineStartError with the last lines of that log, ConfigError for a model that is not there.
    """
    model = resolve_model(settings.model)
    out.parent.mkdir(parents=True, exist_ok=True)
    log = out.with_name(f"{out.name}.log")
    with _output_to(log) as terminal:
        console = Console(file=terminal)
        try:
            with console.status(f"starting an engine with {settings.model}"):
                engine, info = _start(settings, model)
        except EngineStartError as error:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:])
            raise EngineStartError(f"{error}\nThe last lines of its log ({log}):\n{tail}") from error
        try:
            began_s = time.monotonic()
            rounds = _rounds(settings, engine, info, console)
        finally:
            engine.stop()
    share = _waited_share(rounds)
    facts = {
        "rounds": len(rounds),
        "seconds": round(time.monotonic() - began_s, 1),
        "waited_share": round(share, 4),
        "log": str(log),
    }
    about = {**_about(settings, info), "median_of": str(len(rounds)), "waited_share": f"{share:.3f}"}
    return StepTable(tuple(median_rows(rounds)), about=about), facts


def _waited_share(rounds: list[list[Measured]]) -> float:
    """Part of the measured time for which other processes had the core."""
    measured = [one for of_round in rounds for one in of_round]
    waited_s = sum(one.waited_s for one in measured)
    ran_s = sum(one.row.step_ms / 1e3 for one in measured if one.row is not None)
    return waited_s / (waited_s + ran_s) if waited_s > 0 else 0.0


def _start(settings: Settings, model: str) -> tuple[Engine, EngineInfo]:
    from engine.actor import build_engine

    kv_cache_bytes = None if settings.kv_cache_gib is None else int(settings.kv_cache_gib * 2**30)
    engine = build_engine(
        {
            "kind": "vllm",
            "model": model,
            "engine_id": f"profile-{os.getpid()}",
            "max_model_len": settings.max_model_len,
            "max_num_seqs": 72,  # 64 decodes that stay, and chunks beside them
            "max_batch_tokens": settings.max_batch_tokens,
            "kv_cache_bytes": kv_cache_bytes,
            "side_channel_port": side_channel_port("127.0.0.1"),
            "env": {"HF_HUB_OFFLINE": "1"} if Path(model).is_dir() else {},
        }
    )
    return engine, engine.start()


def _rounds(settings: Settings, engine: Engine, info: EngineInfo, console: Console) -> list[list[Measured]]:
    """Every shape once a round, in an order of its own, so that a disturbance does not hit one shape alone.

    Ends early when another round would pass the limit of time. The first one, if it passes it by itself, leaves
    out the shapes that it has not come to: which these are is chance.
    """
    steps = settings.shapes + WARM_UP
    meter = StepMeter(engine, info, _greedy, steps=steps, seed=settings.seed, waited_s=_waited_s)
    shapes = draw_shapes(settings.shapes, meter.limits, settings.seed)
    order = random.Random(settings.seed)
    rounds: list[list[Measured]] = []
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=console,
    )  # fmt: skip
    with bar:
        _prepare(meter, bar)
        for shape in shapes[:WARM_UP]:
            meter.measure(shape)
        task = bar.add_task("measuring", total=settings.repeats * len(shapes))
        began_s = time.monotonic()
        while len(rounds) < settings.repeats:
            found: dict[int, Measured] = {}
            if rounds:
                deque(meter.prepare(), maxlen=0)
            for index in order.sample(range(len(shapes)), len(shapes)):
                found[index] = meter.measure(shapes[index])
                bar.advance(task)
                late = time.monotonic() - began_s > settings.limit_s
                if late and not rounds and len(found) >= FEWEST_SHAPES:
                    break
            shapes = [shapes[index] for index in sorted(found)]
            rounds.append([found[index] for index in sorted(found)])
            spent_s = time.monotonic() - began_s
            if spent_s * (len(rounds) + 1) / len(rounds) > settings.limit_s:
                break
    meter.close()
    return rounds


def _greedy(max_tokens: int) -> bytes:
    from vllm.sampling_params import SamplingParams

    from engine.vllm_codec import encode_sampling

    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
    return encode_sampling(params)


def _waited_s() -> float:
    """How long this thread has waited for a core that others had; 0 where the kernel does not say."""
    try:
        fields = Path("/proc/thread-self/schedstat").read_text(encoding="ascii").split()
    except OSError:
        return 0.0
    return int(fields[1]) / 1e9


def _prepare(meter: StepMeter, bar: Progress) -> None:
    task = bar.add_task("computing contexts", total=meter.limits.max_decodes)
    for share in meter.prepare():
        bar.update(task, completed=round(share * meter.limits.max_decodes))
    bar.update(task, completed=meter.limits.max_decodes)


def _about(settings: Settings, info: EngineInfo) -> dict[str, str]:
    model = Path(settings.model).name if settings.model.startswith(("/", ".", "~")) else settings.model
    return {
        "model": model,
        "engine": info.engine,
        "hardware": _hardware(),
        "max_batch_tokens": str(info.max_batch_tokens),
        "kv_bytes_per_token": str(info.kv_bytes_per_token),
        "seed": str(settings.seed),
    }


def _hardware() -> str:
    """The accelerator by name, or the CPU and how many threads torch uses of it."""
    import torch

    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name(0))
    return f"{_cpu_name()}, {torch.get_num_threads()} threads"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


@contextmanager
def _output_to(log: Path) -> Iterator[TextIO]:
    """Send what this process prints, vLLM's C++ included, to `log`; yields the terminal's stderr."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = {stream: os.dup(stream) for stream in (1, 2)}
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    terminal = os.fdopen(os.dup(2), "w", encoding="utf-8")
    for stream in kept:
        os.dup2(file, stream)
    os.close(file)
    try:
        yield terminal
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for stream, before in kept.items():
            os.dup2(before, stream)
            os.close(before)
        terminal.close()
