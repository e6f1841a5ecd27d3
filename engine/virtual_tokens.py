"""What a virtual engine says: tokens that follow from the tokens before them, and from nothing else.

So a work gets the same tokens alone or among others, after a preemption, handed over, or resumed elsewhere
with what was said so far as part of its prompt. One number stands for all tokens up to a place (engine.prefix);
the next token is a hash of it, and full blocks of equal prefixes have equal names.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from engine.errors import ProtocolError
from engine.prefix import mixed, name_of, number_after, numbers_of_blocks, salt_number

_MAGIC = b"virtual/1 "
# Of a vocabulary: pieces of characters stand at its bottom and control tokens at its top, and a detokenizer
# holds back the one and drops the other.
_SAID_FROM, _SAID_TO = 1 / 8, 7 / 8


class VirtualSampling(msgspec.Struct, frozen=True):
    """How a virtual engine samples. `stop_after`: it ends by itself after so many tokens; None: never."""

    stop_after: int | None = None

    def encode(self) -> bytes:
        """For `Work.sampling`."""
        return _MAGIC + msgspec.msgpack.encode(self)

    @classmethod
    def decode(cls, blob: bytes) -> VirtualSampling:
        """What `encode` gave. vLLM's own encoding says nothing that a virtual engine could follow: the default.

        Raises ProtocolError for a blob that begins as ours and is none.
        """
        if not blob.startswith(_MAGIC):
            return cls()
        try:
            return msgspec.msgpack.decode(blob[len(_MAGIC) :], type=cls)
        except msgspec.MsgspecError as error:
            raise ProtocolError(f"sampling of a virtual engine cannot be read: {error}") from error


class Said:
    """All tokens of a work so far, as numbers (engine.prefix): of the whole, and the name of each full block
    of `block_tokens`.
    """

    __slots__ = ("_block_tokens", "_count", "_salted", "blocks", "number")

    def __init__(self, prompt: Sequence[int], block_tokens: int, salt: str | None = None) -> None:
        self._block_tokens = block_tokens
        self._count = len(prompt)
        self._salted = salt_number(salt)
        numbers = numbers_of_blocks(0, prompt, block_tokens)
        self.blocks = [name_of(number, self._salted) for number in numbers]
        self.number = numbers[-1] if numbers else 0
        for token in prompt[len(numbers) * block_tokens :]:
            self.number = number_after(self.number, token)

    def add(self, token: int) -> None:
        """One token more."""
        self.number = number_after(self.number, token)
        self._count += 1
        if self._count % self._block_tokens == 0:
            self.blocks.append(name_of(self.number, self._salted))

    def next(self, vocab_size: int) -> int:
        """The token that follows, which is not added."""
        first = int(vocab_size * _SAID_FROM)
        choices = max(int(vocab_size * _SAID_TO) - first, 1)
        return first + (mixed(self.number) * choices >> 64)
