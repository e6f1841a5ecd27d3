"""Tokens beside those of stock vLLM: what is asked, and what is called equal."""

from __future__ import annotations

import numpy as np

from benchmarks.real.tokens import DRAFTS, KV_TOKENS, compared, configuration, questions


def test_an_answer_that_differs_in_one_token_or_in_length_is_not_equal() -> None:
    found = compared([[1, 2, 3], [4, 5], [6, 7, 8]], [[1, 2, 3], [4, 9], [6, 7]])
    assert (found["prompts"], found["equal"], found["tokens"]) == (3, 1, 8)
    assert found["differing"] == [
        {"prompt": 1, "first_other_token": 1, "tokens": [2, 2]},
        {"prompt": 2, "first_other_token": None, "tokens": [3, 2]},
    ]


def test_prompts_repeat_themselves_and_no_two_are_alike() -> None:
    config = configuration("scale", "float32")
    bodies = questions(config, "scale", 50, np.random.default_rng(1))
    assert len({tuple(body["prompt"]) for body in bodies}) == 50
    for body in bodies:
        assert len(body["prompt"]) < 40 or len(set(body["prompt"])) < len(body["prompt"])
        assert (body["temperature"], body["return_token_ids"]) == (0, True)


def test_memory_is_short_in_either_type_and_both_nodes_draft() -> None:
    for dtype, value_bytes in (("float32", 4), ("bfloat16", 2)):
        engine = configuration("scale", dtype).engine
        assert engine.kv_cache_gib == KV_TOKENS * 2 * 12 * 4 * 64 * value_bytes / 2**30
        assert engine.speculative is not None
        assert engine.speculative["num_speculative_tokens"] == DRAFTS
