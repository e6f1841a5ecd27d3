"""Which features of a request a prefill/decode pair serves (the table in kv_transfer/README.md).

The prefill node samples the first token with the client's own parameters, and the decode node goes on after it
as after what was said elsewhere, so all that acts on sampling works on a pair. What needs the prompt's own
logits, or several sequences over one pulled prompt, stays on one node.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

from engine.errors import RequestError

if TYPE_CHECKING:
    from vllm import SamplingParams


class ServedBy(StrEnum):
    """Who can serve a request."""

    PAIR = "pair"
    ONE_NODE = "one node"


def served_by(params: SamplingParams, *, pairs: bool = True, virtual: bool = False) -> ServedBy:
    """Without `pairs` everything stays on one node.

    Raises RequestError for what nobody serves: a client's own `kv_transfer_params`, logprobs where no model
    runs (`virtual`).
    """
    if params.extra_args and "kv_transfer_params" in params.extra_args:
        raise RequestError(
            "kv_transfer_params is not accepted: the cluster decides where KV is moved; leave the field out"
        )
    if virtual and (params.logprobs is not None or params.prompt_logprobs is not None):
        raise RequestError("the engines of this cluster are virtual and have no logprobs; leave the field out")
    if not pairs or params.n > 1 or params.prompt_logprobs is not None:
        return ServedBy.ONE_NODE
    return ServedBy.PAIR
