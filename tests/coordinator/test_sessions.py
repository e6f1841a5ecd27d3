"""The directory of sessions: where a history is, how much of a prompt it covers, and when it is gone."""

from __future__ import annotations

import pytest

from coordinator.sessions import MOST_SESSIONS, UNLISTED_GRACE_S, SessionDirectory
from engine.prefix import PREFIX_BLOCK_TOKENS, prefix_hashes

BLOCK = PREFIX_BLOCK_TOKENS
HISTORY = prefix_hashes([1] * 4 * BLOCK)


@pytest.fixture
def directory() -> SessionDirectory:
    directory = SessionDirectory()
    directory.answered("s", "d0", HISTORY, 4 * BLOCK, now_s=0.0)
    return directory


def test_the_next_call_finds_as_much_of_its_history_as_it_goes_on_from(directory: SessionDirectory) -> None:
    longer = prefix_hashes([1] * 4 * BLOCK + [2] * BLOCK)
    other = prefix_hashes([1] * 2 * BLOCK + [3] * 9 * BLOCK)
    assert directory.home("s") == "d0"
    assert directory.cached_tokens("d0", "s", longer) == 4 * BLOCK
    assert directory.cached_tokens("d0", "s", other) == 2 * BLOCK, "histories diverge"
    assert directory.cached_tokens("d0", "s", prefix_hashes([9] * 9 * BLOCK)) == 0
    assert directory.cached_tokens("d1", "s", longer) == 0
    assert directory.cached_tokens("d0", None, longer) == 0
    assert directory.cached_tokens("d0", "another", longer) == 0


def test_of_a_prompt_that_is_all_there_the_part_of_a_block_counts_too() -> None:
    directory = SessionDirectory()
    prompt = [1] * (BLOCK + 100)
    directory.answered("s", "d0", prefix_hashes(prompt), len(prompt), now_s=0.0)
    assert directory.cached_tokens("d0", "s", prefix_hashes([*prompt, *[2] * BLOCK])) == BLOCK + 100
    assert directory.cached_tokens("d0", "s", prefix_hashes([3] * 9 * BLOCK)) == 0
    short = SessionDirectory()
    short.answered("s", "d0", [], 100, now_s=0.0)
    assert short.cached_tokens("d0", "s", prefix_hashes([1] * 9 * BLOCK)) == 100


def test_where_a_later_call_ends_is_the_new_home(directory: SessionDirectory) -> None:
    assert directory.answered("s", "d1", HISTORY, 4 * BLOCK, now_s=1.0) == "d0", "which can forget it"
    assert directory.answered("s", "d1", HISTORY, 4 * BLOCK, now_s=2.0) is None
    assert directory.home("s") == "d1"
    directory.listed("d0", {"s": 64}, now_s=9.0)
    assert directory.home("s") == "d1", "d0 has nothing to say of it any more"


def test_one_call_beside_the_history_leaves_it_where_it_is(directory: SessionDirectory) -> None:
    title = prefix_hashes([1] * 20 + [5] * BLOCK)
    assert directory.answered("s", "d1", title, BLOCK + 20, now_s=1.0) == "d1", "which has nothing to keep"
    assert directory.home("s") == "d0"
    assert directory.cached_tokens("d0", "s", HISTORY) == 4 * BLOCK
    assert directory.answered("s", "d0", title, BLOCK + 20, now_s=2.0) is None
    assert directory.cached_tokens("d0", "s", HISTORY) == 0, "a second one goes on: the history was cut short"


def test_a_history_that_is_cut_short_at_its_end_is_the_history(directory: SessionDirectory) -> None:
    directory.answered("s", "d1", HISTORY[:1], BLOCK, now_s=1.0)
    assert directory.home("s") == "d1"


def test_what_a_node_no_longer_lists_is_gone_but_for_a_call_that_has_just_ended(
    directory: SessionDirectory,
) -> None:
    assert not directory.listed("d0", {}, now_s=UNLISTED_GRACE_S / 2), "it is to be asked again"
    assert directory.home("s") == "d0"
    assert directory.listed("d0", {}, now_s=2 * UNLISTED_GRACE_S)
    assert directory.home("s") is None


def test_no_more_is_counted_on_than_the_node_keeps(directory: SessionDirectory) -> None:
    directory.listed("d0", {"s": BLOCK}, now_s=5.0)
    assert directory.cached_tokens("d0", "s", HISTORY) == BLOCK
    assert directory.kept_tokens("s") == BLOCK


def test_a_directory_that_begins_anew_learns_the_homes_from_the_nodes() -> None:
    directory = SessionDirectory()
    directory.listed("d0", {"s": 4 * BLOCK}, now_s=0.0)
    assert directory.home("s") == "d0"
    assert directory.cached_tokens("d0", "s", HISTORY[:2]) == 2 * BLOCK, "the prompt goes on from it, one hopes"
    assert directory.cached_tokens("d0", "s", [*HISTORY, 7]) == 4 * BLOCK


def test_a_closed_session_and_those_of_a_node_that_began_anew_are_forgotten(
    directory: SessionDirectory,
) -> None:
    directory.answered("t", "d1", HISTORY, 4 * BLOCK, now_s=0.0)
    assert directory.close("s", now_s=1.0) == "d0"
    assert directory.close("s", now_s=1.0) is None
    directory.listed("d0", {"s": 64}, now_s=1.0 + UNLISTED_GRACE_S / 2)
    assert directory.home("s") is None, "the list is from before"
    directory.forget("d1")
    assert directory.home("t") is None
    assert len(directory) == 0


def test_the_directory_is_bounded(directory: SessionDirectory) -> None:
    for at in range(MOST_SESSIONS):
        directory.answered(f"s{at}", "d0", [], 0, now_s=1.0)
    assert len(directory) == MOST_SESSIONS
    assert directory.home("s") is None


def test_lists_of_nodes_are_bounded_too() -> None:
    directory = SessionDirectory()
    directory.listed("d0", {f"s{at}": 64 for at in range(MOST_SESSIONS + 5)}, now_s=0.0)
    assert len(directory) == MOST_SESSIONS
    directory.forget("d0")
    assert len(directory) == 0
