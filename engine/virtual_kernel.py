"""The step of a virtual engine, compiled: who gets slots and KV blocks, what a batch costs, what it makes.

It carries out plans as vLLM 0.32 does: running sequences first, in the order of the plan, then waiting ones,
first come first served unless the plan says otherwise; a sequence that lacks a block takes those of the last
running one, whose KV is dropped and whose tokens are kept; nobody is admitted in a batch that preempted.

KV is counted in blocks, not kept: what two running sequences could share is held twice.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from engine.compiled import compiled
from engine.cost_kernel import predict_s
from engine.rows import NO_PULL, PULL_WAITS, PULLED, PULLING, Index
from engine.score import TOLERANCE

# Counters of a replica, in `Replica.counts`.
LIVE, RUNNING, FREE_BLOCKS, NUM_BLOCKS, BLOCK_TOKENS, MAX_SEQS, MAX_BATCH_TOKENS, PROMISES_STARVED, STEPS = (
    range(9)
)
COUNTS = 9
# Of the last batch, in `Replica.batch`.
SEQS, TOKENS, DECODE_SEQS, CONTEXT_TOKENS, KV_TOKENS, DRAFTED, DRAFT_STEPS, ACCEPTED, PREEMPTED, BLOCKED = (
    range(10)
)
BATCH = 10


class Replica(NamedTuple):
    """Arrays of one replica. `live` [n]: rows here, running ones first in the order in which they got their
    slot, then waiting ones; `counts[LIVE]` of them count. `members` [n]: rows in the last batch."""

    live: Index
    counts: Index
    members: Index
    batch: Index
    work: npt.NDArray[np.float64]  # [1] prefill work of the last batch

    @classmethod
    def empty(
        cls, most_rows: int, num_blocks: int, block_tokens: int, max_seqs: int, max_batch_tokens: int
    ) -> Replica:
        """Nothing runs."""
        counts = np.zeros(COUNTS, dtype=np.int64)
        counts[FREE_BLOCKS] = counts[NUM_BLOCKS] = num_blocks
        counts[BLOCK_TOKENS], counts[MAX_SEQS], counts[MAX_BATCH_TOKENS] = (
            block_tokens,
            max_seqs,
            max_batch_tokens,
        )
        most = max(most_rows, 1)
        return cls(
            np.empty(most, dtype=np.int64),
            counts,
            np.empty(most, dtype=np.int64),
            np.zeros(BATCH, dtype=np.int64),
            np.zeros(1),
        )


@compiled
def enqueue(replica, rows, one):
    """A row begins to wait here, behind the others."""
    replica.live[replica.counts[LIVE]] = one
    replica.counts[LIVE] += 1
    rows[one].running = False
    rows[one].blocked = False


@compiled
def remove(replica, rows, one):
    """A row leaves, with its blocks. Unknown ones do nothing."""
    live, counts = replica.live, replica.counts
    for at in range(counts[LIVE]):
        if live[at] == one:
            live[at : counts[LIVE] - 1] = live[at + 1 : counts[LIVE]]
            counts[LIVE] -= 1
            if rows[one].running:
                counts[RUNNING] -= 1
            rows[one].running = False
            counts[FREE_BLOCKS] += rows[one].blocks
            rows[one].blocks = 0
            return


@compiled
def blocks_for(replica, tokens):
    """Blocks that hold so many tokens."""
    return -(-tokens // replica.counts[BLOCK_TOKENS])


@compiled
def runnable(replica, rows, active, waiting_too):
    """Fill `active` with the rows that a batch can be about, and return how many: all but those whose KV is
    still to come. `waiting_too`: also those whose pull waits for memory, which a plan may be about."""
    count = 0
    for at in range(replica.counts[LIVE]):
        one = replica.live[at]
        pull = rows[one].pull
        if pull in (NO_PULL, PULLED) or (waiting_too and pull == PULL_WAITS):
            active[count] = one
            count += 1
    return count


@compiled
def preempt(replica, rows, one):
    """Slot and KV are given up, tokens kept. It waits in front."""
    live, counts, row = replica.live, replica.counts, rows[one]
    at = 0
    while live[at] != one:
        at += 1
    # Behind the other running ones, which is the front of those that wait.
    last = counts[RUNNING] - 1
    live[at:last] = live[at + 1 : last + 1].copy()
    live[last] = one
    counts[RUNNING] -= 1
    counts[FREE_BLOCKS] += row.blocks
    row.blocks = row.computed_tokens = row.cached_tokens = 0
    row.chunk_tokens = row.verify_tokens = row.drafts = 0
    row.running = False
    row.preempted += 1
    row.pull = NO_PULL  # what was pulled is gone: it is computed here
    if row.promised and row.lacked == 0:
        row.lacked = 1
    replica.batch[PREEMPTED] += 1


@compiled
def _grow(replica, rows, one, tokens):
    """Blocks for `tokens` more, if there are so many. Returns whether it has them."""
    row = rows[one]
    more = blocks_for(replica, row.computed_tokens + tokens) - row.blocks
    if more > replica.counts[FREE_BLOCKS]:
        return False
    if more > 0:
        replica.counts[FREE_BLOCKS] -= more
        row.blocks += more
    return True


@compiled
def _victim(replica, rows, order):
    """The running row that gives its blocks: the last in the order of the plan."""
    for at in range(len(order) - 1, -1, -1):
        if rows[order[at]].running:
            return order[at]
    return -1


@compiled
def carry_out(replica, rows, order, max_tokens):
    """Form the batch of a plan. `replica.batch` is zero but for those preempted by the plan.

    `order`: every runnable row, whose `chunk_tokens` and `verify_tokens` say what it may have. Afterwards these
    are what it has, and `replica.batch` says what the batch holds.
    """
    counts, batch = replica.counts, replica.batch
    preempted = batch[PREEMPTED]
    room = min(max_tokens, counts[MAX_BATCH_TOKENS])
    for one in order:
        row = rows[one]
        row.blocked = False
        if not row.running:
            continue
        chunk = _granted(row, room)
        if chunk == 0:
            row.chunk_tokens = row.verify_tokens = 0
            continue
        while not _grow(replica, rows, one, chunk):
            victim = _victim(replica, rows, order)
            if rows[victim].chunk_tokens > 0 and _placed_before(order, victim, one):
                room += rows[victim].chunk_tokens
            preempt(replica, rows, victim)
            if victim == one:
                break
        if row.running:
            row.chunk_tokens = chunk
            room -= chunk
    door_is_shut = batch[PREEMPTED] > preempted
    for one in order:
        row = rows[one]
        if row.running:
            continue
        # Who was pulled has its blocks already: if it waited behind one that lacks some, neither would go on.
        if row.chunk_tokens == 0 or room <= 0 or (door_is_shut and row.pull != PULLED):
            row.chunk_tokens = row.verify_tokens = 0
            continue
        if not _admit(replica, rows, one):
            row.blocked = True
            if row.promised and row.lacked == 0:
                row.lacked = 1
            row.chunk_tokens = row.verify_tokens = 0
            door_is_shut = True  # vLLM stops at the first that does not get in
            continue
        row.chunk_tokens = _granted(row, room)
        _grow(replica, rows, one, row.chunk_tokens)
        room -= row.chunk_tokens
    _count_batch(replica, rows, order)


@compiled
def _placed_before(order, first, second):
    for one in order:
        if one == first:
            return True
        if one == second:
            return False
    return False


@compiled
def _granted(row, room):
    """New tokens that a row gets: no more than the plan, the room and what there is to compute."""
    needed = row.prompt_tokens + row.output_tokens - row.computed_tokens + row.verify_tokens
    chunk = min(row.chunk_tokens, room, needed)
    if chunk <= 0:
        return 0
    row.verify_tokens = min(row.verify_tokens, max(chunk - 1, 0))
    return chunk


@compiled
def _admit(replica, rows, one):
    """A waiting row gets its slot, if there is one and its whole sequence fits (vLLM 0.32 reserves no part
    prompts). What the prefix cache has of it counts as computed."""
    live, counts, row = replica.live, replica.counts, rows[one]
    if counts[RUNNING] >= counts[MAX_SEQS]:
        return False
    if row.pull != PULLED:
        known = row.prompt_tokens + row.output_tokens
        if blocks_for(replica, known) > counts[FREE_BLOCKS]:
            return False
        row.computed_tokens = min(row.cached_tokens, known - 1)
    at = counts[RUNNING]
    while live[at] != one:
        at += 1
    first = counts[RUNNING]
    live[first + 1 : at + 1] = live[first:at].copy()
    live[first] = one
    counts[RUNNING] += 1
    row.running = True
    return True


@compiled
def _count_batch(replica, rows, order):
    batch = replica.batch
    work = 0.0
    count = 0
    for one in order:
        row = rows[one]
        if row.chunk_tokens == 0:
            continue
        replica.members[count] = one
        count += 1
        batch[TOKENS] += row.chunk_tokens
        batch[DRAFTED] += row.verify_tokens
        batch[DRAFT_STEPS] = max(batch[DRAFT_STEPS], row.verify_tokens)
        if row.computed_tokens > 0 and row.chunk_tokens - row.verify_tokens == 1:
            batch[DECODE_SEQS] += 1
            batch[CONTEXT_TOKENS] += row.computed_tokens
        else:
            work += row.chunk_tokens * (row.computed_tokens + row.chunk_tokens / 2)
            batch[KV_TOKENS] += row.computed_tokens
    batch[SEQS] = count
    replica.work[0] = work


@compiled
def batch_s(replica, cost, draft_steps):
    """Seconds of the batch that was formed. `draft_steps`: of a draft model, however few drafts were taken."""
    batch = replica.batch
    steps = max(batch[DRAFT_STEPS], draft_steps)
    return predict_s(
        cost, batch[TOKENS], batch[SEQS], batch[CONTEXT_TOKENS], replica.work[0], steps, batch[KV_TOKENS]
    )


@compiled
def finish(replica, rows, end_s, acceptance, max_draft_tokens):
    """The batch ends: tokens are made, and what is over gives up slot and blocks (an offer keeps its blocks).

    Rows of `replica.members[: batch[SEQS]]` say in `new_tokens` what they made.
    """
    batch, counts = replica.batch, replica.counts
    for at in range(batch[SEQS]):
        one = replica.members[at]
        row = rows[one]
        known = row.prompt_tokens + row.output_tokens
        drafts = row.verify_tokens
        row.new_tokens = 0
        if row.computed_tokens + row.chunk_tokens < known:  # a chunk that does not end the prompt
            row.computed_tokens += row.chunk_tokens
            continue
        accepted = 0
        if drafts > 0:
            while accepted < drafts and accepts(row.seed, row.output_tokens + accepted, acceptance):
                accepted += 1
            row.drafted += drafts
            row.accepted += accepted
            batch[ACCEPTED] += accepted
        if row.offers:
            row.computed_tokens = known
            row.new_tokens = 1
            _leave(replica, row, one)
            continue
        if row.lacked == 1:
            row.lacked = 0
            since_s = row.due_s - max(row.first_due_s, row.first_token_s) if row.output_tokens > 0 else 0.0
            if row.promised and end_s > row.due_s + TOLERANCE * max(since_s, 0.0):
                row.lacked = 2
                counts[PROMISES_STARVED] += 1
        row.new_tokens = min(1 + accepted, row.end_tokens - row.output_tokens)
        row.computed_tokens = known + row.new_tokens - 1
        row.output_tokens += row.new_tokens
        row.drafts = max_draft_tokens
        if np.isnan(row.first_token_s):
            row.first_token_s = end_s
        thought = max(row.thinking_tokens - 1, 0)
        if 0 < row.thinking_tokens <= row.output_tokens:
            row.tpot_s = row.answer_tpot_s
        origin_s = (
            max(row.first_due_s, row.first_token_s) + min(row.output_tokens, thought) * row.thinking_tpot_s
        )
        row.due_s = origin_s + max(row.output_tokens - thought, 0) * row.tpot_s
        if row.output_tokens >= row.end_tokens:
            counts[FREE_BLOCKS] += row.blocks
            row.blocks = 0
            _leave(replica, row, one)
    counts[STEPS] += 1


@compiled
def _leave(replica, row, one):
    """Out of the live rows; its blocks are somebody else's business."""
    live, counts = replica.live, replica.counts
    at = 0
    while live[at] != one:
        at += 1
    live[at : counts[LIVE] - 1] = live[at + 1 : counts[LIVE]].copy()
    counts[LIVE] -= 1
    counts[RUNNING] -= 1
    row.running = False


