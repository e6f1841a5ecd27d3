"""Sarathi with the earliest deadline first and dynamic chunks: the idea of QoServe (2025).

Every decode is in every batch. The batch lasts as long as the least slack of a decode allows, never longer than
a constant budget of tokens; what is left beside the decodes goes to the prompt whose deadline is next. With
`relegate` a prompt whose deadline has passed goes behind those that can still be in time.
"""

from __future__ import annotations

import math

import numpy as np

from engine.compiled import compiled
from engine.cost_kernel import chunk_in, predict_s
from engine.virtual_kernel import FREE_BLOCKS, MAX_SEQS, RUNNING, blocks_for


@compiled
def dynamic_chunks(replica, rows, active, now_s, cost, token_budget, relegate, least_chunk, order):
    """Chunks of the next batch. Fills `order` with decodes, then prompts. Returns what the batch may hold."""
    count = len(active)
    prompts = np.empty(count, dtype=np.int64)
    due_s = np.empty(count, dtype=np.float64)
    n_decodes = n_prompts = context = 0
    limit_s = math.inf
    for one in active:
        row = rows[one]
        row.chunk_tokens = row.verify_tokens = 0
        if row.running and row.prompt_tokens + row.output_tokens - row.computed_tokens <= 1:
            row.chunk_tokens = 1
            order[n_decodes] = one
            n_decodes += 1
            context += row.computed_tokens
            limit_s = min(limit_s, row.due_s - now_s)
        else:
            late = relegate and row.output_tokens == 0 and row.first_due_s < now_s
            prompts[n_prompts] = one
            due_s[n_prompts] = row.first_due_s + (1e9 if late else 0.0)
            n_prompts += 1
    tokens, seqs, work, kv = n_decodes, n_decodes, 0.0, 0
    # Progress for prompts even where a decode is late: without it a backlog would never go.
    floor_s = predict_s(cost, n_decodes + least_chunk, n_decodes + 1, context, 0.0, 0, 0)
    limit_s = max(limit_s, floor_s)
    slots = replica.counts[MAX_SEQS] - replica.counts[RUNNING]
    free = replica.counts[FREE_BLOCKS]
    open_door = True
    at = n_decodes
    for one in prompts[:n_prompts][np.argsort(due_s[:n_prompts], kind="mergesort")]:
        row = rows[one]
        known = row.prompt_tokens + row.output_tokens
        computed = (
            row.computed_tokens if row.running else max(row.computed_tokens, min(row.cached_tokens, known - 1))
        )
        chunk = min(known - computed, token_budget - tokens)
        if not row.running:
            # One that cannot get in yet takes nothing from those that are in, and nobody overtakes it.
            open_door = open_door and slots > 0 and blocks_for(replica, known) <= free
            chunk = chunk if open_door else 0
        if limit_s < math.inf and chunk > 0:
            chunk = min(chunk, chunk_in(cost, limit_s, computed, tokens, seqs, context, work, 0, kv))
        row.chunk_tokens = max(chunk, 0)
        if row.chunk_tokens > 0:
            tokens += row.chunk_tokens
            seqs += 1
            work += row.chunk_tokens * (computed + row.chunk_tokens / 2)
            kv += computed
            if not row.running:
                slots -= 1
                free -= blocks_for(replica, known)
        order[at] = one
        at += 1
    return max(tokens, token_budget)
