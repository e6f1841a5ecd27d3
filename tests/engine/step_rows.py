"""Rows of made-up steps whose cost is known."""

from __future__ import annotations

import random
from collections.abc import Callable

from engine.cost import StepCost
from engine.step_table import StepRow, StepTable


def made_table(
    cost: StepCost, rows: int, noise: Callable[[random.Random], float] = lambda _: 1.0, seed: int = 0
) -> StepTable:
    """Batches of all kinds, each as long as `cost` says times what `noise` draws."""
    draw = random.Random(seed)
    return StepTable(tuple(_row(cost, draw, noise(draw)) for _ in range(rows)))


def _row(cost: StepCost, draw: random.Random, factor: float) -> StepRow:
    decodes = draw.choice((0, draw.randint(1, 64)))
    drafts = draw.choice((0, 0, draw.randint(1, 6))) if decodes else 0
    context_tokens = sum(draw.randint(16, 2000) for _ in range(decodes))
    chunks = tuple(
        (draw.randint(16, 600), draw.choice((0, draw.randint(0, 4000))))
        for _ in range(draw.randint(0 if decodes else 1, 2))
    )
    work = sum(chunk * (kv + chunk / 2) for chunk, kv in chunks)
    tokens = decodes * (1 + drafts) + sum(chunk for chunk, _ in chunks)
    seconds = cost.predict(
        tokens,
        seqs=decodes + len(chunks),
        context_tokens=context_tokens,
        prefill_work=work,
        draft_steps=drafts,
        prefill_kv_tokens=sum(kv for _, kv in chunks),
    )
    return StepRow(
        tokens, decodes + len(chunks), decodes, context_tokens, chunks, work, seconds * factor * 1e3, drafts
    )
