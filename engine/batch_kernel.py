"""Algorithm 2, compiled: fills `chunk_tokens` and `verify_tokens` of rows, and the order of the next batch.

`engine/batch.py` says what it does and why; this is how. All functions work on `rows` (ROW), of which `active`
names those that can run, and on one POUR: the batch while it is filled.
"""

from __future__ import annotations

import math

import numpy as np

from engine.compiled import compiled
from engine.cost_kernel import chunk_in, predict_s, prefill_alone_s, tokens_in
from engine.rows import NO_PULL, PULL_WAITS

MIN_CHUNK_TOKENS = 16  # smaller chunks cost more in attention to what is computed than they bring
ROUNDING_S = 1e-9
CATCH_UP = 0.75  # of what a pace leaves beside its decodes, a batch still takes when a token is late
# Best effort. Its prompts make a batch no longer than this many times the floor of a step: who comes next waits
# for the end of the batch. A bit longer where no promise is kept just now, and as long as they like where none
# has been kept for a while. And they are begun only while so much of the KV memory stays free: what a promise
# takes back soon would be computed twice.
SPARE_FLOORS = 2.0
LATELY_FLOORS = 4.0
LATELY_S = 10.0
SPARE_KV_SHARE = 0.3
# The same for prompts whose KV is handed over: nobody takes it back, and who pulls it waits for memory as well.
OFFERED_KV_SHARE = 0.7

POUR = np.dtype(
    [
        ("room", np.int64),
        ("limit_s", np.float64),
        ("margin", np.float64),  # share by which a batch may take longer than predicted
        ("promised_s", np.float64),  # when a promise was here last; -inf: never
        ("coming_due_s", np.float64),  # first token of a promise whose KV is on its way, the earliest; or inf
        ("draft_steps", np.int64),  # of the deepest verify that is planned
        ("seqs", np.int64),  # in the batch so far: the first of `order`
        ("pulls", np.int64),  # that may begin: the next of `order`
        ("tokens", np.int64),
        ("context_tokens", np.int64),
        ("prefill_work", np.float64),
        ("prefill_kv_tokens", np.int64),
        ("draft_tokens", np.int64),  # to draft for the batch after this one; -1: as many as it can
        # Memory now, -1 where it is not known: tokens of KV in all, those free, and free slots.
        ("kv_tokens", np.int64),
        ("free_tokens", np.int64),
        ("free_slots", np.int64),
    ],
    align=True,
)


@compiled
def _known(row):
    return row.prompt_tokens + row.output_tokens


@compiled
def _spare_tokens(pour, cost):
    """Tokens of decodes that still fit."""
    if pour.limit_s == math.inf:
        return pour.room
    within = tokens_in(
        cost, pour.limit_s, pour.seqs, pour.context_tokens, pour.prefill_work, pour.draft_steps,
        pour.prefill_kv_tokens,
    )  # fmt: skip
    return min(pour.room, within - pour.tokens)


@compiled
def _fitting(rows, some, pour, cost):
    """How many of these decodes, from the first, end in time when they join what is there."""
    most = min(len(some), max(pour.room, 0))
    if pour.limit_s == math.inf or most == 0:
        return most
    contexts = np.empty(most, dtype=np.int64)
    total = 0
    for at in range(most):
        total += rows[some[at]].computed_tokens
        contexts[at] = total

    def too_long(count):
        seconds = predict_s(
            cost, pour.tokens + count, pour.seqs + count, pour.context_tokens + contexts[count - 1],
            pour.prefill_work, pour.draft_steps, pour.prefill_kv_tokens,
        )  # fmt: skip
        return seconds > pour.limit_s + ROUNDING_S

    if not too_long(most):
        return most
    low, high = 0, most  # `low` fit, `high` do not
    while high - low > 1:
        middle = (low + high) // 2
        if too_long(middle):
            high = middle
        else:
            low = middle
    return low


@compiled
def _take(rows, one, tokens, pour, order):
    rows[one].chunk_tokens = tokens
    order[pour.seqs] = one
    pour.seqs += 1
    pour.tokens += tokens
    pour.room -= tokens


