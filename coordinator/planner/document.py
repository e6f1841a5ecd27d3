"""An admission problem and its answer as JSON, so that a decision can be asked for, dumped and replayed.

Times are seconds from the start of the plan, tokens whole numbers. What is wrong is said in one sentence that
begins with the path of the field: `newcomers[3].tier: unknown tier 'fast'; there are tight, loose`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from coordinator.planner.document_form import InstanceForm, contradictions
from coordinator.planner.instance import Decode, FreeKv, Instance, Newcomer, Prefill, Tier
from engine.cost import Piece, StepCost
from engine.errors import RequestError

if TYPE_CHECKING:
    from coordinator.planner.admission import Plan
    from coordinator.planner.replay import Replay

VERSION = 1
SHOWN_VALUE = 60  # characters of a wrong value


def schema() -> dict[str, Any]:
    """JSON schema of an instance."""
    return InstanceForm.model_json_schema()


def parse(text: str) -> Instance:
    """The instance in a JSON text. Raises RequestError with one sentence that says what is wrong, and where."""
    try:
        value = json.loads(text, object_pairs_hook=_without_doubles)
    except RecursionError:
        raise RequestError("not an instance: its JSON is nested too deep") from None
    except ValueError as error:
        raise RequestError(f"not JSON: {error}") from None
    return from_document(value)


def from_document(document: Any) -> Instance:
    """The instance in a decoded document, with tuples throughout. Raises RequestError as `parse` does."""
    try:
        form = InstanceForm.model_validate(document)
    except ValidationError as error:
        raise RequestError(_sentence(error)) from None
    for wrong in contradictions(form):
        raise RequestError(wrong)
    try:
        fields = form.cost.model_dump() | {
            "pieces": tuple(Piece(**each.model_dump()) for each in form.cost.pieces)
        }
        cost = StepCost(**fields)
    except ValueError as error:
        raise RequestError(f"cost: {error}") from None
    none = (0,) * len(form.free_kv)
    return Instance(
        cost=cost,
        max_batch_tokens=form.max_batch_tokens,
        tiers=tuple(Tier(name, tier.tpot_s, tier.acceptance) for name, tier in form.tiers.items()),
        decodes=tuple(Decode(**each.model_dump()) for each in form.decodes),
        prefills=tuple(Prefill(**each.model_dump()) for each in form.prefills),
        newcomers=tuple(
            Newcomer(
                **each.model_dump() | {"kv_tokens": none if each.kv_tokens is None else tuple(each.kv_tokens)}
            )
            for each in form.newcomers
        ),
        free_kv=tuple(FreeKv(**each.model_dump()) for each in form.free_kv),
        free_seqs=form.free_seqs,
        late_seqs=form.late_seqs,
        max_depth=form.max_depth,
        draft_step_s=form.draft_step_s,
        theta=form.theta,
    )


def to_document(instance: Instance) -> dict[str, Any]:
    """The instance as a document: `from_document` gives an equal one back (sequences as tuples)."""
    document = {"version": VERSION, **asdict(instance)}
    document["tiers"] = {
        tier.name: {"tpot_s": tier.tpot_s, "acceptance": tier.acceptance} for tier in instance.tiers
    }
    document["cost"]["pieces"] = list(document["cost"]["pieces"])
    document["decodes"] = [asdict(decode) for decode in instance.decodes]
    for name in ("prefills", "newcomers", "free_kv"):
        document[name] = list(document[name])
    for newcomer in document["newcomers"]:
        newcomer["kv_tokens"] = list(newcomer["kv_tokens"])
    return document


def answer(plan: Plan, replay: Replay | None = None) -> dict[str, Any]:
    """What a plan decides, as JSON, with the batches that carry it out where `replay` has them."""
    decided: dict[str, Any] = {
        "version": VERSION,
        "kept": plan.kept,
        "exact": plan.exact,
        "method": plan.method,
        "value": plan.value,
        "admitted": list(plan.admitted),
        "deferred": dict(plan.deferred),
        "kv_from_interval": dict(plan.starts),
        "depths": dict(plan.depths),
        "budget_left_tokens": plan.budget_left,
    }
    if replay is not None:
        decided["batches"] = [
            {
                "start_s": _rounded(batch.start_s),
                "end_s": _rounded(batch.end_s),
                "predicted_s": _rounded(batch.predicted_s),
                "tokens": dict(batch.tokens),
            }
            for batch in replay.batches
        ]
        decided["missed"] = [asdict(miss) for miss in replay.missed]
        decided["batches_cut_off"] = replay.cut_off
    return decided


def _rounded(seconds: float) -> float:
    """To the nanosecond: sums of batch lengths carry the rounding of floats."""
    return round(seconds, 9)


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the field {_shown(twice)} stands twice in one object")
    return found


def _sentence(error: ValidationError) -> str:
    """The first error, as `path: what is wrong, not VALUE`."""
    first = error.errors(include_url=False)[0]
    where = _path(first["loc"])
    if first["type"] == "missing":
        return f"{where}: this field is missing"
    if first["type"] == "extra_forbidden":
        return f"{where}: there is no such field"
    said = first["msg"][0].lower() + first["msg"][1:]
    return f"{where}: {said}, not {_shown(first['input'])}"


def _path(parts: Sequence[int | str]) -> str:
    path = ""
    for part in parts:
        path += f"[{part}]" if isinstance(part, int) else f".{_clipped(part)}"
    return path.removeprefix(".") or "instance"


def _shown(value: Any) -> str:
    if isinstance(value, dict | list):
        return f"an object of {len(value)} fields" if isinstance(value, dict) else f"a list of {len(value)}"
    return _clipped(repr(value))


def _clipped(text: str) -> str:
    return text if len(text) <= SHOWN_VALUE else f"{text[:SHOWN_VALUE]}..."
