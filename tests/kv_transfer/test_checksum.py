"""The checksum of a block: what it must tell apart, and that every device says the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from kv_transfer import checksum  # noqa: E402
from kv_transfer.checksum import BlockSums, Plane, plane, weights  # noqa: E402

LAYERS, BLOCKS, WORDS = 3, 6, 40
ALL = [list(range(BLOCKS))]


def _kv(seed: int) -> Any:
    """KV of every kind: random words in some blocks, few distinct ones in others."""
    words = np.random.default_rng(seed)
    kv = words.integers(-(2**31), 2**31, (LAYERS, BLOCKS, WORDS), dtype=np.int64)
    kv[:, BLOCKS // 2 :] = words.integers(0, 2, (LAYERS, BLOCKS - BLOCKS // 2, WORDS)) << 31
    return torch.from_numpy(kv.astype(np.int32))


def _sums(kv: Any) -> list[int]:
    (sums,) = BlockSums([Plane(layer) for layer in kv]).of(ALL)
    return sums


seeds = st.integers(0, 2**32 - 1)
layers = st.integers(0, LAYERS - 1)
blocks = st.integers(0, BLOCKS - 1)
words = st.integers(0, WORDS - 1)


@settings(max_examples=300, deadline=None)
@given(seeds, layers, blocks, words, st.integers(0, 31))
def test_a_flipped_bit_shows_in_its_block_and_in_no_other(
    seed: int, layer: int, block: int, word: int, bit: int
) -> None:
    kv = _kv(seed)
    before = _sums(kv)
    kv[layer, block, word] ^= -(2**31) if bit == 31 else 1 << bit
    after = _sums(kv)
    assert [place for place in range(BLOCKS) if before[place] != after[place]] == [block]


@settings(max_examples=100, deadline=None)
@given(seeds, st.lists(blocks, min_size=2, max_size=2, unique=True))
def test_exchanged_blocks_show(seed: int, pair: list[int]) -> None:
    kv = _kv(seed)
    one, other = pair
    assume(bool((kv[:, one] != kv[:, other]).any()))
    before = _sums(kv)
    kv[:, [one, other]] = kv[:, [other, one]]
    after = _sums(kv)
    assert after[one] == before[other] != before[one]


@settings(max_examples=100, deadline=None)
@given(seeds, blocks, st.lists(layers, min_size=2, max_size=2, unique=True))
def test_exchanged_layers_show(seed: int, block: int, pair: list[int]) -> None:
    kv = _kv(seed)
    one, other = pair
    assume(bool((kv[one, block] != kv[other, block]).any()))
    before = _sums(kv)
    kv[[one, other], block] = kv[[other, one], block]
    assert _sums(kv)[block] != before[block]


@settings(max_examples=100, deadline=None)
@given(seeds, layers, blocks, st.lists(words, min_size=2, max_size=2, unique=True))
def test_exchanged_words_show(seed: int, layer: int, block: int, pair: list[int]) -> None:
    kv = _kv(seed)
    one, other = pair
    assume(bool(kv[layer, block, one] != kv[layer, block, other]))
    before = _sums(kv)
    kv[layer, block, [one, other]] = kv[layer, block, [other, one]]
    assert _sums(kv)[block] != before[block]


@settings(max_examples=100, deadline=None)
@given(seeds, layers, blocks, st.integers(0, WORDS - 1))
def test_a_block_that_is_zero_from_somewhere_on_shows(seed: int, layer: int, block: int, word: int) -> None:
    kv = _kv(seed)
    assume(bool(kv[layer, block, word:].any()))
    before = _sums(kv)
    kv[layer, block, word:] = 0
    assert _sums(kv)[block] != before[block]


@pytest.mark.parametrize("bit", [0, 15, 31])
@pytest.mark.parametrize("flipped", [2, 3, WORDS])
def test_a_bit_that_flips_in_many_words_shows(bit: int, flipped: int) -> None:
    kv = _kv(0)
    before = _sums(kv)
    kv[1, 2, :flipped] ^= -(2**31) if bit == 31 else 1 << bit
    assert _sums(kv)[2] != before[2]


@settings(max_examples=50, deadline=None)
@given(seeds, st.lists(blocks, max_size=2 * BLOCKS))
def test_the_order_of_blocks_is_that_of_the_question(seed: int, asked: list[int]) -> None:
    kv = _kv(seed)
    (sums,) = BlockSums([Plane(layer) for layer in kv]).of([asked])
    everything = _sums(kv)
    assert sums == [everything[block] for block in asked]


@pytest.mark.parametrize("chunk_words", [1, 3 * WORDS, 1 << 20])
def test_what_other_devices_compute_is_what_a_cpu_computes(
    monkeypatch: pytest.MonkeyPatch, chunk_words: int
) -> None:
    kv = _kv(1)
    on_cpu = _sums(kv)
    monkeypatch.setattr(checksum, "_SUMS", {})
    monkeypatch.setattr(checksum, "_CHUNK_WORDS", chunk_words)
    assert _sums(kv) == on_cpu


def test_a_group_has_the_layers_that_are_its_own_or_everybodys() -> None:
    kv = _kv(2)
    sums = BlockSums([Plane(kv[0], 0), Plane(kv[1], 1), Plane(kv[2])])
    before = sums.of([[0, 1], [2]])
    kv[0, 2] += 1  # of the first group, and asked of the second
    assert sums.of([[0, 1], [2]]) == before
    kv[2, 2] += 1
    after = sums.of([[0, 1], [2]])
    assert after[0] == before[0]
    assert after[1] != before[1]
    assert sums.of([[], [2]]) == [[], after[1]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8])
def test_a_plane_is_a_view_of_the_cache_itself(dtype: Any) -> None:
    cache = torch.zeros((BLOCKS, 2, 8), dtype=dtype)
    block_bytes = cache[0].nbytes
    lower = cache[:, 1]  # what one of two layers that share their blocks has
    half = plane(lower, lower.data_ptr(), BLOCKS, block_bytes // 2, block_bytes, group=0)
    assert half.words.shape == (BLOCKS, block_bytes // 8)
    before = BlockSums([half]).of(ALL)
    cache[3, 0] = 1
    assert BlockSums([half]).of(ALL) == before
    cache[3, 1, 7] = 1
    assert BlockSums([half]).of(ALL) != before


def test_blocks_that_are_not_made_of_words_are_refused() -> None:
    cache = torch.zeros((BLOCKS, 3), dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="32-bit words"):
        plane(cache, cache.data_ptr(), BLOCKS, 6, 6, group=0)


def test_weights_do_not_change() -> None:
    """Nodes of two versions must agree; and a weight of 0 would see nothing."""
    assert [*weights(0, 3).tolist(), *weights(1, 1).tolist()] == [1601549301, 587505277, 1946140839, 1055614955]
    assert weights(7, 100_000).min() > 0
