"""The requests of one run as columns: when each comes, how long it is, what it is promised, what it waits for.

A call of a chain (`parent` >= 0) comes `delay_s` after the call before it has ended; its own arrival time is
not known beforehand. Everything else comes at `arrival_s`. Output lengths are the truth: a scheduler under
test is told only `max_tokens`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from coordinator.config import SloClass

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Workload:
    """Columns of shape [requests], in order of arrival; calls of a chain stand behind their first one.

    `class_index` points into `class_names`, whose promises are in `slo_classes`. `thinking_tokens` of the
    output come before the answer. The first `prefix_tokens` of a prompt are prompt and output of `parent`, as
    far as they go. `duration_s`: no request arrives later, but calls of chains do.
    """

    name: str
    duration_s: float
    arrival_s: Floats
    prompt_tokens: Ints
    output_tokens: Ints
    thinking_tokens: Ints
    max_tokens: Ints
    class_index: Ints
    class_names: tuple[str, ...]
    slo_classes: Mapping[str, SloClass]
    parent: Ints
    delay_s: Floats
    prefix_tokens: Ints

    def __post_init__(self) -> None:
        count = len(self.arrival_s)
        for name in (
            "prompt_tokens", "output_tokens", "thinking_tokens", "max_tokens", "class_index", "parent",
            "delay_s", "prefix_tokens",
        ):  # fmt: skip
            if len(getattr(self, name)) != count:
                raise ValueError(f"{name} has {len(getattr(self, name))} rows, arrival_s has {count}")
        if (self.parent >= np.arange(count)).any():
            raise ValueError("a call must stand behind the one that it waits for")

    def __len__(self) -> int:
        return len(self.arrival_s)

    @property
    def rate_per_s(self) -> float:
        """Requests a second, calls of chains included."""
        return len(self) / self.duration_s

    def clipped(self, most_tokens: int) -> Workload:
        """Prompt and output cut so that a request's KV is at most `most_tokens`; the prompt gives way last."""
        prompt = np.minimum(self.prompt_tokens, most_tokens - 1)
        output = np.minimum(self.output_tokens, most_tokens - prompt)
        return replace(
            self,
            prompt_tokens=prompt,
            output_tokens=output,
            thinking_tokens=np.minimum(self.thinking_tokens, output),
            max_tokens=np.maximum(np.minimum(self.max_tokens, most_tokens - prompt), output),
            prefix_tokens=np.minimum(self.prefix_tokens, prompt - 1),
        )
