"""Admission: may this request be promised here, without breaking an earlier promise?

A first answer: earliest deadline first with a linear cost model. Work is counted in tokens. While n decodes
run at a tightest pace T, a batch takes at most T and leaves `tokens_in(T) - n` tokens to prefills; queued
prefills, sorted by deadline, must each be covered by the batches that fit before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.cost import StepCost


@dataclass(frozen=True, slots=True)
class Prefill:
    """Prompt tokens still to compute, due in `left_s`; then a decode at `tpot_s` (None: not on this node)."""

    tokens: int
    left_s: float
    tpot_s: float | None


@dataclass(frozen=True, slots=True)
class Replica:
    """What a node has promised, and what it has left. `decode_tpots_s`: a pace per running decode."""

    cost: StepCost
    max_batch_tokens: int
    free_kv_tokens: int
    free_seqs: int
    prefills: Sequence[Prefill] = ()
    decode_tpots_s: Sequence[float] = ()


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether, with how much time to spare at the tightest point, and if not, why."""

    feasible: bool
    slack_s: float
    reason: str = ""


def admit_prefill(replica: Replica, new: Prefill) -> Verdict:
    """May `new` be prefilled on `replica` by its deadline, with every earlier promise kept?"""
    queue = sorted([*replica.prefills, new], key=lambda prefill: prefill.left_s)
    decodes = list(replica.decode_tpots_s)
    clock_s = 0.0
    slack_s = float("inf")
    for prefill in queue:
        clock_s += prefill_time_s(replica, prefill.tokens, decodes)
        slack_s = min(slack_s, prefill.left_s - clock_s)
        if prefill.tpot_s is not None:
            decodes.append(prefill.tpot_s)
    if slack_s < 0:
        return Verdict(False, slack_s, f"prefill would be late by {-slack_s:.2f} s")
    return Verdict(True, slack_s)


def admit_decode(replica: Replica, kv_tokens: int, tpot_s: float, sequences: int = 1) -> Verdict:
    """May `sequences` more decodes at `tpot_s` be kept for ever beside those that run, and is there memory?"""
    if replica.free_seqs < sequences:
        return Verdict(False, -1.0, "no free sequence slot")
    if kv_tokens > replica.free_kv_tokens:
        return Verdict(False, -1.0, f"KV for {kv_tokens} tokens does not fit in {replica.free_kv_tokens}")
    paces = [*replica.decode_tpots_s, *[tpot_s] * sequences]
    step_s = replica.cost.predict(len(paces))
    slack_s = min(paces) - step_s
    if slack_s < 0:
        return Verdict(False, slack_s, f"a step of {len(paces)} decodes takes {step_s * 1e3:.0f} ms")
    return Verdict(True, slack_s)


def prefill_time_s(replica: Replica, tokens: int, decode_tpots_s: Sequence[float]) -> float:
    """Seconds to prefill `tokens` beside these decodes; infinite if they leave no room at all."""
    if tokens <= 0:
        return 0.0
    cost = replica.cost
    if not decode_tpots_s:
        return cost.prefill_alone_s(tokens, replica.max_batch_tokens)
    pace_s = min(decode_tpots_s)
    room = min(cost.tokens_in(pace_s), replica.max_batch_tokens) - len(decode_tpots_s)
    if room <= 0:
        return float("inf")
    full, rest = divmod(tokens, room)
    rest_s = cost.predict(rest + len(decode_tpots_s)) if rest else 0.0
    return full * cost.predict(room + len(decode_tpots_s)) + rest_s