@compiled
def _decode_all(rows, some, drafted, pour, order):
    """The next token of each while there is room, with the drafts that were planned for it if `drafted`."""
    for one in some:
        if pour.room <= 0:
            return
        row = rows[one]
        drafts = 0
        if drafted and row.depth > 0:
            drafts = min(row.drafts, row.depth - 1, pour.room - 1)
        _take(rows, one, 1 + drafts, pour, order)
        row.verify_tokens = drafts
        pour.context_tokens += row.computed_tokens


@compiled
def _verify(rows, some, planned_too, pour, cost):
    """Drafts of decodes that are in, as many as fit; of those with a planned depth only if `planned_too`."""
    room = 0
    for one in some:
        if rows[one].drafts > 0 and (planned_too or rows[one].depth == 0):
            room = _spare_tokens(pour, cost)
            break
    for one in some:
        row = rows[one]
        if room <= 0:
            return
        if row.chunk_tokens == 0 or (row.depth > 0 and not planned_too):
            continue
        drafts = min(row.drafts, room)
        more = drafts - row.verify_tokens
        row.verify_tokens = drafts
        row.chunk_tokens += more
        pour.tokens += more
        pour.room -= more
        room -= more


@compiled
def _chunk_in(seconds, row, pour, cost):
    return chunk_in(
        cost, seconds, row.computed_tokens, pour.tokens, pour.seqs, pour.context_tokens, pour.prefill_work,
        pour.draft_steps, pour.prefill_kv_tokens,
    )  # fmt: skip


@compiled
def _prefill(rows, one, left_s, pour, cost, order):
    """A chunk of what it still needs. A crumb only if that ends the prompt, or the batch were empty.

    Where it ends in this batch, the batch ends within `left_s` if it can, and by a margin if it can. Returns
    whether it got all.
    """
    row = rows[one]
    needed = max(_known(row) - row.computed_tokens, 1)
    chunk = min(needed, pour.room)
    if pour.limit_s < math.inf:
        chunk = min(chunk, _chunk_in(pour.limit_s, row, pour, cost))
    if chunk == needed and left_s < math.inf:
        for within_s in (left_s / (1.0 + pour.margin), left_s):
            if within_s < pour.limit_s and _chunk_in(within_s, row, pour, cost) >= needed:
                pour.limit_s = within_s
                break
    crumb = chunk < min(needed, MIN_CHUNK_TOKENS)
    if chunk > 0 and not (crumb and pour.seqs > 0):
        tokens, room = pour.tokens, pour.room
        _take(rows, one, chunk, pour, order)
        if row.blocked:  # so far it has used none: others are in the batch as if it were not
            pour.tokens, pour.room = tokens, room
            return True
        pour.prefill_work += chunk * (row.computed_tokens + chunk / 2)
        pour.prefill_kv_tokens += row.computed_tokens
    return chunk == needed


@compiled
def _bounds(rows, decodes, now_s, margin, cost):
    """Seconds until the first of these decodes is due, those that this batch may take, and the next one, to
    keep their pace.

    A pace that the decodes alone would break binds nobody: holding prefills back could not save it. One that
    has fallen behind leaves prefills most of the room beside all decodes: they have deadlines as well, and KV
    that was handed over comes late by plan, and catches up within ten tokens. Prompts leave the margin free
    beside decodes; batches are no shorter for that in the long run, decodes stay as much ahead.
    """
    due_s = pace_s = math.inf
    count = len(decodes)
    if count == 0:
        return due_s, due_s, pace_s
    context = 0
    for one in decodes:
        context += rows[one].computed_tokens
    alone_s = predict_s(cost, count, count, context, 0.0, 0, 0)
    least_s = predict_s(cost, 1, 1, rows[decodes[0]].computed_tokens, 0.0, 0, 0)
    for one in decodes:
        row = rows[one]
        if row.tpot_s > alone_s:
            pace_s = min(pace_s, row.tpot_s)
            left_s = row.due_s - now_s
            if left_s < least_s - ROUNDING_S:
                left_s = alone_s + CATCH_UP * (row.tpot_s - alone_s)
            due_s = min(due_s, left_s)
    within_s = due_s / (1.0 + margin)
    return due_s, within_s if within_s >= alone_s else due_s, pace_s


