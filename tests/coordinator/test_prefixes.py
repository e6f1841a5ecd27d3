"""The prefix directory: shared prefixes are found, salts keep apart, and belief is bounded."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.prefixes import UNTOLD_GRACE_S, PrefixDirectory
from engine.prefix import PREFIX_BLOCK_TOKENS, prefix_hashes
from engine.prefix_log import PrefixChanges

BLOCK = PREFIX_BLOCK_TOKENS


@given(st.integers(0, 4 * BLOCK), st.integers(0, 4 * BLOCK))
def test_what_two_prompts_share_is_found_in_whole_blocks(shared: int, apart: int) -> None:
    one, other = [7] * shared + [1] * apart, [7] * shared + [2] * apart
    directory = PrefixDirectory()
    directory.add("n", prefix_hashes(one), kv_tokens=10**6)
    assert directory.cached_tokens("n", prefix_hashes(other)) == shared // BLOCK * BLOCK
    assert directory.cached_tokens("elsewhere", prefix_hashes(other)) == 0


def test_equal_tokens_under_another_salt_are_another_prefix() -> None:
    tokens = [1] * BLOCK
    assert prefix_hashes(tokens) == prefix_hashes(tokens)
    assert prefix_hashes(tokens, "a") != prefix_hashes(tokens, "b")


def test_a_node_is_believed_to_hold_no_more_than_fits_the_oldest_forgotten_first() -> None:
    directory = PrefixDirectory()
    old, new = prefix_hashes([1] * 2 * BLOCK), prefix_hashes([2] * 2 * BLOCK)
    directory.add("n", old, kv_tokens=3 * BLOCK)
    directory.add("n", new, kv_tokens=3 * BLOCK)
    assert directory.cached_tokens("n", new) == 2 * BLOCK
    assert directory.cached_tokens("n", old) == BLOCK, "its end is forgotten before its beginning"
    directory.forget("n")
    assert directory.cached_tokens("n", new) == 0


def test_what_a_node_has_given_to_others_is_believed_no_more() -> None:
    directory, hashes = PrefixDirectory(), prefix_hashes([1] * 3 * BLOCK)
    directory.told("n", PrefixChanges(3, added=hashes), now_s=0.0)
    assert directory.cached_tokens("n", hashes) == 3 * BLOCK
    assert directory.holders(hashes) == {"n"}
    directory.told("n", PrefixChanges(5, gone=hashes[1:]), now_s=1.0)
    assert directory.cached_tokens("n", hashes) == BLOCK
    directory.told("n", PrefixChanges(9, whole=True), now_s=2.0)
    assert directory.holders(hashes) == set()


@pytest.mark.parametrize("whole", [False, True])
def test_what_a_request_left_is_believed_until_its_node_should_have_told_of_it(whole: bool) -> None:
    directory, mine, others = PrefixDirectory(), prefix_hashes([1] * 2 * BLOCK), prefix_hashes([2] * BLOCK)
    directory.told("n", PrefixChanges(1, added=others), now_s=0.0)
    directory.add("n", mine, kv_tokens=10**6, now_s=10.0)
    directory.told("n", PrefixChanges(2, whole, added=[*others, mine[0]]), now_s=10.1)
    assert directory.cached_tokens("n", mine) == 2 * BLOCK
    directory.told("n", PrefixChanges(2, whole, added=[*others, mine[0]]), now_s=10.1 + 2 * UNTOLD_GRACE_S)
    assert directory.cached_tokens("n", mine) == BLOCK, "the other was not there, or is gone"
    assert directory.cached_tokens("n", others) == BLOCK


def test_what_was_believed_before_a_node_told_anything_is_believed_for_a_while() -> None:
    directory, hashes = PrefixDirectory(), prefix_hashes([1] * BLOCK)
    directory.add("n", hashes, kv_tokens=10**6, now_s=0.0)
    directory.told("n", PrefixChanges(1), now_s=50.0)
    assert directory.cached_tokens("n", hashes) == BLOCK
    directory.told("n", PrefixChanges(1), now_s=50.0 + 2 * UNTOLD_GRACE_S)
    assert directory.cached_tokens("n", hashes) == 0
