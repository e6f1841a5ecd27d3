"""Checks of lease words: one small read per pull, after the last byte of KV has arrived."""

from __future__ import annotations

import time
from dataclasses import dataclass
from enum import Enum
from typing import Any

from kv_transfer.nixl_agent import is_under_way
from kv_transfer.nixl_memory import NUM_WORDS, WORD_BYTES, SideMemory

# A word takes about 20 us over shared memory and TCP (README); a later poll would wait for a whole batch.
_SPIN_S = 500e-6


class Verdict(Enum):
    """What a lease word said."""

    STANDS = "stands"
    LOST = "lost"
    FAILED = "failed"


@dataclass(slots=True)
class _Check:
    slot: int
    nonce: int
    handle: Any


class WordChecks:
    """Checks under way on one target. The agent is NIXL's."""

    def __init__(self, memory: SideMemory, agent: Any) -> None:
        self._memory = memory
        self._agent = agent
        self._free = list(range(NUM_WORDS - 1, -1, -1))
        self._open: dict[str, _Check] = {}
        self._abandoned: list[_Check] = []

    def __contains__(self, key: object) -> bool:
        return key in self._open

    def start(self, key: str, peer_agent: str, word_address: int, nonce: int) -> None:
        """Read a peer's lease word. Raises what NIXL raises if the peer is gone."""
        if not self._free:
            raise RuntimeError("every landing word waits for a peer that does not answer")
        slot = self._free.pop()
        self._memory.landing[slot] = 0
        local = self._agent.get_xfer_descs([(self._memory.landing_address(slot), WORD_BYTES, 0)], "DRAM")
        remote = self._agent.get_xfer_descs([(word_address, WORD_BYTES, 0)], "DRAM")
        try:
            handle = self._agent.initialize_xfer("READ", local, remote, peer_agent)
        except Exception:
            self._free.append(slot)
            raise
        check = _Check(slot, nonce, handle)
        try:
            self._agent.transfer(handle)
        except Exception:
            self._abandoned.append(check)
            raise
        self._open[key] = check

    def abandon(self, key: str) -> None:
        """Give a check up. Its landing word is not used again before the read is over."""
        if check := self._open.pop(key, None):
            self._abandoned.append(check)

    def poll(self) -> dict[str, tuple[Verdict, str]]:
        """Verdicts that have come, with a word on failures. Waits a moment for those still under way."""
        verdicts: dict[str, tuple[Verdict, str]] = {}
        give_up_s = time.perf_counter() + _SPIN_S
        while self._open:
            for key, check in list(self._open.items()):
                if (verdict := self._look(check)) is not None:
                    verdicts[key] = verdict
                    del self._open[key]
                    self._abandoned.append(check)
            if time.perf_counter() >= give_up_s:
                break
        self._abandoned = [check for check in self._abandoned if not self._recycle(check)]
        return verdicts

    def _look(self, check: _Check) -> tuple[Verdict, str] | None:
        try:
            state = self._agent.check_xfer_state(check.handle)
        except Exception as error:  # noqa: BLE001 - NIXL has one exception class per status
            return Verdict.FAILED, f"the lease word could not be read: {error}"
        if state == "PROC":
            return None
        if state != "DONE":
            return Verdict.FAILED, f"the lease word could not be read: {state}"
        if int(self._memory.landing[check.slot]) == check.nonce:
            return Verdict.STANDS, ""
        return Verdict.LOST, "the lease had ended when the bytes were in"

    def _recycle(self, check: _Check) -> bool:
        """Whether the check's landing word is free again."""
        if is_under_way(self._agent, check.handle):
            return False
        try:
            self._agent.release_xfer_handle(check.handle)
        except Exception:  # noqa: BLE001 - kept for the next poll
            return False
        self._free.append(check.slot)
        return True
