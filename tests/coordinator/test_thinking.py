"""Where thinking ends: by the parser of the model, and not by what an earlier turn has thought."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoTokenizer

from coordinator.endpoint.thinking import TAIL_TOKENS, Thinking
from engine.errors import ConfigError
from engine.models import make_model

pytest.importorskip("vllm")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(make_model("tiny"))


def test_a_prompt_that_ends_with_empty_thinking_has_an_answer_that_begins_at_once(tokenizer: Any) -> None:
    vocabulary = tokenizer.get_vocab()
    begin, end = vocabulary["<think>"], vocabulary["</think>"]
    thinking = Thinking(tokenizer, "deepseek_r1")
    assert thinking.end_id == end
    assert thinking.is_over([5, 6, begin, end, 9])
    assert not thinking.is_over([5, 6, begin])
    assert not thinking.is_over([begin, end, *range(100, 100 + TAIL_TOKENS)]), "that was an earlier turn"


def test_without_a_parser_the_usual_end_is_known_and_every_answer_may_think(tokenizer: Any) -> None:
    thinking = Thinking(tokenizer, None)
    assert thinking.end_id == tokenizer.get_vocab()["</think>"]
    assert not thinking.is_over([thinking.end_id])
    assert Thinking(None, None).end_id is None


def test_a_parser_that_there_is_not_is_told(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match=r"endpoint\.reasoning_parser: 'deepsek'"):
        Thinking(tokenizer, "deepsek")
