"""Two things that vLLM's model runner does not do by itself (written against 0.32): on a CPU, seeded requests
whose prompt comes in chunks; everywhere, requests that go on where another engine was.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any

import numpy as np


def keep_seeds(core: Any) -> None:
    """On a CPU, let a generator be as if nothing had been drawn where what is drawn is thrown away.

    vLLM draws a token for every chunk of a prompt, throws it away, and winds the generator back by an offset
    that only those of GPUs have: the first such chunk would end the engine.
    """
    runner = _runner(core)
    if runner.device.type != "cpu":
        return
    sample, book = runner._sample, runner._bookkeeping_sync

    def unused() -> dict[int, Any]:
        """Generators of rows whose token is thrown away, by row."""
        batch = runner.input_batch
        rows = np.flatnonzero(runner.discard_request_mask.np[: batch.num_reqs]).tolist()
        return {row: batch.generators[row] for row in rows if row in batch.generators}

    def sampled(*args: Any, **kwargs: Any) -> Any:
        before = [(generator, generator.get_state()) for generator in unused().values()]
        output = sample(*args, **kwargs)
        for generator, state in before:
            generator.set_state(state)
        return output

    def booked(*args: Any, **kwargs: Any) -> Any:
        hidden, generators = unused(), runner.input_batch.generators
        for row in hidden:
            del generators[row]
        try:
            return book(*args, **kwargs)
        finally:
            generators.update(hidden)

    runner._sample, runner._bookkeeping_sync = sampled, booked


def go_on_after(core: Any, said: MutableMapping[str, Sequence[int]]) -> None:
    """Let the runner know of a request what was `said` of it elsewhere, by request id, when it first sees it.

    vLLM's scheduler knows it from the request; the runner takes a new request for one that has said nothing.
    A seeded generator goes on where it was if every token took one draw, which verified drafts do not take.
    """
    runner = _runner(core)
    if core.scheduler.use_v2_model_runner:
        return  # it is sent all tokens, and draws by position
    add = runner.input_batch.add_request

    def added(state: Any) -> Any:
        tokens = said.pop(state.req_id, ())
        if tokens:
            state.output_token_ids = list(tokens)
            if state.generator is not None:
                _skip_draws(state.generator, len(tokens), runner)
        return add(state)

    runner.input_batch.add_request = added


def _skip_draws(generator: Any, draws: int, runner: Any) -> None:
    """What vLLM's sampler draws for each token said: a seed of noise on a CPU (`forward_cpu`), else noise for
    every token of the vocabulary (`random_sample`)."""
    import torch

    if runner.device.type == "cpu":
        torch.randint(0, 2**31, (draws,), generator=generator, dtype=torch.long)
        return
    unused = torch.empty(runner.input_batch.vocab_size, dtype=torch.float32, device=generator.device)
    for _ in range(draws):
        unused.exponential_(generator=generator)


def _runner(core: Any) -> Any:
    return core.model_executor.driver_worker.worker.model_runner
