"""The prefix directory: shared prefixes are found, salts keep apart, and belief is bounded."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from coordinator.prefixes import PrefixDirectory
from engine.prefix import PREFIX_BLOCK_TOKENS, prefix_hashes

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
