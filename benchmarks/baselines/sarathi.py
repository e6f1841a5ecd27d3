"""Sarathi-Serve: every decode in every batch, then prompts in chunks up to a constant token budget, first come
first served (Agrawal et al. 2024)."""

from __future__ import annotations

from engine.compiled import compiled


@compiled
def chunked_prefill(rows, active, token_budget, draft_tokens, order):
    """Chunks of the next batch. Fills `order` with decodes, then prompts. Returns what the batch may hold."""
    count = 0
    room = token_budget
    for one in active:
        row = rows[one]
        row.chunk_tokens = row.verify_tokens = 0
        if row.running and row.prompt_tokens + row.output_tokens - row.computed_tokens <= 1:
            row.verify_tokens = min(row.drafts, draft_tokens)
            row.chunk_tokens = 1 + row.verify_tokens
            room -= row.chunk_tokens
            order[count] = one
            count += 1
    for one in active:
        row = rows[one]
        known = row.prompt_tokens + row.output_tokens
        if row.running and known - row.computed_tokens <= 1:
            continue
        computed = (
            row.computed_tokens if row.running else max(row.computed_tokens, min(row.cached_tokens, known - 1))
        )
        row.chunk_tokens = max(min(known - computed, room), 0)
        room -= row.chunk_tokens
        order[count] = one
        count += 1
    return max(token_budget, token_budget - room)
