"""Links: the fit finds latency and rate, outliers do no harm, and pulls keep it fresh."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.base import Link, Pull, PullOutcome
from kv_transfer.link import LinkTable, fit_link, fit_rate

SIZES = (4 << 10, 512 << 10, 8 << 20)


@given(st.floats(0.0, 0.1), st.floats(1e6, 1e11))
def test_the_fit_finds_latency_and_rate(latency_s: float, bytes_per_s: float) -> None:
    link = fit_link("p", "d", [(size, latency_s + size / bytes_per_s) for size in SIZES for _ in range(4)])
    assert link.bytes_per_s == pytest.approx(bytes_per_s, rel=1e-3)
    assert link.latency_s == pytest.approx(latency_s, rel=1e-3, abs=1e-8)


def test_one_slow_read_in_four_does_not_move_the_fit() -> None:
    samples = [(size, 1e-3 + size / 1e9) for size in SIZES for _ in range(4)]
    for spoilt in (0, 5, 10):
        samples[spoilt] = samples[spoilt][0], 0.5
    link = fit_link("p", "d", samples)
    assert link.bytes_per_s == pytest.approx(1e9, rel=0.05)
    assert link.latency_s == pytest.approx(1e-3, rel=0.3)


def test_a_link_is_never_faster_than_no_time() -> None:
    latency_s, bytes_per_s = fit_rate([(4096, 0.01), (1 << 20, 0.001)]) or (0.0, 0.0)
    assert latency_s >= 0
    assert bytes_per_s > 0


def test_samples_of_one_size_are_no_link() -> None:
    with pytest.raises(ValueError, match="at least two sizes"):
        fit_link("p", "d", [(4096, 0.1), (4096, 0.2)])


def _pull(kv_bytes: int, seconds: float, outcome: PullOutcome = PullOutcome.PULLED) -> Pull:
    return Pull("r", "p", outcome, kv_bytes, seconds)


def test_the_table_follows_a_link_that_became_slow() -> None:
    table = LinkTable()
    table.put(Link("p", "d", latency_s=1e-3, bytes_per_s=1e9))
    for step in range(64):
        size = (1 + step % 8) << 20
        table.observe("d", _pull(size, 1e-3 + size / 1e8))
    link = table.get("p", "d")
    assert link is not None
    assert link.bytes_per_s == pytest.approx(1e8, rel=0.05)


def test_the_table_follows_pulls_of_one_size() -> None:
    table = LinkTable()
    table.put(Link("p", "d", latency_s=1e-3, bytes_per_s=1e9))
    for _ in range(64):
        table.observe("d", _pull(1 << 20, 1e-3 + (1 << 20) / 1e8))
    link = table.get("p", "d")
    assert link is not None
    assert link.bytes_per_s == pytest.approx(1e8, rel=0.05)


def test_one_slow_pull_is_not_a_slow_link() -> None:
    table = LinkTable()
    table.put(Link("p", "d", latency_s=1e-3, bytes_per_s=1e9))
    for seconds in (1.0, 1e-3 + (1 << 20) / 1e9, 1e-3 + (1 << 20) / 1e9, 1e-3 + (1 << 20) / 1e9):
        table.observe("d", _pull(1 << 20, seconds))
    link = table.get("p", "d")
    assert link is not None
    assert link.bytes_per_s == pytest.approx(1e9, rel=0.05)


def test_failed_pulls_and_unknown_links_teach_nothing() -> None:
    table = LinkTable()
    table.observe("d", _pull(1 << 20, 1.0))
    assert table.links() == []
    table.put(Link("p", "d", latency_s=1e-3, bytes_per_s=1e9))
    table.observe("d", _pull(1 << 20, 9.0, PullOutcome.LATE))
    table.observe("d", _pull(0, 9.0))
    assert table.get("p", "d") == Link("p", "d", 1e-3, 1e9)
    table.drop("p")
    assert table.links() == []
