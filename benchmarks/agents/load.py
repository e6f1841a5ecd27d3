"""Loops of calls to send: each prompt is the history so far and what a tool said; tools take their time."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from benchmarks.hardware import Hardware
from benchmarks.traffic import arrival_times

FEWEST_CALLS, MOST_CALLS = 2, 8
FIRST_TOKENS = (200, 500)  # system prompt and task; of no loop the same as of another
RESULT_TOKENS = (20, 120)  # that a tool gives back
CALL_TOKENS = (12, 40)  # of an output that calls a tool
ANSWER_TOKENS = (24, 64)  # of the last one
LEAST_TOOL_S, MOST_TOOL_S, MEDIAN_TOOL_S, TOOL_SIGMA = 0.2, 5.0, 1.0, 0.9
TTFT_SCALE, CALL_TPOT_S, ANSWER_TPOT_S = 3.0, 0.05, 0.1  # SLOs-Serve, table 1: the loop tight, the answer loose
SEQS = 8  # that a step is taken to be shared by, where a rate is guessed


class Call(msgspec.Struct, frozen=True):
    """One call: `new_tokens` after the history, `output_tokens` said, then a tool that takes `tool_s`.

    `prompt_tokens` in all. Due as `ttft_s` and `tpot_s` say.
    """

    new_tokens: int
    output_tokens: int
    tool_s: float
    prompt_tokens: int
    ttft_s: float
    tpot_s: float

    @property
    def reusable_tokens(self) -> int:
        """Of the prompt: the history, which was all computed before."""
        return self.prompt_tokens - self.new_tokens


class Loop(msgspec.Struct, frozen=True):
    """A loop that comes at `at_s`. The last call is the answer."""

    at_s: float
    calls: list[Call]

    @property
    def tool_s(self) -> float:
        """What tools take of it."""
        return sum(call.tool_s for call in self.calls[:-1])


def draw_loops(hardware: Hardware, rate_per_s: float, seconds: float, seed: int, times: int = 1) -> list[Loop]:
    """Loops that come for `seconds`, `rate_per_s` of them on average (Poisson); prompts and outputs `times` as
    long as those that suit a small model on a CPU.

    Deadlines are multiples of what a prompt takes alone, all of it computed: nobody is told what is cached.
    """
    rng = np.random.default_rng(seed)
    return [
        Loop(float(at_s), _calls(hardware, rng, times))
        for at_s in arrival_times(rate_per_s, seconds, rng).tolist()
    ]


def busy_s(hardware: Hardware, loops: Sequence[Loop]) -> float:
    """Seconds that a loop keeps an engine busy, on average, where no history is computed twice."""
    cost = hardware.cost
    step_s = cost.predict(SEQS) / SEQS
    per_token_s = cost.prefill_alone_s(512, hardware.max_batch_tokens) / 512
    calls = [call for loop in loops for call in loop.calls]
    seconds = sum(call.new_tokens * per_token_s + call.output_tokens * step_s for call in calls)
    return seconds / len(loops)


def _calls(hardware: Hardware, rng: np.random.Generator, times: int) -> list[Call]:
    count, known, calls = int(rng.integers(FEWEST_CALLS, MOST_CALLS + 1)), 0, []
    for number in range(count):
        last = number == count - 1
        new = times * int(rng.integers(*(FIRST_TOKENS if number == 0 else RESULT_TOKENS), endpoint=True))
        output = times * int(rng.integers(*(ANSWER_TOKENS if last else CALL_TOKENS), endpoint=True))
        tool_s = min(max(MEDIAN_TOOL_S * float(rng.lognormal(0.0, TOOL_SIGMA)), LEAST_TOOL_S), MOST_TOOL_S)
        prompt = known + new
        alone_s = hardware.cost.prefill_alone_s(prompt, hardware.max_batch_tokens)
        tpot_s = hardware.tpot_scale * (ANSWER_TPOT_S if last else CALL_TPOT_S)
        calls.append(Call(new, output, tool_s, prompt, TTFT_SCALE * alone_s, tpot_s))
        known = prompt + output - 1  # the token that ends an output is no part of the history
    return calls
