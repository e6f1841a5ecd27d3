"""The comparison of two servers: its arithmetic, and a window against a real socket."""

from __future__ import annotations

import json

import httpx
import numpy as np
import pytest
from sse_server import SseServer, running

from benchmarks.endpoint import CELLS, Cell, compare, headline
from benchmarks.window import Load, Window, measure
from engine.errors import EngineError

CELL = Cell("tiny", 1, 2)


def _window(ttft_ms: float, tokens_per_s: float) -> Window:
    return Window((ttft_ms / 1e3, ttft_ms / 1e3), int(tokens_per_s * 10), 10.0)


def test_added_time_and_ratio_of_pairs() -> None:
    pairs = [
        (_window(12, 90), _window(10, 100)),
        (_window(13, 99), _window(11, 100)),
        (_window(14, 95), _window(12, 100)),
    ]
    result = compare(CELL, pairs)
    assert result["ttft_added_p50_ms"] == pytest.approx(2.0)
    assert result["ttft_added_p99_ms"] == pytest.approx(2.0)
    assert result["tokens_per_s_ratio"] == pytest.approx(0.95)
    assert result["spread"]["tokens_per_s_ratio_by_pair"]["min"] == pytest.approx(0.90)
    assert result["ours"]["ttft_p50_ms"] == pytest.approx(13.0)
    assert result["direct"]["requests"] == 6


def test_the_headline_is_the_worst_cell() -> None:
    good, slow = (
        compare(CELL, [(_window(11, 99), _window(10, 100))]),
        compare(CELL, [(_window(15, 98), _window(10, 100))]),
    )
    result = headline([good, slow])
    assert result["ttft_added_p50_ms"] == pytest.approx(5.0)
    assert result["tokens_per_s_ratio"] == pytest.approx(0.98)
    assert result["targets"]["ttft_added_p50_ms"]["met"] is False
    assert result["targets"]["tokens_per_s_ratio"]["met"] is True


def test_every_promised_cell_is_measured() -> None:
    assert {(cell.model, cell.streams) for cell in CELLS} == {
        (model, streams) for model in ("tiny", "scale") for streams in (1, 32)
    }


def test_a_load_is_named_by_its_seed_and_never_repeats_a_prompt() -> None:
    first, again = (Load.draw("m", 4, 3, np.random.default_rng(1)) for _ in range(2))
    assert first == again
    bodies = [json.loads(body) for stream in first.streams for body in stream]
    beginnings = {" ".join(body["prompt"].split()[:4]) for body in bodies}
    assert len(beginnings) == 12
    assert len(first.delays_s) == 4


async def test_a_window_counts_tokens_and_time() -> None:
    with running(SseServer(token_delay_s=0.005)) as server:
        load = Load.draw("m", 2, 2, np.random.default_rng(1))
        async with httpx.AsyncClient(base_url=server.base_url) as client:
            window = await measure(client, load)
    expected = sum(json.loads(body)["max_tokens"] for stream in load.streams for body in stream)
    assert window.tokens == expected
    assert len(window.ttft_s) == 4
    assert all(0.004 < ttft_s < 0.2 for ttft_s in window.ttft_s)
    assert window.seconds > 2 * 40 * 0.005


@pytest.mark.parametrize("fault", ["refuse", "truncate"])
async def test_a_failed_request_is_never_a_measurement(fault: str) -> None:
    with running(SseServer(fault=fault)) as server:
        load = Load.draw("m", 1, 1, np.random.default_rng(1))
        async with httpx.AsyncClient(base_url=server.base_url) as client:
            with pytest.raises(EngineError):
                await measure(client, load)
