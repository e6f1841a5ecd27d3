"""What a window of loops adds up to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.agents.client import SeenCall, SeenLoop
from benchmarks.agents.load import Call, Loop
from engine.request import Slo, StageKind
from engine.score import Score, score

Row = dict[str, Any]
ERROR_SAMPLES = 3


def add_up(loops: Sequence[Loop], seen: Sequence[SeenLoop], block_tokens: int) -> Row:
    """The figures of a window. Calls that were never sent are missed, as their loop was cut short before them.

    `reused_share`: of the prompt tokens that were computed before, in whole blocks, those that no engine
    computed again. `loop_s`: of loops that ended, without what tools took.
    """
    pairs = [
        (call, one)
        for loop, what in zip(loops, seen, strict=True)
        for call, one in zip(loop.calls, [*what.calls, *[None] * len(loop.calls)], strict=False)
    ]
    scores = [_score(call, one) for call, one in pairs]
    sent = [(call, one) for call, one in pairs if one is not None and one.error is None]
    reusable = sum(call.reusable_tokens // block_tokens * block_tokens for call, _ in sent)
    reused = sum(min(one.cached_tokens, call.reusable_tokens) for call, one in sent)
    prompts = sum(call.prompt_tokens for call, _ in sent)
    errors = [one.error for _, one in pairs if one is not None and one.error is not None]
    admitted = [one for one in zip(pairs, scores, strict=True) if _verdict(one[0][1]) == "admitted"]
    per_loop = _per_loop(loops, scores)
    seconds = loop_seconds(loops, seen)
    return {
        "loops": len(loops),
        "ended": sum(one.seconds is not None for one in seen),
        "calls": len(pairs),
        "loop_s": _quantiles([one for one in seconds if one is not None]),
        "reused_share": reused / reusable if reusable else None,
        "cached_share": sum(one.cached_tokens for _, one in sent) / prompts if prompts else None,
        "attainment": _mean([one.met for one in scores]),
        "stages": {
            str(kind): _mean([one.stages[kind] for one in scores])
            for kind in (StageKind.PREFILL, StageKind.ANSWER)
        },
        "loop_attainment": _mean(per_loop),
        "admitted": len(admitted),
        "admitted_kept": _mean([one[1].met for one in admitted]),
        "ttft_s": _quantiles([one.token_times_s[0] for _, one in sent]),
        "errors": len(errors),
        "error_samples": errors[:ERROR_SAMPLES],
        "client_late_ms": _quantiles([one.late_s * 1e3 for _, one in sent]),
    }


def loop_seconds(loops: Sequence[Loop], seen: Sequence[SeenLoop]) -> list[float | None]:
    """Seconds of each loop that are not its tools'; None where it did not end."""
    return [
        None if what.seconds is None else what.seconds - loop.tool_s
        for loop, what in zip(loops, seen, strict=True)
    ]


def _score(call: Call, seen: SeenCall | None) -> Score:
    slo = Slo("tool", call.ttft_s, call.tpot_s)
    times_s = [] if seen is None else seen.token_times_s
    completed = seen is not None and seen.error is None
    return score(slo, times_s, completed=completed, thinking_tokens=0)


def _per_loop(loops: Sequence[Loop], scores: Sequence[Score]) -> list[bool]:
    met, at = [], 0
    for loop in loops:
        met.append(all(one.met for one in scores[at : at + len(loop.calls)]))
        at += len(loop.calls)
    return met


def _verdict(seen: SeenCall | None) -> str | None:
    return None if seen is None else seen.verdict


def _mean(values: Sequence[bool]) -> float | None:
    return float(np.mean(values)) if values else None


def _quantiles(values: Sequence[float]) -> dict[str, float | None]:
    if not values:
        return {"p50": None, "p99": None}
    return {"p50": float(np.quantile(values, 0.5)), "p99": float(np.quantile(values, 0.99))}