@compiled
def _due_before(rows, decodes, at_s):
    """How many of these decodes, which are in order of their due times, are due before `at_s`."""
    count = 0
    while count < len(decodes) and rows[decodes[count]].due_s < at_s:
        count += 1
    return count


@compiled
def _due_decodes(rows, decodes, end_s, next_s, cost):
    """How many, from the first, must be in this batch: their token is due before the next one could end.

    And as many more as the next batch could not hold with those that are due before the one after it.
    """
    if next_s == math.inf:
        return len(decodes)
    due = _due_before(rows, decodes, end_s + next_s)
    after = _due_before(rows, decodes, end_s + 2 * next_s) - due
    return due + max(after - tokens_in(cost, next_s, 0, 0, 0.0, 0, 0), 0) if after > 0 else due


@compiled
def _sorted_by_due(rows, some):
    due_s = np.empty(len(some), dtype=np.float64)
    for at in range(len(some)):
        due_s[at] = rows[some[at]].due_s
    return some[np.argsort(due_s, kind="mergesort")]


@compiled
def _sort_out(rows, active, decodes, prefills, pulls, spare, spare_decodes):
    """Put each sequence where it belongs, in the order given. Returns how many of each, whether any finds no
    slot or memory, whether a promise does, and whether any promised decode has drafts."""
    n_decodes = n_prefills = n_pulls = n_spare = n_spare_decodes = 0
    blocked = promise_blocked = drafted = False
    for one in active:
        row = rows[one]
        row.chunk_tokens = row.verify_tokens = 0
        row.may_pull = False
        pull_waits = row.pull == PULL_WAITS
        decoding = _known(row) - row.computed_tokens <= 1 and not pull_waits
        promise_blocked = promise_blocked or (row.promised and row.blocked)
        blocked = blocked or (row.blocked and not (row.promised and pull_waits))
        if not row.promised:
            spare[n_spare] = one
            n_spare += 1
            if decoding:
                spare_decodes[n_spare_decodes] = one
                n_spare_decodes += 1
        elif pull_waits:
            pulls[n_pulls] = one
            n_pulls += 1
        elif decoding:
            decodes[n_decodes] = one
            n_decodes += 1
            drafted = drafted or row.drafts > 0
        else:
            prefills[n_prefills] = one
            n_prefills += 1
    return (n_decodes, n_prefills, n_pulls, n_spare, n_spare_decodes), blocked, promise_blocked, drafted


@compiled
def _draft_tokens(rows, decodes):
    """To draft for the batch after this one: as deep as the deepest plan; -1, as many as it can, where one has
    no plan or none decodes."""
    deepest = 0
    for one in decodes:
        if rows[one].depth == 0:
            return -1
        deepest = max(deepest, rows[one].depth)
    return deepest - 1


@compiled
def _spare_floors(kept, now_s, promised_s):
    """How many floors of a step prompts of best effort may make a batch, where `kept` promises are here now."""
    if kept > 0:
        return SPARE_FLOORS
    return LATELY_FLOORS if now_s - promised_s < LATELY_S else math.inf


