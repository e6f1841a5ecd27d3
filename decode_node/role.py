"""The decode role: due tokens first, KV taken in; and the mixed role, which also prefills."""

from __future__ import annotations

from engine.request import RoleName, WorkKind
from engine.role import Role


class DecodeRole(Role):
    """Takes decodes, and whole requests: what one node must serve alone is served where it decodes."""

    name = RoleName.DECODE
    kinds = frozenset({WorkKind.DECODE, WorkKind.WHOLE})


class MixedRole(DecodeRole):
    """Takes everything: a colocated replica."""

    name = RoleName.MIXED
    kinds = frozenset(WorkKind)
