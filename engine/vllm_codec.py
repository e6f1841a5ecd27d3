"""vLLM's own types on our wire: sampling parameters to the node, logprobs back to the endpoint.

vLLM is imported on first use, so that whoever only passes the bytes on needs none of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from engine.base import Output
from engine.errors import ProtocolError

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine import EngineCoreOutput

INLINE_BYTES = 1 << 40  # vLLM sends larger arrays as frames of their own; we want one blob
REASONING = "slosserve_reasoning"
OURS = frozenset({"kv_transfer_params", REASONING})  # of the extra arguments of sampling
# What an output may carry besides tokens, reasons and counts.
PAYLOAD_FIELDS = ("new_logprobs", "new_prompt_logprobs_tensors", "prompt_token_id_logprobs")


def encode_sampling(params: SamplingParams, reasoning: Mapping[str, Any] | None = None) -> bytes:
    """Sampling parameters as vLLM's input processor left them, private fields included.

    `reasoning`: what the front knows of the thinking of this request, for its grammar: `reasoning_ended` and
    `reasoning_parser_kwargs` of vLLM's requests. Left out is what a client gives under names that are ours.
    """
    params = without_ours(params)
    if reasoning:
        params = params.clone()
        params.extra_args = {**(params.extra_args or {}), REASONING: dict(reasoning)}
    return _joined(_encoder().encode(params))


def decode_sampling(blob: bytes) -> tuple[SamplingParams, dict[str, Any]]:
    """The sampling parameters, and what is known of the thinking. Raises ProtocolError if the blob is none."""
    import msgspec

    try:
        params = _sampling_decoder().decode(blob)
    except (msgspec.MsgspecError, ValueError, TypeError) as error:
        raise ProtocolError(f"sampling parameters cannot be read: {error}") from error
    return without_ours(params), dict((params.extra_args or {}).get(REASONING) or {})


def without_ours(params: SamplingParams) -> SamplingParams:
    """The same parameters, or a copy without the extra arguments that are ours to set if they had any."""
    extra: dict[str, Any] | None = params.extra_args
    if not extra or OURS.isdisjoint(extra):
        return params
    params = params.clone()
    params.extra_args = {key: value for key, value in extra.items() if key not in OURS} or None
    return params


def encode_payload(output: EngineCoreOutput) -> bytes | None:
    """What an output holds besides tokens, reasons and counts: None in the common case."""
    if all(getattr(output, name) is None for name in PAYLOAD_FIELDS):
        return None
    return _joined(_encoder().encode({name: getattr(output, name) for name in PAYLOAD_FIELDS}))


def decode_output(output: Output, request_id: str) -> EngineCoreOutput:
    """vLLM's output for `request_id`, as its output processor wants it.

    Raises ProtocolError for a reason that vLLM does not know, or a payload that is none.
    """
    from vllm.v1.engine import EngineCoreOutput
    from vllm.v1.metrics.stats import PrefillStats

    reasons = _reasons()
    if output.finish_reason is not None and output.finish_reason not in reasons:
        raise ProtocolError(f"unknown finish reason {output.finish_reason!r}")
    decoded = EngineCoreOutput(
        request_id=request_id,
        new_token_ids=list(output.token_ids),
        finish_reason=None if output.finish_reason is None else reasons[output.finish_reason],
        stop_reason=output.stop_reason,
    )
    if output.cached_tokens is not None:
        decoded.prefill_stats = PrefillStats(num_cached_tokens=output.cached_tokens)
    if output.payload is not None:
        _add_payload(decoded, output.payload)
    return decoded


def _add_payload(decoded: EngineCoreOutput, payload: bytes) -> None:
    import msgspec

    try:
        fields = _payload_decoder().decode(bytearray(payload))  # torch warns of bytes, which nobody may write
    except (msgspec.MsgspecError, ValueError, TypeError) as error:
        raise ProtocolError(f"the payload of {decoded.request_id} cannot be read: {error}") from error
    for name in PAYLOAD_FIELDS:
        setattr(decoded, name, getattr(fields, name))


def _joined(frames: Any) -> bytes:
    (frame,) = frames
    return bytes(frame)


@cache
def _reasons() -> dict[str, Any]:
    from vllm.v1.engine import FinishReason

    return {str(reason): reason for reason in FinishReason}


@cache
def _encoder() -> Any:
    from vllm.v1.serial_utils import MsgpackEncoder

    return MsgpackEncoder(size_threshold=INLINE_BYTES)


@cache
def _sampling_decoder() -> Any:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.serial_utils import MsgpackDecoder

    return MsgpackDecoder(SamplingParams)


@cache
def _payload_decoder() -> Any:
    import msgspec
    import torch
    from vllm.v1.outputs import LogprobsLists, LogprobsTensors
    from vllm.v1.serial_utils import MsgpackDecoder

    types = (LogprobsLists | None, LogprobsTensors | None, torch.Tensor | None)
    fields = [(name, kind, None) for name, kind in zip(PAYLOAD_FIELDS, types, strict=True)]
    return MsgpackDecoder(msgspec.defstruct("Payload", fields), share_mem=False)
