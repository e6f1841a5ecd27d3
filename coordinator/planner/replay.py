"""Carries a plan out on the step-time model, batch by batch: what each holds, and whether all comes in time.

Within the plan's stretches every batch has a length; it is filled by earliest due time, with as many tokens
as the model says end within that length. So this does not count as the search does, and judges it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from coordinator.planner.admission import Plan, step_period_s
from coordinator.planner.instance import Instance, Newcomer, Prefill

MAX_BATCHES = 2000
MAX_ROWS = 200_000  # requests in batches, summed
EPS_S = 1e-9


@dataclass(frozen=True, slots=True)
class Batch:
    """One batch of a plan. `predicted_s`: for the `tokens` in it, by request; it may end before `end_s`."""

    start_s: float
    end_s: float
    predicted_s: float
    tokens: dict[str, int]


@dataclass(frozen=True, slots=True)
class Miss:
    """What comes late: a prefill's last token, or a decode's next one. `done_s` None: not by the end."""

    id: str
    what: str
    due_s: float
    done_s: float | None


@dataclass(frozen=True, slots=True)
class Replay:
    """A plan carried out. `cut_off`: there were more batches than were asked for."""

    batches: tuple[Batch, ...]
    missed: tuple[Miss, ...]
    cut_off: bool


@dataclass(slots=True)
class _Decode:
    """Makes `slots` tokens at a time, due every `period_s`; `due_s` is the next time."""

    id: str
    due_s: float
    period_s: float
    slots: int
    context_tokens: int


@dataclass(slots=True)
class _Prefill:
    """`left` tokens to compute by `due_s`, none in a batch that begins before `from_s`; then it may decode."""

    id: str
    due_s: float
    left: int
    computed: int
    from_s: float
    decode: _Decode | None


@dataclass(slots=True)
class _Fill:
    """A batch that is being filled, up to `length_s`."""

    instance: Instance
    length_s: float
    draft_steps: int
    tokens: dict[str, int] = field(default_factory=dict)
    total: int = 0
    seqs: int = 0
    context_tokens: int = 0
    prefill_work: float = 0.0
    prefill_kv_tokens: int = 0

    def __post_init__(self) -> None:
        self.total = self.seqs = self.instance.late_seqs
        self.length_s -= self.instance.draft_step_s * self.draft_steps

    @property
    def predicted_s(self) -> float:
        """Seconds of the batch as it is, drafting included."""
        seconds = self.instance.cost.predict(
            self.total,
            seqs=self.seqs,
            context_tokens=self.context_tokens,
            prefill_work=self.prefill_work,
            draft_steps=self.draft_steps,
            prefill_kv_tokens=self.prefill_kv_tokens,
        )
        return seconds + (self.instance.draft_step_s * self.draft_steps if self.total else 0.0)

    def decode(self, decode: _Decode) -> bool:
        """Its next tokens, if they fit. Returns whether there is room for any token at all."""
        fits = self.instance.cost.tokens_in(
            self.length_s,
            seqs=self.seqs + 1,
            context_tokens=self.context_tokens + decode.context_tokens,
            prefill_work=self.prefill_work,
            draft_steps=self.draft_steps,
            prefill_kv_tokens=self.prefill_kv_tokens,
        )
        room = min(fits, self.instance.max_batch_tokens) - self.total
        if room < decode.slots:
            return room > 0
        self.tokens[decode.id] = decode.slots
        self.total += decode.slots
        self.seqs += 1
        self.context_tokens += decode.context_tokens
        return True

    def prefill(self, prefill: _Prefill) -> None:
        """As large a chunk of it as fits."""
        chunk = self.instance.cost.chunk_in(
            self.length_s,
            prefill.computed,
            tokens=self.total,
            seqs=self.seqs,
            context_tokens=self.context_tokens,
            prefill_work=self.prefill_work,
            draft_steps=self.draft_steps,
            prefill_kv_tokens=self.prefill_kv_tokens,
        )
        chunk = min(chunk, prefill.left, self.instance.max_batch_tokens - self.total)
        if chunk > 0:
            self.tokens[prefill.id] = chunk
            self.total += chunk
            self.seqs += 1
            self.prefill_work += chunk * (prefill.computed + chunk / 2)
            self.prefill_kv_tokens += prefill.computed
            prefill.left -= chunk
            prefill.computed += chunk


def replay(
    instance: Instance,
    plan: Plan,
    *,
    after_s: float = 0.0,
    max_batches: int = MAX_BATCHES,
    max_rows: int = MAX_ROWS,
) -> Replay:
    """Carry `plan` out until its last deadline, or the next token of each running decode, and `after_s` more.

    A plan that does not keep what was promised has no batches. At most `max_batches` are formed, with not
    many more than `max_rows` requests in all of them together.
    """
    if not plan.kept:
        return Replay((), (), cut_off=False)
    decodes, prefills = _works(instance, plan)
    works: list[_Decode | _Prefill] = [*decodes, *prefills]
    until_s = max((each.due_s for each in works), default=0.0) + after_s
    draft_steps = max(plan.depths.values(), default=1) - 1
    steady_s = _steady_s(instance, [*decodes, *(each.decode for each in prefills if each.decode)], draft_steps)
    missed: list[Miss] = []
    batches: list[Batch] = []
    rows = 0
    for formed, (start_s, end_s) in enumerate(_grid(plan, decodes, steady_s, until_s)):
        if formed >= max_batches or rows >= max_rows:
            return Replay(tuple(batches), tuple(missed), cut_off=True)
        fill = _Fill(instance, end_s - start_s, draft_steps)
        _pour(fill, decodes, prefills, start_s)
        missed += _pass(fill, decodes, prefills, end_s)
        rows += len(fill.tokens)
        if fill.tokens:
            batches.append(Batch(start_s, end_s, fill.predicted_s, fill.tokens))
    missed += [Miss(each.id, "prefill", each.due_s, None) for each in prefills if each.due_s <= until_s]
    missed += [Miss(each.id, "decode", each.due_s, None) for each in decodes if each.due_s < until_s - EPS_S]
    return Replay(tuple(batches), tuple(missed), cut_off=False)


def _works(instance: Instance, plan: Plan) -> tuple[list[_Decode], list[_Prefill]]:
    """What the plan owes at its start. A prefill without a token to compute is done."""
    tiers = {tier.name: at for at, tier in enumerate(instance.tiers)}

    def decode(id_: str, tier: str, due_s: float, context_tokens: int) -> _Decode:
        depth = plan.depths.get(tier, 1)
        period_s = step_period_s(instance, tiers[tier], depth)
        return _Decode(id_, due_s, period_s, depth, context_tokens)

    def after(prompt: Prefill | Newcomer) -> _Decode | None:
        if prompt.tier is None:
            return None
        joined = decode(prompt.id, prompt.tier, prompt.deadline_s, prompt.cached_tokens + prompt.tokens)
        joined.due_s += joined.period_s
        return joined

    asked: list[tuple[Prefill | Newcomer, float]] = [(prefill, 0.0) for prefill in instance.prefills]
    admitted = {newcomer.id: newcomer for newcomer in instance.newcomers if newcomer.id in plan.starts}
    asked += [(admitted[id_], instance.free_kv[start].at_s) for id_, start in plan.starts.items()]
    prefills = [
        _Prefill(each.id, each.deadline_s, each.tokens, each.cached_tokens, from_s, after(each))
        for each, from_s in asked
    ]
    decodes = [decode(each.id, each.tier, each.due_s, each.context_tokens) for each in instance.decodes]
    decodes += [each.decode for each in prefills if not each.left and each.decode]
    return decodes, [each for each in prefills if each.left]


def _steady_s(instance: Instance, decodes: list[_Decode], draft_steps: int) -> float:
    """The longest that a batch may take beside these decodes."""
    full_s = instance.cost.predict(instance.max_batch_tokens, draft_steps=draft_steps)
    return min([full_s + instance.draft_step_s * draft_steps, *(each.period_s for each in decodes)])


def _grid(plan: Plan, decodes: list[_Decode], steady_s: float, until_s: float) -> Iterator[tuple[float, float]]:
    """Start and end of each batch: within the stretches as they say, then at the steady length."""
    at_s = 0.0
    for stretch in plan.stretches:
        at_s = stretch.from_s
        for nth in range(1, stretch.count + 1):
            whole = nth == stretch.count and not stretch.short
            end_s = stretch.until_s if whole else stretch.from_s + nth * stretch.length_s
            yield at_s, end_s
            at_s = end_s
        if stretch.short:
            yield at_s, stretch.until_s
        at_s = stretch.until_s
    first_due_s = min((each.due_s for each in decodes), default=until_s)
    if not plan.stretches and first_due_s < steady_s - EPS_S:
        yield 0.0, first_due_s
        at_s = first_due_s
    while at_s + steady_s <= until_s + EPS_S:
        yield at_s, at_s + steady_s
        at_s += steady_s


def _pour(fill: _Fill, decodes: list[_Decode], prefills: list[_Prefill], start_s: float) -> None:
    """By due time, as much as fits; no decode twice."""
    works: list[_Decode | _Prefill] = [*decodes]
    works += [each for each in prefills if each.from_s <= start_s + EPS_S]
    for work in sorted(works, key=lambda each: each.due_s):
        if isinstance(work, _Prefill):
            fill.prefill(work)
        elif not fill.decode(work):
            break


def _pass(fill: _Fill, decodes: list[_Decode], prefills: list[_Prefill], end_s: float) -> Iterator[Miss]:
    """The batch has ended: next dues, and prefills that are done begin to decode. Yields what came late."""
    for decode in decodes:
        if decode.id in fill.tokens:
            if decode.due_s < end_s - EPS_S:
                yield Miss(decode.id, "decode", decode.due_s, end_s)
            decode.due_s += decode.period_s
            decode.context_tokens += decode.slots
    for done in [each for each in prefills if not each.left]:
        if done.due_s < end_s - EPS_S:
            yield Miss(done.id, "prefill", done.due_s, end_s)
        if done.decode is not None:
            decodes.append(done.decode)
        prefills.remove(done)
