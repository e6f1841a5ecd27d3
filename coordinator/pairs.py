"""What a pair needs beside what each of its nodes does: the handoff between them.

The prefill node says the first token, so its deadline is that of the request. KV moves after it; the tokens
that the decode node says next are late by that, and catch up with their pace.
"""

from __future__ import annotations

import math
from dataclasses import replace

from coordinator.mirror import NodeMirror
from coordinator.planner.lengths import Lengths
from coordinator.planner.replica import Asking
from engine.messages import Place, WorkState
from engine.request import WorkKind
from engine.score import CHECK_EVERY
from kv_transfer.base import Link

HANDOFF_STEPS = 2  # of the decode node, beside those that pass while bytes move
SHORT_SHARE = 0.01  # of answers may be so short that a handoff is not made good by their last token


def lead_s(
    request: Place, asking: Asking, prefill: NodeMirror, decode: NodeMirror, link: Link, lengths: Lengths
) -> float:
    """How long before the first token is due its prefill must end: so that those after it are in their pace
    when they are looked at, at the tenth or the last (the scoring rule). An answer that has begun waits for the
    handoff. `asking`: what the prefill node is asked.
    """
    moved_tokens = request.prompt_tokens - request.said_tokens
    step_s = _step_s(decode, moved_tokens)
    moving_s = transfer_s(request, prefill, link) + _queue_s(asking, prefill, decode, link)
    handoff_s = _handoff_s(moving_s, step_s, decode)
    if request.said_tokens:
        return handoff_s
    known = lengths.lengths(request.class_name or "", request.prompt_tokens, max(request.max_tokens, 1))
    if known.max_tokens == 1:
        return 0.0
    last = min(max(known.remaining_quantile(SHORT_SHARE), 2), CHECK_EVERY)
    return max(handoff_s + (last - 2) * step_s - (last - 1) * request.tpot_s, 0.0)


def transfer_s(request: Place, prefill: NodeMirror, link: Link) -> float:
    """Seconds that the KV of the prompt is on its way."""
    assert prefill.report is not None
    moved_tokens = request.prompt_tokens - request.said_tokens
    return link.transfer_s(moved_tokens * prefill.report.info.kv_bytes_per_token)


def taken_up(state: WorkState, said_tokens: int) -> WorkState:
    """A request as its decode node will have it: where the answer begins with the prefill, the first token is
    to the decode node a part of the prompt, and the next one is due a pace later."""
    first = 0 if said_tokens else 1
    return replace(
        state,
        kind=WorkKind.DECODE,
        prompt_tokens=state.prompt_tokens + first,
        prefill_left_tokens=max(said_tokens - 1, 0),
        max_tokens=state.max_tokens - first,
        first_token_left_s=state.first_token_left_s + first * state.tpot_s,
    )


def _queue_s(asking: Asking, prefill: NodeMirror, decode: NodeMirror, link: Link) -> float:
    """How long the KV of one placed now would wait for that of others to come over: what is promised to come to
    this decode node, less what the link carries until this prefill ends at the earliest.
    """
    assert prefill.report is not None
    ends_s = prefill.report.cost.predict(asking.tokens + prefill.promised_prefill_tokens)
    kv_bytes = decode.promised_pull_tokens * prefill.report.info.kv_bytes_per_token
    return max(kv_bytes / link.bytes_per_s - ends_s, 0.0)


def _step_s(decode: NodeMirror, more_tokens: int) -> float:
    """A step of its decodes, and of one more that has so many tokens before it."""
    assert decode.report is not None
    works = decode.works
    running = len(decode.report.works) + 1
    context_tokens = int(works.context_tokens[works.decoding].sum()) + more_tokens
    return decode.report.cost.predict(running, seqs=running, context_tokens=context_tokens)


def _handoff_s(moving_s: float, step_s: float, decode: NodeMirror) -> float:
    """Seconds from the end of a prefill to the token after it, at most. A pull begins between two steps of the
    decode node and is seen between two: it waits for the batch under way, and its own step follows.
    """
    if not decode.requests:
        return moving_s + step_s
    return _under_way_s(decode, step_s) + step_s * (HANDOFF_STEPS - 1 + math.ceil(moving_s / step_s))


def _under_way_s(decode: NodeMirror, step_s: float) -> float:
    """The longest batch that may be under way when KV is offered: where there are prompts to compute, they fill
    it up to the tightest pace that is kept there."""
    assert decode.report is not None
    prompt_tokens = decode.works.prompt_left_tokens
    if prompt_tokens == 0:
        return step_s
    tokens = min(prompt_tokens + decode.requests, decode.report.info.max_batch_tokens)
    return max(step_s, min(decode.report.cost.predict(tokens), decode.tightest_s))
