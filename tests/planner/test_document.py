"""An instance as JSON: what goes out comes back, and what is wrong is named by its place."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.planner import document
from coordinator.planner.admission import Plan, solve
from coordinator.planner.instance import Decode, Instance, Newcomer, Tier
from coordinator.planner.replay import replay
from engine.cost import Piece, StepCost
from engine.errors import RequestError
from tests.planner.instances import Case, cases

VALID: dict[str, Any] = {
    "version": 1,
    "cost": {"pieces": [{"base_s": 0.02, "per_token_s": 1e-4}]},
    "max_batch_tokens": 1000,
    "tiers": {"tight": {"tpot_s": 0.05}, "loose": {"tpot_s": 0.1, "acceptance": 0.7}},
    "decodes": [{"id": "d0", "tier": "tight", "due_s": 0.05}],
    "prefills": [{"id": "p0", "tokens": 100, "deadline_s": 0.3, "tier": None}],
    "newcomers": [
        {"id": "n0", "tokens": 200, "deadline_s": 0.5, "tier": "loose", "kv_tokens": [300, 400], "value": 2},
        {"id": "n1", "tokens": 200, "deadline_s": 0.5, "tier": "tight"},
    ],
    "free_kv": [{"at_s": 0, "tokens": 1000}, {"at_s": 0.2, "tokens": 2000}],
}
seconds = st.floats(0, 1e3)
costs = st.builds(
    StepCost,
    st.lists(st.builds(Piece, seconds, st.floats(1e-9, 1.0), seconds), min_size=1, max_size=3).map(tuple),
    per_context_token_s=seconds,
    per_prefill_work_s=seconds,
    per_seq_s=seconds,
    per_prefill_kv_token_s=seconds,
    drift=st.floats(0.2, 5),
)


def changed(path: str, value: Any) -> dict[str, Any]:
    """The valid document with one field at a dotted path set."""
    copy = json.loads(json.dumps(VALID))
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    inner = copy
    for part in parents:
        inner = inner[part]
    inner[last] = value
    return copy


def wrong(value: Any) -> str:
    """What is said of a document. JSON carries NaN and infinity here as Python writes them."""
    with pytest.raises(RequestError) as caught:
        document.parse(json.dumps(value))
    said = str(caught.value)
    assert "\n" not in said
    return said


@given(cases(), costs, st.integers(0, 9), st.integers(1, 10), st.floats(0.1, 1), seconds)
def test_an_instance_comes_back_from_json_as_it_was(
    case: Case, cost: StepCost, late: int, depth: int, theta: float, draft_s: float
) -> None:
    instance = replace(
        case.instance(), cost=cost, late_seqs=late, max_depth=depth, theta=theta, draft_step_s=draft_s
    )
    assert document.parse(json.dumps(document.to_document(instance))) == instance


def test_what_is_left_out_is_as_in_an_instance() -> None:
    least = {name: VALID[name] for name in ("version", "cost", "max_batch_tokens", "tiers")}
    tiers = (Tier("tight", 0.05), Tier("loose", 0.1, 0.7))
    assert document.from_document(least) == Instance(StepCost.line(0.02, 1e-4), 1000, tiers)
    filled = document.from_document(VALID)
    assert filled.newcomers[1] == Newcomer("n1", 200, 0.5, "tight", (0, 0))
    assert filled.decodes == (Decode("d0", "tight", 0.05),)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("newcomers.1.tier", "fast", "newcomers[1].tier: unknown tier 'fast'; there are tight, loose"),
        ("decodes.0.tier", "fast", "decodes[0].tier: unknown tier 'fast'"),
        ("decodes.0.tier", None, "decodes[0].tier: input should be a valid string, not None"),
        ("newcomers.0.deadline_s", -0.1, "newcomers[0].deadline_s: input should be greater than or equal to 0"),
        ("newcomers.0.deadline_s", float("nan"), "newcomers[0].deadline_s: input should be a finite number"),
        ("newcomers.0.deadline_s", float("inf"), "newcomers[0].deadline_s: input should be"),
        ("newcomers.0.deadline_s", "1", "newcomers[0].deadline_s: input should be a valid number, not '1'"),
        ("newcomers.0.deadline_s", True, "newcomers[0].deadline_s: input should be a valid number, not True"),
        ("decodes.0.due_s", -1, "decodes[0].due_s: "),
        ("newcomers.0.tokens", 1.5, "newcomers[0].tokens: input should be a valid integer, not 1.5"),
        ("prefills.0.tokens", -1, "prefills[0].tokens: "),
        ("prefills.0.tokens", 10**30, "prefills[0].tokens: "),
        ("newcomers.0.value", 0, "newcomers[0].value: input should be greater than 0, not 0"),
        ("newcomers.1.id", "n0", "newcomers[1].id: 'n0' is the id of newcomers[0] already"),
        ("newcomers.1.id", "d0", "newcomers[1].id: 'd0' is the id of decodes[0] already"),
        ("newcomers.1.id", "", "newcomers[1].id: "),
        ("newcomers.0.kv_tokens", [1], "newcomers[0].kv_tokens: 1 numbers for the 2 intervals of free_kv"),
        ("newcomers.0.kv_tokens", [1, -1], "newcomers[0].kv_tokens[1]: "),
        ("newcomers.0.priority", 1, "newcomers[0].priority: there is no such field"),
        ("free_kv.0.at_s", 0.1, "free_kv[0].at_s: the first interval begins at 0, not 0.1"),
        ("free_kv.1.at_s", 0, "free_kv[1].at_s: 0 is not after the interval before it, 0"),
        ("free_kv", [], "free_kv: "),
        ("tiers.tight.tpot_s", 0, "tiers.tight.tpot_s: "),
        ("tiers.loose.acceptance", 1.1, "tiers.loose.acceptance: "),
        ("tiers", [], "tiers: input should be a valid dictionary, not a list of 0"),
        ("cost.pieces", [], "cost.pieces: "),
        ("cost.pieces.0.per_token_s", -1e-4, "cost.pieces[0].per_token_s: "),
        ("cost.pieces.0.per_token_s", 0, "cost: a step cannot cost the same for any "),
        ("cost.drift", 0, "cost.drift: "),
        ("max_batch_tokens", 0, "max_batch_tokens: "),
        ("free_seqs", -1, "free_seqs: "),
        ("max_depth", 11, "max_depth: "),
        ("theta", 0, "theta: "),
        ("version", 2, "version: input should be 1, not 2"),
        ("newcomers", {}, "newcomers: input should be a valid list, not an object of 0 fields"),
        ("newcomers.0", None, "newcomers[0]: "),
    ],
)
def test_what_is_wrong_is_named_by_its_place(path: str, value: Any, said: str) -> None:
    assert wrong(changed(path, value)).startswith(said)


def test_a_missing_field_is_named() -> None:
    assert wrong({name: VALID[name] for name in VALID if name != "cost"}) == "cost: this field is missing"
    assert (
        wrong(changed("decodes.0", {"id": "d0", "tier": "tight"})) == "decodes[0].due_s: this field is missing"
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not JSON: "),
        ("{", "not JSON: "),
        ("9" * 5000, "not JSON: "),
        ("[" * 100_000, "not an instance: its JSON is nested too deep"),
        ("[]", "instance: "),
        ("null", "instance: "),
        ('{"version": 1, "version": 1}', "not JSON: the field 'version' stands twice"),
    ],
)
def test_what_is_no_document_is_refused(text: str, said: str) -> None:
    with pytest.raises(RequestError) as caught:
        document.parse(text)
    assert str(caught.value).startswith(said)


def test_a_problem_that_would_take_for_ever_is_refused() -> None:
    assert "batches until the last deadline" in wrong(changed("newcomers.0.deadline_s", 90_000))
    many = [{"id": f"d{at}", "tier": "tight", "due_s": 0.05} for at in range(10_000)]
    long = changed("newcomers.0.deadline_s", 1000) | {"decodes": many}
    assert wrong(long).startswith("decodes: 200")
    crowd = [{"id": f"x{at}", "tokens": 1, "deadline_s": 1} for at in range(20_001)]
    assert wrong(changed("newcomers", crowd)).startswith("newcomers: ")


def test_ten_thousand_newcomers_get_an_answer() -> None:
    crowd = [
        {
            "id": f"x{at}",
            "tokens": 100 + at,
            "deadline_s": 0.2 + at * 1e-5,
            "tier": "loose",
            "kv_tokens": [9, 9],
        }
        for at in range(10_000)
    ]
    instance = document.from_document(changed("newcomers", crowd))
    plan = solve(instance, why=False)
    assert len(plan.admitted) + len(plan.deferred) == 10_000
    assert plan.admitted
    assert not plan.exact
    assert replay(instance, plan).missed == ()


def test_an_answer_has_what_was_decided_and_the_batches() -> None:
    instance = document.from_document(VALID)
    plan = solve(instance)
    without = document.answer(plan)
    assert without["admitted"] == ["n0", "n1"]
    assert (without["kept"], without["exact"], without["value"]) == (True, True, 3.0)
    assert "batches" not in without
    answer = document.answer(plan, replay(instance, plan))
    assert json.loads(json.dumps(answer)) == answer
    assert answer["missed"] == []
    made = [batch["tokens"].get("p0", 0) for batch in answer["batches"]]
    assert sum(made) == 100


def test_an_answer_says_when_promises_cannot_be_kept() -> None:
    lost = Plan(False, (), {"n0": "what was promised earlier cannot all be kept"}, 0.0, True, "none", 0)
    assert document.answer(lost)["kept"] is False


def test_the_schema_knows_every_field_of_an_instance() -> None:
    schema = document.schema()
    assert set(schema["properties"]) == {"version", *Instance.__dataclass_fields__}
    assert schema["additionalProperties"] is False
    assert set(schema["required"]) == {"version", "cost", "max_batch_tokens", "tiers"}
