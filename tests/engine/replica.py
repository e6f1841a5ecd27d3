"""A real engine over the tiny model for the tests of this folder, and how to drive it."""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from engine.base import BatchPlan, Composer, Engine, Output, Seq, StepReport, Work
from engine.models import make_model
from engine.vllm import VllmEngine, VllmEngineConfig, encode_sampling

os.environ.setdefault("OMP_NUM_THREADS", "1")

VOCABULARY = 1000  # of the model's token ids, those that prompts are made of
MiB = 1 << 20


@contextmanager
def running_engine(engine_id: str, **settings: Any) -> Iterator[VllmEngine]:
    """A started engine in float32: ties in bfloat16 flip with the shape of a batch."""
    defaults: dict[str, Any] = {"dtype": "float32", "max_model_len": 1024, "kv_cache_bytes": 64 * MiB}
    config = VllmEngineConfig(model=str(make_model("tiny")), engine_id=engine_id, **(defaults | settings))
    _hide_llvmlite()
    engine = VllmEngine(config)
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()


def _hide_llvmlite() -> None:
    """Let a second engine start in a process in which numba was loaded (n-gram drafts do).

    vLLM 0.32 looks into every object of every module when it starts on a CPU; llvmlite's answers any name,
    `__dict__` too, with something that is none.
    """
    ffi = sys.modules.get("llvmlite.binding.ffi")
    if ffi is None:
        return
    answer = ffi._lib_wrapper.__getattr__

    def without_dunders(self: Any, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return answer(self, name)

    ffi._lib_wrapper.__getattr__ = without_dunders


def greedy(max_tokens: int) -> bytes:
    """Sampling that always gives `max_tokens` tokens, the likeliest ones."""
    from vllm.sampling_params import SamplingParams

    return encode_sampling(SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True))


def prompt(length: int, seed: int) -> list[int]:
    """Token ids without a pattern."""
    numbers = random.Random(seed)
    return [numbers.randrange(VOCABULARY) for _ in range(length)]


def work(work_id: str, prompt_token_ids: Sequence[int], max_tokens: int, **more: Any) -> Work:
    """A greedy work."""
    return Work(work_id, prompt_token_ids, greedy(max_tokens), max_tokens, **more)


def vllms_own(_: Sequence[Seq]) -> BatchPlan:
    """The empty plan."""
    return BatchPlan()


class Drive:
    """Steps an engine and keeps what it gave: tokens by work, reports, and the last sequences composed."""

    def __init__(self, engine: Engine, compose: Callable[[Sequence[Seq]], BatchPlan] = vllms_own) -> None:
        self.engine = engine
        self.compose: Composer = compose
        self.tokens: dict[str, list[int]] = {}
        self.finished: dict[str, Output] = {}
        self.reports: list[StepReport] = []
        self.seqs: dict[str, Seq] = {}

    def submit(self, *works: Work) -> Drive:
        """Queue works."""
        for item in works:
            self.engine.submit(item)
        return self

    def step(self, plan: BatchPlan | None = None) -> StepReport | None:
        """One step, under `plan` if given. The outputs of a step are in `tokens` and `finished`."""

        def compose(seqs: Sequence[Seq]) -> BatchPlan:
            self.seqs = {seq.work_id: seq for seq in seqs}
            return plan if plan is not None else self.compose(seqs)

        result = self.engine.step(compose)
        for output in result.outputs:
            self.tokens.setdefault(output.work_id, []).extend(output.token_ids)
            if output.finish_reason is not None:
                self.finished[output.work_id] = output
        if result.report is not None:
            self.reports.append(result.report)
        return result.report

    def run(self, max_steps: int = 500) -> Drive:
        """Step until nothing is left to do."""
        for _ in range(max_steps):
            if not self.engine.has_work():
                return self
            if self.step() is None:
                time.sleep(0.01)  # a grammar is compiled, or a transfer goes on, beside the steps
        raise AssertionError(f"not done after {max_steps} steps: {self.engine.usage()}")
