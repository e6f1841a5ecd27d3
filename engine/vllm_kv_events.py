"""vLLM's KV events, read where they are made: which prefixes its cache holds.

vLLM tells of every block that it begins to find by its hash, with the tokens and the block before it, and of
every one that it gives to others. It hands them to a publisher after each step; this stands in its place.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored

from engine.prefix import PREFIX_BLOCK_TOKENS, name_of, numbers_of_blocks, salt_number
from engine.prefix_log import PrefixLog


@dataclass(frozen=True, slots=True)
class _Block:
    """A block that vLLM can find: where it ends, the number of all tokens up to there, names within it."""

    end_tokens: int
    number: int
    salted: int
    names: tuple[int, ...]


class KvEvents:
    """Keeps a `PrefixLog` true, and hands everything on to `publisher`, whom somebody else may listen to.

    Has the methods of vLLM 0.32's `EventPublisher` that its scheduler calls.
    """

    def __init__(self, publisher: Any) -> None:
        self.log = PrefixLog()
        self._publisher = publisher
        self._blocks: dict[Hashable, _Block] = {}

    def publish(self, batch: Any) -> None:
        """Take note of a `KVEventBatch`."""
        self._publisher.publish(batch)
        for event in batch.events:
            match event:
                case BlockStored():
                    self._stored(event)
                case BlockRemoved():
                    for block_hash in event.block_hashes:
                        block = self._blocks.pop(block_hash, None)
                        if block is not None:
                            self.log.discard(block.names)
                case AllBlocksCleared():
                    self.clear()

    def clear(self) -> None:
        """The cache is empty; vLLM tells of it only after its next step."""
        self._blocks.clear()
        self.log.clear()

    def get_publisher_config(self) -> Any:
        """Where the publisher publishes, if it does."""
        return self._publisher.get_publisher_config()

    def shutdown(self) -> None:
        """Close the publisher."""
        self._publisher.shutdown()

    def _stored(self, event: BlockStored) -> None:
        """Blocks that follow on one another. What is more than text of the one model, and all after it, has no
        name here."""
        extra_keys = [*(event.extra_keys or ()), *([None] * len(event.block_hashes))]
        before = self._blocks.get(event.parent_block_hash) if event.parent_block_hash is not None else _ROOT
        size = event.block_size
        for at, (block_hash, extra) in enumerate(zip(event.block_hashes, extra_keys, strict=False)):
            match extra:
                case [str(salt)] if before is _ROOT and event.lora_name is None:
                    before = _Block(0, 0, salt_number(salt), ())
                case [_, *_]:
                    return
            if before is None:
                return
            before = _following(before, event.token_ids[at * size : (at + 1) * size])
            self._blocks[block_hash] = before
            self.log.add(before.names)


_ROOT = _Block(0, 0, 0, ())


def _following(before: _Block, token_ids: Sequence[int]) -> _Block:
    """A block of these tokens after another."""
    number, names, at, rest = before.number, [], before.end_tokens, token_ids
    while rest:
        piece = rest[: PREFIX_BLOCK_TOKENS - at % PREFIX_BLOCK_TOKENS]
        number = numbers_of_blocks(number, piece, len(piece))[-1]
        at, rest = at + len(piece), rest[len(piece) :]
        if at % PREFIX_BLOCK_TOKENS == 0:
            names.append(name_of(number, before.salted))
    return _Block(at, number, before.salted, tuple(names))
