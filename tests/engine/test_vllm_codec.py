"""vLLM's types cross our wire unchanged, private fields included."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams
from vllm.v1.engine import EngineCoreOutput, FinishReason
from vllm.v1.outputs import LogprobsLists, LogprobsTensors

from engine.base import Output
from engine.errors import EngineStartError, ProtocolError
from engine.vllm import VllmEngine, VllmEngineConfig
from engine.vllm_codec import decode_output, decode_sampling, encode_payload, encode_sampling


def test_sampling_parameters_round_trip() -> None:
    params = SamplingParams(
        temperature=0.7,
        top_p=0.9,
        top_k=5,
        seed=3,
        stop=["end"],
        stop_token_ids=[7, 8],
        max_tokens=11,
        min_tokens=2,
        logprobs=3,
        prompt_logprobs=1,
        logit_bias={5: -1.5},
        presence_penalty=0.5,
        output_kind=RequestOutputKind.DELTA,
        structured_outputs=StructuredOutputsParams(json={"type": "object"}),
        extra_args={"note": [1, 2]},
    )
    params._eos_token_id = 2
    params._all_stop_token_ids = {2, 7, 8}
    params._bad_words_token_ids = [[4], [5, 6]]
    assert params.structured_outputs is not None
    params.structured_outputs._backend = "xgrammar"
    decoded, reasoning = decode_sampling(encode_sampling(params))
    assert reasoning == {}
    for name in SamplingParams.__struct_fields__:
        assert getattr(decoded, name) == getattr(params, name), name
    assert decoded.structured_outputs is not None
    assert decoded.structured_outputs._backend == "xgrammar"
    assert decoded.eos_token_id == 2


def test_what_the_front_knows_of_thinking_travels_and_a_client_cannot_say_it() -> None:
    known = {"reasoning_ended": False, "reasoning_parser_kwargs": {"chat_template_kwargs": {"thinking": True}}}
    params = SamplingParams(extra_args={"slosserve_reasoning": {"reasoning_ended": True}, "note": 1})
    decoded, reasoning = decode_sampling(encode_sampling(params, known))
    assert (decoded.extra_args, reasoning) == ({"note": 1}, known)
    assert decode_sampling(encode_sampling(params))[1] == {}


def test_transfer_parameters_of_a_client_do_not_travel() -> None:
    params = SamplingParams(extra_args={"kv_transfer_params": {"remote_host": "10.0.0.1"}, "note": 1})
    assert decode_sampling(encode_sampling(params))[0].extra_args == {"note": 1}
    assert params.extra_args is not None
    assert "kv_transfer_params" in params.extra_args, "the caller's own object is left alone"


@pytest.mark.parametrize("blob", [b"", b"\xff\xff", b"\x01"])
def test_what_is_no_sampling_is_a_protocol_error(blob: bytes) -> None:
    with pytest.raises(ProtocolError, match="sampling parameters"):
        decode_sampling(blob)


def test_an_output_without_logprobs_has_no_payload() -> None:
    assert encode_payload(EngineCoreOutput("internal", [1, 2, 3])) is None


def test_logprobs_round_trip_in_one_blob() -> None:
    numbers = np.arange(200 * 5)
    logprobs = LogprobsLists(
        numbers.reshape(200, 5).astype(np.int32),
        -numbers.reshape(200, 5).astype(np.float32),
        np.arange(200, dtype=np.int32),
    )
    of_prompt = LogprobsTensors(torch.ones(300, 2).int(), torch.rand(300, 2), torch.zeros(300).int())
    payload = encode_payload(
        EngineCoreOutput("internal", [1], new_logprobs=logprobs, new_prompt_logprobs_tensors=of_prompt)
    )
    assert payload is not None
    decoded = decode_output(Output("work", [1], payload=payload), "request")
    assert decoded.new_logprobs is not None
    for got, sent in zip(decoded.new_logprobs[:3], logprobs[:3], strict=True):
        np.testing.assert_array_equal(got, sent)
    assert decoded.new_prompt_logprobs_tensors is not None
    for got, sent in zip(decoded.new_prompt_logprobs_tensors[:3], of_prompt[:3], strict=True):
        assert torch.equal(got, sent)


@pytest.mark.parametrize("reason", [None, *FinishReason])
def test_an_output_becomes_vllms_own(reason: FinishReason | None) -> None:
    text = None if reason is None else str(reason)
    decoded = decode_output(Output("work", (4, 5), text, stop_reason=9, cached_tokens=32), "request")
    assert (decoded.request_id, decoded.new_token_ids) == ("request", [4, 5])
    assert decoded.finish_reason is reason
    assert decoded.stop_reason == 9
    assert decoded.prefill_stats is not None
    assert decoded.prefill_stats.num_cached_tokens == 32
    assert decode_output(Output("work", [4]), "request").prefill_stats is None


def test_an_output_that_makes_no_sense_is_a_protocol_error() -> None:
    with pytest.raises(ProtocolError, match="finish reason 'bored'"):
        decode_output(Output("work", [], "bored"), "request")
    with pytest.raises(ProtocolError, match="payload of request"):
        decode_output(Output("work", [], payload=b"\xc1"), "request")


def test_an_engine_without_a_model_says_what_to_do() -> None:
    engine = VllmEngine(VllmEngineConfig(model="/nowhere/at/all", engine_id="lost"))
    with pytest.raises(
        EngineStartError, match=r"engine lost did not start.*no folder /nowhere/at/all.*model make"
    ):
        engine.start()
