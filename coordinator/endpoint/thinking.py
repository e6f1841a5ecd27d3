"""Where the thinking of a model ends, by vLLM's reasoning parsers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engine.errors import ConfigError

USUAL_END = "</think>"
# A template that lets a model not think ends its prompt with thinking that is empty. Further up, the end of
# thinking is of an earlier turn.
TAIL_TOKENS = 16


class Thinking:
    """Of one model. `parser`: vLLM's name of its reasoning parser; without one only the usual end is known.

    Raises ConfigError for a parser that vLLM does not have, or that does not suit the model.
    """

    def __init__(self, tokenizer: Any, parser: str | None) -> None:
        self._parser = None if parser is None or tokenizer is None else _made(parser, tokenizer)
        end = getattr(self._parser, "reasoning_end_str", None) or USUAL_END
        vocabulary = {} if tokenizer is None else tokenizer.get_vocab()
        end_id = vocabulary.get(end)
        self.end_id: int | None = None if end_id is None else int(end_id)

    def is_over(self, prompt_token_ids: Sequence[int]) -> bool:
        """Whether it ends in the prompt already: the answer follows at once."""
        tail = list(prompt_token_ids[-TAIL_TOKENS:])
        return self._parser is not None and bool(self._parser.is_reasoning_end(tail))


def _made(parser: str, tokenizer: Any) -> Any:
    from vllm.reasoning import ReasoningParserManager

    try:
        return ReasoningParserManager.get_reasoning_parser(parser)(tokenizer)
    except (KeyError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"endpoint.reasoning_parser: {parser!r} does not do for this model: {error}"
        ) from error
