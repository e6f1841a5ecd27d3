"""A replica on the step-time model whose batches the composer makes: does what was promised come in time?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import msgspec

from coordinator.planner.admission import Plan
from coordinator.planner.instance import Decode, Instance, Newcomer, Prefill
from engine.base import BatchPlan, Seq
from engine.batch import Duty, Moment, compose

EPS_S = 1e-9
RUNS_ON = 1 << 30  # output tokens: a decode goes on for ever


@dataclass(frozen=True, slots=True)
class Late:
    """A token that came late."""

    id: str
    due_s: float
    done_s: float


def late_tokens(instance: Instance, plan: Plan, after_s: float) -> list[Late]:
    """Tokens that come late until `after_s` after the last deadline, when all of `plan` is let in at once.

    KV is without limit. The duty of a work is what an engine keeps for it: token n is due at
    max(first deadline, first token) + (n - 1) * TPOT.
    """
    admitted = [one for one in instance.newcomers if one.id in plan.starts]
    prompts: Sequence[Prefill | Newcomer] = [*instance.prefills, *admitted]
    tpots = {tier.name: tier.tpot_s for tier in instance.tiers}
    seqs = {one.id: _running(one) for one in instance.decodes}
    seqs |= {one.id: _queued(one) for one in prompts}
    duties = {one.id: Duty(one.id, 0.0, tpots[one.tier], one.due_s) for one in instance.decodes}
    duties |= {
        one.id: Duty(one.id, one.deadline_s, math.inf if one.tier is None else tpots[one.tier])
        for one in prompts
    }
    elsewhere = {one.id for one in prompts if one.tier is None}
    until_s = max((duty.due_s for duty in duties.values()), default=0.0) + after_s
    now_s = 0.0
    late: list[Late] = []
    while seqs and now_s < until_s:
        batch = compose(list(seqs.values()), duties, Moment(now_s, instance.cost, instance.max_batch_tokens))
        now_s += _seconds(instance, seqs, batch)
        for id_, chunk in batch.chunk_tokens.items():
            seq = seqs[id_]
            seqs[id_] = seq = msgspec.structs.replace(seq, computed_tokens=seq.computed_tokens + chunk)
            if seq.computed_tokens < seq.prompt_tokens + seq.output_tokens:
                continue
            seqs[id_] = msgspec.structs.replace(seq, output_tokens=seq.output_tokens + 1, running=True)
            duty = duties[id_]
            if now_s > duty.due_s + EPS_S:
                late.append(Late(id_, duty.due_s, now_s))
            next_due_s = max(duty.due_s, now_s if duty.next_token_due_s is None else 0.0) + duty.tpot_s
            duties[id_] = replace(duty, next_token_due_s=next_due_s)
            if id_ in elsewhere:
                del seqs[id_]
    late += [Late(id_, duties[id_].due_s, math.inf) for id_ in seqs if duties[id_].due_s < now_s - EPS_S]
    return late


def _running(decode: Decode) -> Seq:
    return Seq(decode.id, decode.context_tokens, decode.context_tokens, 1, running=True)


def _queued(prompt: Prefill | Newcomer) -> Seq:
    total = prompt.cached_tokens + prompt.tokens
    return Seq(prompt.id, total, prompt.cached_tokens, 0, running=False)


def _seconds(instance: Instance, seqs: dict[str, Seq], batch: BatchPlan) -> float:
    """What the model says of the batch. It must hold something."""
    assert batch.chunk_tokens, f"an empty batch, with {len(seqs)} sequences to serve"
    decodes = [id_ for id_ in batch.chunk_tokens if seqs[id_].output_tokens and seqs[id_].prefill_left == 0]
    context = sum(seqs[id_].computed_tokens for id_ in decodes)
    prefills = [(seqs[id_].computed_tokens, n) for id_, n in batch.chunk_tokens.items() if id_ not in decodes]
    return instance.cost.predict(
        sum(batch.chunk_tokens.values()),
        seqs=len(batch.chunk_tokens),
        context_tokens=context,
        prefill_work=sum(n * (kv + n / 2) for kv, n in prefills),
        prefill_kv_tokens=sum(kv for kv, _ in prefills),
    )
