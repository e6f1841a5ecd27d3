"""What a peer is still to be sent: one message a step, bounded by the credit that the peer granted."""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.messages import Cancel, Delta, Promote, Release, Submit
from engine.request import work_id


@dataclass(slots=True)
class Outbox:
    """What a peer is still to be sent, bounded by the credit that it granted."""

    credit: int = 0
    deltas: list[Delta] = field(default_factory=list)

    def add(self, delta: Delta) -> None:
        """Queue a delta; tokens of one request that wait for credit become one delta."""
        if self.credit <= 0:
            for position in range(len(self.deltas) - 1, -1, -1):
                if attempt_key(self.deltas[position]) == attempt_key(delta):
                    merged = _merge(self.deltas[position], delta)
                    if merged is None:
                        break  # an older one must not get tokens that come after this one's
                    self.deltas[position] = merged
                    return
        self.deltas.append(delta)

    def forget(self, key: str) -> None:
        """Say nothing more about an attempt."""
        self.deltas = [delta for delta in self.deltas if attempt_key(delta) != key]


def attempt_key(message: Submit | Cancel | Release | Promote | Delta) -> str:
    """The id of the attempt that a message is about."""
    return work_id(message.request_id, message.attempt)


def _merge(old: Delta, new: Delta) -> Delta | None:
    if old.payload is not None or new.payload is not None:
        return None
    return Delta(
        request_id=old.request_id,
        attempt=old.attempt,
        index=old.index,
        token_ids=[*old.token_ids, *new.token_ids],
        finish_reason=new.finish_reason,
        stop_reason=new.stop_reason,
        cached_tokens=old.cached_tokens if old.cached_tokens is not None else new.cached_tokens,
        handoff=new.handoff,
        error=new.error,
        error_status=new.error_status,
        timing=old.timing or new.timing,
        account=new.account,
    )
