"""StepCost for compiled code: the same formulas as engine/cost.py, held equal to it by a property test."""

from __future__ import annotations

import math

from engine.compiled import compiled
from engine.cost import ROUNDING_TOKENS

CONTEXT, WORK, SEQ, KV, DRIFT = 0, 1, 2, 3, 4  # terms of CostArrays


@compiled
def beside_s(cost, seqs, context_tokens, prefill_work, prefill_kv_tokens):
    """Seconds beside the lines, before the drift."""
    terms = cost.terms
    return (
        terms[CONTEXT] * context_tokens
        + terms[WORK] * prefill_work
        + terms[SEQ] * seqs
        + terms[KV] * prefill_kv_tokens
    )


@compiled
def predict_s(cost, tokens, seqs, context_tokens, prefill_work, draft_steps, prefill_kv_tokens):
    """StepCost.predict."""
    if tokens <= 0:
        return 0.0
    line_s = 0.0
    for piece in range(cost.lines.shape[0]):
        line = cost.lines[piece]
        line_s = max(line_s, line[0] + line[1] * tokens + line[2] * draft_steps)
    return (line_s + beside_s(cost, seqs, context_tokens, prefill_work, prefill_kv_tokens)) * cost.terms[DRIFT]


@compiled
def tokens_in(cost, seconds, seqs, context_tokens, prefill_work, draft_steps, prefill_kv_tokens):
    """StepCost.tokens_in (Time2BS)."""
    left_s = seconds / cost.terms[DRIFT]
    left_s -= beside_s(cost, seqs, context_tokens, prefill_work, prefill_kv_tokens)
    most = math.inf
    for piece in range(cost.lines.shape[0]):
        line = cost.lines[piece]
        piece_left_s = left_s - line[0] - line[2] * draft_steps
        if piece_left_s < 0:
            return 0
        if line[1] > 0:
            most = min(most, piece_left_s / line[1])
    return math.floor(most + ROUNDING_TOKENS)


@compiled
def chunk_in(
    cost, seconds, kv_tokens, tokens, seqs, context_tokens, prefill_work, draft_steps, prefill_kv_tokens
):
    """StepCost.chunk_in."""
    left_s = seconds / cost.terms[DRIFT]
    left_s -= beside_s(cost, seqs + 1, context_tokens, prefill_work, prefill_kv_tokens + kv_tokens)
    work_s = cost.terms[WORK]
    most = math.inf
    for piece in range(cost.lines.shape[0]):
        line = cost.lines[piece]
        token_s = line[1] + work_s * kv_tokens
        piece_left_s = left_s - line[0] - line[1] * tokens - line[2] * draft_steps
        if piece_left_s < 0:
            return 0
        slope_s = token_s + math.sqrt(token_s * token_s + 2 * work_s * piece_left_s)
        if slope_s > 0:
            most = min(most, 2 * piece_left_s / slope_s)
    return math.floor(most + ROUNDING_TOKENS)


@compiled
def prefill_alone_s(cost, prompt_tokens, max_batch_tokens, cached_tokens):
    """StepCost.prefill_alone_s (T0)."""
    total_s, computed = 0.0, cached_tokens
    while computed < prompt_tokens:
        chunk = min(prompt_tokens - computed, max_batch_tokens)
        total_s += predict_s(cost, chunk, 1, 0, chunk * (computed + chunk / 2), 0, computed)
        computed += chunk
    return total_s