@compiled
def compose_rows(rows, active, now_s, cost, max_batch_tokens, pour, order):
    """The next batch. `order` [len(active)]: first `pour.seqs` rows that are in it, then `pour.pulls` whose KV
    may be pulled now, then those held out, last where memory is taken from first."""
    count = len(active)
    decodes, prefills = np.empty(count, dtype=np.int64), np.empty(count, dtype=np.int64)
    spare, spare_decodes = np.empty(count, dtype=np.int64), np.empty(count, dtype=np.int64)
    pulls = np.empty(count, dtype=np.int64)
    counts, blocked, promise_blocked, drafted = _sort_out(
        rows, active, decodes, prefills, pulls, spare, spare_decodes
    )
    n_decodes, n_prefills, n_pulls, n_spare, n_spare_decodes = counts
    decodes = _sorted_by_due(rows, decodes[:n_decodes])
    prefills = _sorted_by_due(rows, prefills[:n_prefills])
    pulls = _sorted_by_due(rows, pulls[:n_pulls])
    spare = spare[:n_spare]

    pour.draft_tokens = _draft_tokens(rows, decodes)
    pour.room = max_batch_tokens
    pour.seqs = pour.pulls = pour.tokens = pour.context_tokens = pour.prefill_kv_tokens = 0
    pour.prefill_work = 0.0
    pour.draft_steps = max(pour.draft_tokens, 0)
    due_s, pour.limit_s, next_s = _bounds(rows, decodes, now_s, pour.margin, cost)
    due = n_decodes
    if n_prefills > 0 and not blocked:
        due = _due_decodes(rows, decodes, now_s + pour.limit_s, next_s, cost)
    must = 0
    while must < n_decodes and rows[decodes[must]].due_s <= now_s + due_s + ROUNDING_S:
        must += 1
    due = min(due, max(must, _fitting(rows, decodes, pour, cost)))
    _decode_all(rows, decodes[:due], drafted, pour, order)
    _make_room(rows, decodes, prefills, pulls, spare, promise_blocked, pour)
    _leave_time(now_s, cost, pour)
    n_lost = _pour_prefills(rows, prefills, now_s, max_batch_tokens, pour, cost, order)
    if due < n_decodes:
        ahead = _fitting(rows, decodes[due:], pour, cost)
        _decode_all(rows, decodes[due : due + ahead], drafted, pour, order)
    if drafted:
        _verify(rows, decodes, False, pour, cost)
    for one in prefills[n_prefills - n_lost :]:
        _prefill(rows, one, math.inf, pour, cost, order)
    floors = _spare_floors(n_decodes + n_prefills, now_s, pour.promised_s)
    _pour_spare(rows, spare, spare_decodes[:n_spare_decodes], floors, pour, cost, order)
    _order_others(rows, decodes, prefills, pulls, spare, pour, order)


@compiled
def _order_others(rows, decodes, prefills, pulls, spare, pour, order):
    """After those that are in the batch: who may pull its KV now, and then who is held out."""
    held = pour.seqs
    for group in (pulls, spare):
        for one in group:
            if rows[one].may_pull:
                order[held] = one
                held += 1
    pour.pulls = held - pour.seqs
    for group in (decodes, prefills, pulls, spare):
        for one in group:
            if rows[one].chunk_tokens == 0 and not rows[one].may_pull:
                order[held] = one
                held += 1


@compiled
def _leave_time(now_s, cost, pour):
    """A promise whose KV comes while this batch runs needs the batch after it: prompts make this one no longer
    than leaves time for that, as far as a batch of `SPARE_FLOORS` allows.
    """
    if pour.coming_due_s < math.inf:
        floor_s = predict_s(cost, 1, 1, 0, 0.0, 0, 0)
        pour.limit_s = min(pour.limit_s, max(pour.coming_due_s - now_s - floor_s, SPARE_FLOORS * floor_s))


