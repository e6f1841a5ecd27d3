"""Stock vLLM, one engine alone: reads lists of requests as lines of JSON, answers each with a line."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

# vLLM prints to stdout: keep the real one for answers.
ANSWERS = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    OMP_NUM_THREADS="1",
    HF_HUB_OFFLINE="1",
    VLLM_NO_USAGE_STATS="1",
    TORCH_COMPILE_DISABLE="1",
)


def _params(request: dict[str, Any]) -> Any:
    from vllm import SamplingParams

    if "logit_bias" in request:
        request["logit_bias"] = {int(token): bias for token, bias in request["logit_bias"].items()}
    return SamplingParams(**{"temperature": 0, "max_tokens": 16, **request})


def main() -> None:
    """Answer until the input ends."""
    from vllm import LLM

    from engine.models import resolve_model

    llm = LLM(resolve_model("tiny"), dtype="float32", enforce_eager=True, max_model_len=4096, block_size=32)
    for line in sys.stdin:
        requests = json.loads(line)
        prompts = [{"prompt_token_ids": request.pop("prompt_token_ids")} for request in requests]
        outputs = llm.generate(prompts, [_params(request) for request in requests], use_tqdm=False)
        answers = [[list(part.token_ids) for part in output.outputs] for output in outputs]
        print(json.dumps(answers), file=ANSWERS, flush=True)


main()
