"""Seeded requests whose prompt comes in chunks, on a CPU: vLLM draws a token for every chunk, throws it away,
and winds the generator back by an offset that only those of GPUs have. The first such chunk ends the engine.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def keep_seeds(core: Any) -> None:
    """On a CPU, let a generator be as if nothing had been drawn where what is drawn is thrown away."""
    runner = core.model_executor.driver_worker.worker.model_runner
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
