"""The form of an instance document: its fields, their bounds, and what contradicts what.

Bounds keep a call short: no field may ask for more time or memory than an answer is worth.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

MAX_BATCHES = 100_000  # until the last deadline: the search walks through them
MAX_DUE_TOKENS = 5_000_000  # of running decodes until the last deadline: they are listed one by one

Coefficient = Annotated[float, Field(ge=0, le=1e3, allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=0, le=1e5, allow_inf_nan=False)]
Tokens = Annotated[int, Field(ge=0, le=1 << 30)]
KvTokens = Annotated[int, Field(ge=0, le=1 << 50)]
Count = Annotated[int, Field(ge=0, le=1 << 30)]
Id = Annotated[str, Field(min_length=1, max_length=200)]
TierName = Annotated[str, Field(min_length=1, max_length=100)]


class Part(BaseModel):
    """A part of the document: closed to unknown fields, and no value is taken for one of another type."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class PieceForm(Part):
    """One line of the maximum over the tokens of a batch."""

    base_s: Coefficient
    per_token_s: Coefficient
    per_draft_step_s: Coefficient = 0.0


class CostForm(Part):
    """Seconds of a batch: the dearest of `pieces`, plus the other terms, times `drift`."""

    pieces: Annotated[list[PieceForm], Field(min_length=1, max_length=64)]
    per_context_token_s: Coefficient = 0.0
    per_prefill_work_s: Coefficient = 0.0
    per_seq_s: Coefficient = 0.0
    per_prefill_kv_token_s: Coefficient = 0.0
    drift: Annotated[float, Field(gt=0, le=1e3, allow_inf_nan=False)] = 1.0


class TierForm(Part):
    """A pace: at most `tpot_s` per token. `acceptance`: chance that a drafted token is right; null: none."""

    tpot_s: Annotated[float, Field(ge=1e-4, le=1e5, allow_inf_nan=False)]
    acceptance: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None


class DecodeForm(Part):
    """A running decode that was promised: its next token is due in `due_s`, then one every TPOT of its tier."""

    id: Id
    tier: TierName
    due_s: Seconds
    context_tokens: Tokens = 0


class PrefillForm(Part):
    """A promised prefill: `tokens` to compute by `deadline_s`. `tier` null: it decodes elsewhere."""

    id: Id
    tokens: Tokens
    deadline_s: Seconds
    tier: TierName | None = None
    cached_tokens: Tokens = 0


class NewcomerForm(PrefillForm):
    """Asks to be let in. `kv_tokens`: KV that it will hold in each interval of `free_kv`; none if left out."""

    kv_tokens: list[KvTokens] | None = None
    value: Annotated[float, Field(gt=0, le=1e12, allow_inf_nan=False)] = 1.0


class FreeKvForm(Part):
    """KV tokens free for newcomers from `at_s` on, until the next interval begins."""

    at_s: Seconds
    tokens: KvTokens


class InstanceForm(Part):
    """One admission problem on one replica. Times: seconds from the start of the plan."""

    model_config = ConfigDict(title="slosserve plan instance")

    version: Literal[1]
    cost: CostForm
    max_batch_tokens: Annotated[int, Field(ge=1, le=1 << 24)]
    tiers: Annotated[dict[TierName, TierForm], Field(max_length=32)]
    decodes: Annotated[list[DecodeForm], Field(max_length=10_000)] = []
    prefills: Annotated[list[PrefillForm], Field(max_length=10_000)] = []
    newcomers: Annotated[list[NewcomerForm], Field(max_length=20_000)] = []
    free_kv: Annotated[list[FreeKvForm], Field(min_length=1, max_length=100)] = [
        FreeKvForm(at_s=0.0, tokens=1 << 40)
    ]
    free_seqs: Annotated[Count, Field(description="Newcomers that may be admitted at most.")] = 1 << 30
    late_seqs: Annotated[
        Tokens, Field(description="Decodes whose promise is broken: they take a token of each batch.")
    ] = 0
    max_depth: Annotated[int, Field(ge=1, le=10, description="Most tokens per verify; 1: no drafts.")] = 1
    draft_step_s: Annotated[Seconds, Field(description="Seconds of one step of the draft model.")] = 0.0
    theta: Annotated[
        float, Field(gt=0, le=1, description="Share of the time that drafted tokens are due in.")
    ] = 1.0


def contradictions(form: InstanceForm) -> Iterator[str]:
    """What is wrong beyond single fields, each as a sentence."""
    seen: dict[str, str] = {}
    known = ", ".join(form.tiers) or "none"
    groups: Mapping[str, Sequence[DecodeForm | PrefillForm]] = {
        "decodes": form.decodes,
        "prefills": form.prefills,
        "newcomers": form.newcomers,
    }
    for name, group in groups.items():
        for at, each in enumerate(group):
            where = f"{name}[{at}]"
            if each.id in seen:
                yield f"{where}.id: {each.id!r} is the id of {seen[each.id]} already"
            seen[each.id] = where
            if each.tier is not None and each.tier not in form.tiers:
                yield f"{where}.tier: unknown tier {each.tier!r}; there are {known}"
    yield from _contradictions_of_memory(form)
    yield from _contradictions_of_size(form)


def _contradictions_of_memory(form: InstanceForm) -> Iterator[str]:
    if form.free_kv[0].at_s != 0:
        yield f"free_kv[0].at_s: the first interval begins at 0, not {form.free_kv[0].at_s:g}"
    for at in range(1, len(form.free_kv)):
        before_s, at_s = form.free_kv[at - 1].at_s, form.free_kv[at].at_s
        if at_s <= before_s:
            yield f"free_kv[{at}].at_s: {at_s:g} is not after the interval before it, {before_s:g}"
    for at, newcomer in enumerate(form.newcomers):
        if newcomer.kv_tokens is not None and len(newcomer.kv_tokens) != len(form.free_kv):
            yield (
                f"newcomers[{at}].kv_tokens: {len(newcomer.kv_tokens)} numbers for the "
                f"{len(form.free_kv)} intervals of free_kv"
            )


def _contradictions_of_size(form: InstanceForm) -> Iterator[str]:
    if not form.tiers:
        return
    horizon_s = max((each.deadline_s for each in (*form.prefills, *form.newcomers)), default=0.0)
    horizon_s += max(tier.tpot_s for tier in form.tiers.values())
    tightest = min(form.tiers, key=lambda name: form.tiers[name].tpot_s)
    batches = horizon_s / form.tiers[tightest].tpot_s
    if batches > MAX_BATCHES:
        yield (
            f"tiers.{tightest}.tpot_s: {batches:.0f} batches until the last deadline;"
            f" at most {MAX_BATCHES} are planned"
        )
    due = sum(max(horizon_s - each.due_s, 0.0) / form.tiers[each.tier].tpot_s for each in form.decodes)
    if due > MAX_DUE_TOKENS:
        yield f"decodes: {due:.0f} tokens are due until the last deadline; at most {MAX_DUE_TOKENS} are planned"
