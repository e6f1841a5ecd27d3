"""The links between nodes: probed when a node appears, then learned from the pulls over them; or given."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import Any, Protocol

from kv_transfer.base import Link, Pull
from kv_transfer.link import LinkTable

Pair = tuple[str, str]


class KnownLinks(Protocol):
    """What the coordinator asks of links, by the names of nodes."""

    def node_is(self, name: str, engine_id: str) -> None:
        """The engine that a node is now."""

    def forget(self, name: str) -> None:
        """A node is gone for good."""

    def unmeasured(self, names: Iterable[str]) -> list[Pair]:
        """Pairs of these nodes, source and target, that are still to be probed."""

    def measured(self, links: Iterable[Link]) -> None:
        """Take probes."""

    def failed(self, target: str, errors: Mapping[str, str]) -> None:
        """Probes that failed, by the name of their source."""

    def try_failed_again(self) -> None:
        """What failed counts as never tried."""

    def observe(self, target: str, pulls: Iterable[Pull]) -> None:
        """Learn from pulls into a node."""

    def by_name(self) -> Mapping[Pair, Link]:
        """The link of each pair of nodes."""

    def rows(self) -> list[dict[str, Any]]:
        """For people: every link, and why those that have none have none."""


class AnyLink(Mapping[Pair, Link]):
    """The same link between any two nodes. Names no pair: there are too many."""

    def __init__(self, latency_s: float, bytes_per_s: float) -> None:
        self._latency_s = latency_s
        self._bytes_per_s = bytes_per_s

    def __getitem__(self, pair: Pair) -> Link:
        return Link(*pair, self._latency_s, self._bytes_per_s)

    def __iter__(self) -> Iterator[Pair]:
        return iter(())

    def __len__(self) -> int:
        return 0


class GivenLinks:
    """Links of virtual nodes, as configured: nothing to measure, and of a thousand nodes a million."""

    def __init__(self, latency_s: float, bytes_per_s: float) -> None:
        self._any = AnyLink(latency_s, bytes_per_s)

    def node_is(self, name: str, engine_id: str) -> None:
        """Its links are those of any other."""

    def forget(self, name: str) -> None:
        """Nothing is known of it alone."""

    def unmeasured(self, names: Iterable[str]) -> list[Pair]:
        """None."""
        return []

    def measured(self, links: Iterable[Link]) -> None:
        """Nothing is asked for."""

    def failed(self, target: str, errors: Mapping[str, str]) -> None:
        """Nothing is asked for."""

    def try_failed_again(self) -> None:
        """Nothing is asked for."""

    def observe(self, target: str, pulls: Iterable[Pull]) -> None:
        """Pulls take what the link says."""

    def by_name(self) -> Mapping[Pair, Link]:
        """The link of each pair."""
        return self._any

    def rows(self) -> list[dict[str, Any]]:
        """One row stands for all."""
        return [asdict(self._any["any", "any"])]


class MeasuredLinks:
    """Links by the names of nodes. A node that has started anew is another engine: its links are forgotten."""

    def __init__(self) -> None:
        self._table = LinkTable()
        self._engine_of: dict[str, str] = {}
        self._errors: dict[Pair, str] = {}
        self._seen: dict[str, frozenset[str]] = {}  # by target: pulls of its last report
        self._by_name: dict[Pair, Link] = {}

    def node_is(self, name: str, engine_id: str) -> None:
        """The engine that a node is now."""
        if self._engine_of.get(name) == engine_id:
            return
        self.forget(name)
        self._engine_of[name] = engine_id

    def forget(self, name: str) -> None:
        """A node is gone for good, or is another engine now."""
        engine_id = self._engine_of.pop(name, None)
        if engine_id is not None:
            self._table.drop(engine_id)
        self._seen.pop(name, None)
        self._errors = {pair: text for pair, text in self._errors.items() if name not in pair}
        self._refresh()

    def unmeasured(self, names: Iterable[str]) -> list[Pair]:
        """Pairs of these nodes, source and target, that were never tried."""
        present = list(names)
        return [
            (source, target)
            for target in present
            for source in present
            if source != target
            and (source, target) not in self._by_name
            and (source, target) not in self._errors
        ]

    def measured(self, links: Iterable[Link]) -> None:
        """Take probes."""
        for link in links:
            self._table.put(link)
        self._refresh()

    def failed(self, target: str, errors: Mapping[str, str]) -> None:
        """Probes that failed, by the name of their source."""
        self._errors.update({(source, target): text for source, text in errors.items()})

    def try_failed_again(self) -> None:
        """What failed counts as never tried."""
        self._errors.clear()

    def observe(self, target: str, pulls: Iterable[Pull]) -> None:
        """Learn from pulls into a node. Reports repeat the last ones: each counts once."""
        told = list(pulls)
        seen = self._seen.get(target, frozenset())
        new = [pull for pull in told if pull.request_id not in seen]
        if not new:
            return
        self._seen[target] = frozenset(pull.request_id for pull in told)
        for pull in new:
            self._table.observe(self._engine_of[target], pull)
        self._refresh()

    def by_name(self) -> Mapping[Pair, Link]:
        """The link of each pair of nodes."""
        return self._by_name

    def rows(self) -> list[dict[str, Any]]:
        """For people: every link, and why those that have none have none."""
        failed = [
            {"source": source, "target": target, "error": text}
            for (source, target), text in self._errors.items()
        ]
        return [asdict(link) for link in self._by_name.values()] + failed

    def _refresh(self) -> None:
        name_of = {engine_id: name for name, engine_id in self._engine_of.items()}
        self._by_name = {
            pair: Link(*pair, link.latency_s, link.bytes_per_s)
            for link in self._table.links()
            if link.source in name_of and link.target in name_of
            for pair in [(name_of[link.source], name_of[link.target])]
        }
