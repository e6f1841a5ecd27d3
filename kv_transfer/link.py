"""Measured links: fit a fixed part and a rate to transfer times, and keep the latest fit per pair."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from itertools import combinations
from statistics import median

from kv_transfer.base import Link, Pull, PullOutcome

Sample = tuple[int, float]  # bytes, seconds

SMALL_PROBE_BYTES = 4 << 10
LARGE_PROBE_BYTES = 8 << 20
_WINDOW = 32
_MIN_PULLS = 4
_MIN_RATE = 1.0


def _weighted_median(values: Iterable[tuple[float, float]]) -> float:
    """The value at which half of the weight is reached. `values` are (value, weight) pairs, at least one."""
    ordered = sorted(values)
    half = sum(weight for _, weight in ordered) / 2
    reached = 0.0
    for value, weight in ordered:
        reached += weight
        if reached >= half:
            return value
    return ordered[-1][0]


def fit_rate(samples: Sequence[Sample]) -> tuple[float, float] | None:
    """Latency (s) and rate (bytes/s) of `seconds = latency + bytes / rate`, or None if all sizes are alike.

    Theil-Sen: the median of the slopes between all pairs of samples, weighted by how far apart their sizes
    are, then the median of what is left. Up to 29 % of the samples may be arbitrarily slow without harm.
    """
    slopes = [
        ((t2 - t1) / (n2 - n1), float(abs(n2 - n1)))
        for (n1, t1), (n2, t2) in combinations(samples, 2)
        if n1 != n2
    ]
    if not slopes:
        return None
    seconds_per_byte = max(_weighted_median(slopes), 0.0)
    latency_s = max(median(seconds - size * seconds_per_byte for size, seconds in samples), 0.0)
    if seconds_per_byte == 0.0:
        return latency_s, max(size / max(seconds, 1e-9) for size, seconds in samples)
    return latency_s, max(1.0 / seconds_per_byte, _MIN_RATE)


def fit_link(source: str, target: str, samples: Sequence[Sample]) -> Link:
    """The link that fits `samples`. Raises ValueError if they do not differ in size."""
    fit = fit_rate(samples)
    if fit is None:
        raise ValueError(f"a link needs samples of at least two sizes, got {sorted({n for n, _ in samples})}")
    latency_s, bytes_per_s = fit
    return Link(source, target, latency_s, bytes_per_s)


class LinkTable:
    """The latest measure of every pair: latency from its probe, rate from the pulls since then."""

    def __init__(self) -> None:
        self._links: dict[tuple[str, str], Link] = {}
        self._pulls: dict[tuple[str, str], deque[Sample]] = {}

    def put(self, link: Link) -> None:
        """Take a new measure of a pair; what was known of it is forgotten."""
        pair = link.source, link.target
        self._links[pair] = link
        self._pulls[pair] = deque(maxlen=_WINDOW)

    def get(self, source: str, target: str) -> Link | None:
        """The link from `source` to `target`, None if it was never measured."""
        return self._links.get((source, target))

    def links(self) -> list[Link]:
        """All links."""
        return list(self._links.values())

    def drop(self, engine_id: str) -> None:
        """Forget an engine that is gone."""
        for pair in [pair for pair in self._links if engine_id in pair]:
            del self._links[pair], self._pulls[pair]

    def observe(self, target: str, pull: Pull) -> None:
        """Learn from a pull into `target`, if it moved anything over a link that was probed.

        Every pull counts by its bytes: a small one says little about the rate. A rate needs a few pulls to
        move, so that one pull in a slow step does not look like a slow link.
        """
        pair = pull.source, target
        link = self._links.get(pair)
        if link is None or pull.outcome is not PullOutcome.PULLED or pull.kv_bytes <= 0 or pull.seconds <= 0:
            return
        self._pulls[pair].append((pull.kv_bytes, pull.seconds))
        if len(self._pulls[pair]) < _MIN_PULLS:
            return
        rates = [
            # A latency that has shrunk since the probe must not make the rest of the time vanish.
            (size / max(seconds - link.latency_s, seconds / 2), float(size))
            for size, seconds in self._pulls[pair]
        ]
        self._links[pair] = Link(*pair, latency_s=link.latency_s, bytes_per_s=_weighted_median(rates))
