"""SLOs as clients write them: classes, numbers, and malformed values that cost nobody a 500."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.config import SloClass
from coordinator.endpoint.slo import BODY_FIELDS, read_asked, to_slo
from engine.cost import StepCost

CLASSES = {
    "chatbot": SloClass(ttft_scale=5, tpot_ms=100),
    "reasoning": SloClass(ttft_scale=3, tpot_ms=100, thinking_tpot_ms=50),
    "floored": SloClass(ttft_scale=5, tpot_ms=100, ttft_floor_ms=400),
}
COST = StepCost.line(base_s=0.025, per_token_s=0.0001)


def test_a_class_scales_the_time_of_a_prefill_alone() -> None:
    slo = to_slo(read_asked({"class": "chatbot"}, CLASSES), CLASSES, 1000, COST, 2048)
    assert slo is not None
    assert slo.ttft_s == pytest.approx(5 * (0.025 + 0.1))
    assert slo.tpot_s == pytest.approx(0.1)


def test_a_floor_bounds_what_a_small_model_is_held_to() -> None:
    slo = to_slo(read_asked({"class": "floored"}, CLASSES), CLASSES, 10, COST, 2048)
    assert slo is not None
    assert slo.ttft_s == pytest.approx(0.4)


def test_numbers_override_the_class() -> None:
    asked = read_asked({"class": "reasoning", "ttft_ms": "250", "thinking_tpot_ms": 30}, CLASSES)
    slo = to_slo(asked, CLASSES, 10, COST, 2048)
    assert slo is not None
    assert (slo.ttft_s, slo.tpot_s, slo.thinking_tpot_s) == (0.25, 0.1, 0.03)


def test_the_last_call_of_a_loop_has_the_pace_at_which_it_is_read() -> None:
    classes = {"tool": SloClass(tpot_ms=50, last_tpot_ms=100), "plain": SloClass(tpot_ms=50)}

    def tpot_s(**fields: Any) -> float:
        slo = to_slo(read_asked(fields, classes), classes, 10, COST, 2048)
        assert slo is not None
        return slo.tpot_s

    assert tpot_s(**{"class": "tool"}) == 0.05
    assert tpot_s(**{"class": "tool", "call": "loop"}) == 0.05
    assert tpot_s(**{"class": "tool", "call": "last"}) == 0.1
    assert tpot_s(**{"class": "tool", "call": "last", "tpot_ms": 70}) == 0.07
    assert tpot_s(**{"class": "plain", "call": "last"}) == 0.05


def test_a_deadline_for_a_loop_is_an_slo() -> None:
    asked = read_asked({"loop_ms": "20000", "loop_calls": "3"}, CLASSES)
    assert (asked.loop_ms, asked.loop_calls, asked.empty) == (20_000.0, 3, False)


def test_no_slo_is_best_effort_and_no_error() -> None:
    asked = read_asked({}, CLASSES)
    assert asked.empty
    assert asked.malformed is None
    assert to_slo(asked, CLASSES, 10, COST, 2048) is None


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"ttft_ms": "soon"}, "ttft_ms is 'soon'"),
        ({"tpot_ms": -1}, "tpot_ms is -1"),
        ({"tpot_ms": True}, "tpot_ms is True"),
        ({"ttft_ms": "nan"}, "ttft_ms"),
        ({"class": "chatbto"}, "unknown class 'chatbto'"),
        ({"klass": "chatbot"}, "unknown field 'klass'"),
        ({"on_miss": "cry"}, "on_miss is 'cry'"),
        ({"call": "first"}, "call is 'first'"),
        ({"loop_ms": "soon"}, "loop_ms is 'soon'"),
        ({"loop_calls": 0}, "loop_calls is 0"),
        ({"loop_calls": 1.5}, "loop_calls is 1.5"),
        ({"loop_calls": True}, "loop_calls is True"),
    ],
)
def test_a_malformed_value_is_lowest_urgency_and_is_explained(fields: dict[str, Any], words: str) -> None:
    asked = read_asked(fields, CLASSES)
    assert asked.malformed is not None
    assert words in asked.malformed
    assert to_slo(asked, CLASSES, 10, COST, 2048) is None


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from(sorted(BODY_FIELDS)) | st.text(), JSON, max_size=5))
def test_nothing_a_client_sends_raises(fields: dict[str, Any]) -> None:
    asked = read_asked(fields, CLASSES)
    if asked.malformed is None:
        to_slo(asked, CLASSES, 10, COST, 2048)
