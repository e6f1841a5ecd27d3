"""Lease words: a word holds its number exactly as long as the blocks hold the offer's KV."""

from __future__ import annotations

import numpy as np
import pytest

from kv_transfer.nixl_memory import NUM_WORDS, Offers, PeerMemory


def test_a_word_is_zero_before_the_blocks_are_free() -> None:
    words = np.zeros(4, dtype=np.uint64)
    offers = Offers(words)
    offer = offers.open("a", num_blocks=3)
    assert offer is not None
    assert int(words[offer.slot]) == offer.nonce != 0
    assert offers.withdraw("a")
    assert int(words[offer.slot]) == 0
    assert "a" in offers  # its blocks are still held
    assert offers.get("a") is None
    offers.close("a")
    assert "a" not in offers


def test_the_next_offer_in_a_slot_has_another_number() -> None:
    offers = Offers(np.zeros(1, dtype=np.uint64))
    first = offers.open("a", 1)
    offers.close("a")
    second = offers.open("b", 1)
    assert first is not None
    assert second is not None
    assert first.slot == second.slot
    assert first.nonce != second.nonce


def test_without_a_free_word_there_is_no_offer() -> None:
    offers = Offers(np.zeros(1, dtype=np.uint64))
    assert offers.open("a", 1) is not None
    assert offers.open("b", 1) is None
    offers.close("a")
    assert offers.open("b", 1) is not None


def test_withdrawing_and_closing_are_safe_to_repeat() -> None:
    offers = Offers(np.zeros(2, dtype=np.uint64))
    offers.open("a", 1)
    assert offers.withdraw("a")
    assert not offers.withdraw("a")
    offers.close("a")
    offers.close("a")
    assert not offers.withdraw("a")
    assert [offers.open(name, 1) is not None for name in "bcd"] == [True, True, False]


def test_a_slot_outside_the_peers_table_is_refused() -> None:
    memory = PeerMemory(words_address=1000, num_words=NUM_WORDS, probe_address=0, probe_bytes=0)
    assert memory.word_address(2) == 1016
    with pytest.raises(IndexError, match="outside the peer's table"):
        memory.word_address(NUM_WORDS)