@compiled
def _make_room(rows, decodes, prefills, pulls, spare, promise_blocked, pour):
    """Best effort gives up slot and KV, last in first out, to promises that lack them: `gives_way` says who.

    Where memory is not known, one of them in each batch in which a promise was found at the door. Says as well
    which promised `pulls` may begin, those that fit beside what is here already and goes on; and which prompts
    find no memory now, so that they take no room from who would run meanwhile.
    """
    tokens, slots = -pour.free_tokens, -pour.free_slots
    here = 0  # tokens for those that began before
    for group in (decodes, prefills):
        for one in group:
            row = rows[one]
            more = max(_known(row) - row.computed_tokens, 0) if row.running or row.pull == NO_PULL else 0
            tokens += more
            here += more if row.running or row.output_tokens > 0 else 0
            slots += 0 if row.running else 1
    for one in pulls:
        tokens += _known(rows[one])
        slots += 1
    free_tokens = pour.free_tokens - here
    if pour.free_tokens < 0:
        tokens = slots = 1 if promise_blocked else 0
    elif len(prefills) == 0 and len(pulls) == 0 and slots <= 0 and not promise_blocked:
        tokens = min(tokens, 0)  # a token for each decode is what the engine finds by itself
    for at in range(len(spare) - 1, -1, -1):
        row = rows[spare[at]]
        row.gives_way = False
        if row.running and (tokens > 0 or slots > 0):
            row.gives_way = True
            free_tokens += row.computed_tokens
            tokens = tokens - row.computed_tokens if pour.free_tokens >= 0 else 0
            slots = slots - 1 if pour.free_tokens >= 0 else 0
    for one in pulls:
        free_tokens -= _known(rows[one])
        if free_tokens < 0 and pour.free_tokens >= 0:
            break
        rows[one].may_pull = True
    if pour.free_tokens >= 0:
        for one in prefills:
            row = rows[one]
            if row.running or row.pull != NO_PULL:
                continue
            if row.output_tokens == 0:  # else it is counted in `here`
                free_tokens -= max(_known(row) - row.computed_tokens, 0)
            row.blocked = row.blocked or free_tokens < 0
        pour.free_tokens = max(-tokens, 0)  # below 0 would mean that it is not known
        pour.free_slots = -slots


@compiled
def _pour_prefills(rows, prefills, now_s, max_batch_tokens, pour, cost, order):
    """Promised prompts, earliest deadline first, until one does not get all that it needs.

    Puts those that would be missed even alone behind the others, where they wait. Returns how many.
    """
    kept, lost = np.empty(len(prefills), dtype=np.int64), np.empty(len(prefills), dtype=np.int64)
    n_kept = n_lost = 0
    full = False
    for one in prefills:
        row = rows[one]
        left_s = row.due_s - now_s
        if not full:
            computed = row.computed_tokens
            if not row.running:
                computed = max(computed, row.cached_tokens)
            if left_s + row.grace_s < prefill_alone_s(cost, _known(row), max_batch_tokens, computed):
                lost[n_lost] = one
                n_lost += 1
                continue
            full = not _prefill(rows, one, left_s, pour, cost, order)
        kept[n_kept] = one
        n_kept += 1
    prefills[:n_kept] = kept[:n_kept]
    prefills[n_kept:] = lost[:n_lost]
    return n_lost


@compiled
def _pour_spare(rows, spare, decodes, floors, pour, cost, order):
    """Best effort: tokens of those that decode, then prompts, both in the order in which they came.

    Its prompts may make the batch as long as so many `floors` of a step.
    """
    if len(spare) == 0:
        return
    staying = np.empty(len(decodes), dtype=np.int64)
    count = 0
    for one in decodes:
        if not rows[one].gives_way:
            staying[count] = one
            count += 1
    staying = staying[:count]
    _decode_all(rows, staying[: _fitting(rows, staying, pour, cost)], False, pour, order)
    limit_s = pour.limit_s
    pour.limit_s = min(limit_s, floors * predict_s(cost, 1, 1, 0, 0.0, 0, 0))
    for one in spare:
        row = rows[one]
        known = _known(row)
        if row.gives_way or (known - row.computed_tokens <= 1 and row.pull != PULL_WAITS):
            continue
        if not row.running and pour.free_tokens >= 0:
            share = OFFERED_KV_SHARE if row.offers else SPARE_KV_SHARE
            kept_free = share * pour.kv_tokens if pour.free_tokens < pour.kv_tokens else 0.0
            if row.computed_tokens > 0:
                kept_free = 0.0  # it was let in when its KV was pulled, and holds that
            if pour.free_slots < 1 or pour.free_tokens - (known - row.computed_tokens) < kept_free:
                break  # alone it begins however large it is: else it never would
            pour.free_tokens -= known - row.computed_tokens
            pour.free_slots -= 1
        if row.pull == PULL_WAITS:
            row.may_pull = True
            continue
        _prefill(rows, one, math.inf, pour, cost, order)
    pour.limit_s = limit_s
    _verify(rows, staying, True, pour, cost)
