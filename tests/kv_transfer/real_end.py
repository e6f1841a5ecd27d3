"""One end of a pair of real engines over the tiny model, for a process of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kv_transfer.base import Handoff, Lease, Link, PeerAddress, Pull
from kv_transfer.nixl_exchange import find_exchange
from tests.engine.replica import Drive, prompt, running_engine, work

LEASE_S = 3.0
NUM_BLOCKS = 64


class RealEnd:
    """A vLLM engine with our connector, stepped by hand."""

    def __init__(self, engine_id: str, side_channel_port: int) -> None:
        self._engine_id = engine_id
        self._running = running_engine(
            engine_id, num_blocks=NUM_BLOCKS, lease_s=LEASE_S, side_channel_port=side_channel_port
        )
        self._engine = self._running.__enter__()
        self._drive = Drive(self._engine)

    def generate(
        self, work_id: str, token_ids: Sequence[int], max_tokens: int, handoff: Handoff | None = None
    ) -> tuple[list[int], list[Pull]]:
        """The tokens of a prompt, from pulled KV if there is a handoff, and the pulls that ended."""
        self._drive.submit(work(work_id, token_ids, max_tokens, handoff=handoff, pull_deadline_s=20.0))
        while work_id not in self._drive.finished:
            self._drive.step()
        return self._drive.tokens[work_id], self._engine.kv.take_pulls()

    def offer(self, work_id: str, token_ids: Sequence[int]) -> Handoff:
        """Prefill and offer."""
        self._drive.submit(work(work_id, token_ids, 1, offer_kv=True))
        while work_id not in self._drive.finished:
            self._drive.step()
        self._drive.step()
        handoff = self._drive.finished[work_id].handoff
        assert handoff is not None
        return handoff

    def compute_other_things(self) -> None:
        """Let every block of the cache hold something else."""
        self._engine.reset_prefix_cache()
        for seed in range(4):
            self._drive.submit(work(f"other-{seed}", prompt(NUM_BLOCKS * 8, 1000 + seed), 2))
            while f"other-{seed}" not in self._drive.finished:
                self._drive.step()

    @property
    def _worker(self) -> Any:
        exchange = find_exchange(self._engine_id)
        assert exchange is not None
        return exchange.worker

    def flip_a_bit(self, block: int) -> None:
        """In one word of one layer of the KV of a block."""
        import torch

        last = list(self._worker.device_kv_caches.values())[-1]
        words = last[block].view(torch.int32)
        words[(0,) * (words.ndim - 1)][7] ^= 1 << 23

    def scramble(self, blocks: Sequence[int]) -> None:
        """Let each of these blocks hold what the next one held, as if ids were mixed up."""
        for cache in self._worker.device_kv_caches.values():
            cache[list(blocks)] = cache[[*blocks[1:], blocks[0]]]

    def forget(self) -> bool:
        """Forget cached prefixes."""
        return self._engine.reset_prefix_cache()

    def settle(self) -> int:
        """Step until nothing is left to do. Blocks in use then."""
        while self._engine.has_work():
            self._drive.step()
        return self._engine.usage().used_blocks

    def leases(self) -> list[Lease]:
        return self._engine.kv.leases()

    def release(self, work_id: str) -> bool:
        return self._engine.kv.release(work_id)

    def address(self) -> PeerAddress:
        return self._engine.kv.address()

    def probe(self, peer: PeerAddress) -> Link:
        return self._engine.kv.probe(peer)