@compiled
def accepts(seed, position, acceptance):
    """Whether the draft for this output position is right: a fixed number per request and position (splitmix64,
    Steele et al. 2014), so that every system that speculates meets the same luck."""
    x = np.uint64(seed) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(position + 1) * np.uint64(
        0xBF58476D1CE4E5B9
    )
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x = x ^ (x >> np.uint64(31))
    return (x >> np.uint64(11)) * (1.0 / 9007199254740992.0) < acceptance


@compiled
def start_pulls(replica, rows, order, started):
    """Give blocks to handed-over rows that wait for them and may, in this order. Returns how many began;
    `started` names them. Their KV arrives when `pulled` says so."""
    count = 0
    for one in order:
        if rows[one].pull == NO_PULL and rows[one].preempted > 0 and not rows[one].running:
            break  # it was here before, and needs what is free to go on
        if rows[one].pull != PULL_WAITS or not rows[one].may_pull:
            continue
        known = rows[one].prompt_tokens + rows[one].output_tokens
        blocks = blocks_for(replica, known)
        if blocks > replica.counts[FREE_BLOCKS]:
            break
        replica.counts[FREE_BLOCKS] -= blocks
        rows[one].blocks = blocks
        rows[one].pull = PULLING
        started[count] = one
        count += 1
    return count


@compiled
def pulled(rows, one):
    """The KV is here: all that is left is the last token, from which the next one comes."""
    rows[one].pull = PULLED
    rows[one].computed_tokens = rows[one].prompt_tokens + rows[one].output_tokens - 1


@compiled
def recompute(replica, rows, one):
    """The KV did not come: the row waits for its turn and computes its prompt here."""
    replica.counts[FREE_BLOCKS] += rows[one].blocks
    rows[one].blocks = 0
    rows[one].pull = NO_PULL
    rows[one].computed_tokens = 0
