"""The prefill role: earliest-deadline chunked prefill with no pace to keep, KV offered at the end."""

from __future__ import annotations

from engine.request import RoleName, WorkKind
from engine.role import Role


class PrefillRole(Role):
    """Takes prefills only. Streams that were here before a change of role are finished at their pace."""

    name = RoleName.PREFILL
    kinds = frozenset({WorkKind.PREFILL})
