"""Which prefixes an engine's cache holds, and what has changed: for those who follow it from afar."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

MOST_CHANGES = 4096  # who has missed more is told all


@dataclass(frozen=True, slots=True)
class PrefixChanges:
    """From an earlier version to this one. `whole`: `added` is all that is held."""

    version: int
    whole: bool = False
    added: list[int] = field(default_factory=list)
    gone: list[int] = field(default_factory=list)


class PrefixLog:
    """Names (engine.prefix) of the prefixes that a cache holds. Every change makes another version."""

    def __init__(self) -> None:
        self.version = 0
        self._held: set[int] = set()
        self._changes: deque[tuple[int, bool]] = deque(maxlen=MOST_CHANGES)

    def __contains__(self, name: int) -> bool:
        return name in self._held

    def __len__(self) -> int:
        return len(self._held)

    def add(self, names: Iterable[int]) -> None:
        """These are held now."""
        for name in names:
            if name not in self._held:
                self._held.add(name)
                self._note(name, held=True)

    def discard(self, names: Iterable[int]) -> None:
        """These are held no more; names that were not are ignored."""
        for name in names:
            if name in self._held:
                self._held.remove(name)
                self._note(name, held=False)

    def clear(self) -> None:
        """Nothing is held any more."""
        if self._held:
            self._held.clear()
            self._changes.clear()
            self.version += 1

    def since(self, version: int) -> PrefixChanges:
        """What has changed since then; all that is held, where that is not known any more."""
        behind = self.version - version
        if not 0 <= behind <= len(self._changes):
            return PrefixChanges(self.version, whole=True, added=list(self._held))
        latest = dict(list(self._changes)[len(self._changes) - behind :])
        added = [name for name, held in latest.items() if held]
        return PrefixChanges(self.version, added=added, gone=[name for name in latest if not latest[name]])

    def _note(self, name: int, *, held: bool) -> None:
        self.version += 1
        self._changes.append((name, held))
