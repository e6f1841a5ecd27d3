"""vLLM, prefill first: whole prompts up to the token budget before any decode (vLLM's scheduler of 2024).

Prompts that wait are taken first come first served into a batch of their own; without one that fits, every
running sequence decodes. With a fixed speculation depth each decode is a verify of so many tokens.
"""

from __future__ import annotations

from engine.compiled import compiled
from engine.virtual_kernel import FREE_BLOCKS, MAX_SEQS, NUM_BLOCKS, RUNNING, blocks_for

WATERMARK = 0.01  # of the blocks: kept free for running sequences when a prompt is let in


@compiled
def prefill_first(replica, rows, active, token_budget, draft_tokens, order):
    """Chunks of the next batch. Fills `order` with `active` and returns how many tokens the batch may hold."""
    order[: len(active)] = active
    counts = replica.counts
    slots = counts[MAX_SEQS] - counts[RUNNING]
    free, kept_free = counts[FREE_BLOCKS], int(WATERMARK * counts[NUM_BLOCKS])
    tokens = 0
    open_door = True
    for one in active:
        row = rows[one]
        row.chunk_tokens = row.verify_tokens = 0
        if row.running or not open_door:
            continue
        known = row.prompt_tokens + row.output_tokens
        needed = known - min(row.cached_tokens, known - 1)
        blocks = blocks_for(replica, known)
        # A prompt that is longer than the budget goes alone: it could never run otherwise.
        fits = tokens + needed <= token_budget or tokens == 0
        # So would one that needs nearly all the memory, if blocks were kept free for nobody.
        alone = tokens == 0 and counts[RUNNING] == 0
        if slots < 1 or blocks > (free if alone else free - kept_free) or not fits:
            open_door = False
            continue
        row.chunk_tokens = needed
        tokens += needed
        free -= blocks
        slots -= 1
    if tokens > 0:
        return max(tokens, token_budget)
    for one in active:
        row = rows[one]
        if row.running:
            row.verify_tokens = min(row.drafts, draft_tokens)
            row.chunk_tokens = 1 + row.verify_tokens
            tokens += row.chunk_tokens
    return max(tokens, token_budget)
