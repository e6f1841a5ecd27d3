"""DistServe (Zhong et al. 2024): a prefill pool and a decode pool.

Prefill: first come first served, all queued prompts that fit the token budget and the memory, in one batch.
Decode: everything here decodes in every batch. The KV of a prompt waits at the prefill node until the decode
node has the memory for it; the first token comes from the prefill node.
"""

from __future__ import annotations

from engine.compiled import compiled
from engine.virtual_kernel import FREE_BLOCKS, MAX_SEQS, RUNNING, blocks_for


@compiled
def whole_prompts(replica, rows, active, token_budget, order):
    """The next batch of a prefill node. Fills `order` with `active`; returns what the batch may hold."""
    order[: len(active)] = active
    slots = replica.counts[MAX_SEQS] - replica.counts[RUNNING]
    free = replica.counts[FREE_BLOCKS]
    tokens = 0
    open_door = True
    for one in active:
        row = rows[one]
        row.chunk_tokens = row.verify_tokens = 0
        known = row.prompt_tokens + row.output_tokens
        needed = known - min(row.cached_tokens, known - 1)
        blocks = blocks_for(replica, known)
        fits = tokens + needed <= token_budget or tokens == 0
        if not open_door or slots < 1 or blocks > free or not fits:
            open_door = False
            continue
        row.chunk_tokens = needed
        tokens += needed
        free -= blocks
        slots -= 1
    return max(tokens, token_budget)


@compiled
def decode_all(rows, active, order):
    """The next batch of a decode node: a token of each, and whole what was preempted and is computed again."""
    order[: len(active)] = active
    tokens = 0
    for one in active:
        row = rows[one]
        known = row.prompt_tokens + row.output_tokens
        row.verify_tokens = 0
        row.chunk_tokens = max(known - row.computed_tokens, 1)
        tokens += row.chunk_tokens
    return tokens
