"""Sequences as rows: what composing a batch reads and writes, in the form that compiled code takes.

One row is a sequence and what was promised for it. The composer of nodes fills rows from `Seq` and `Duty`; a
virtual engine keeps its sequences as rows all the time, so that thousands of steps a second can be simulated
with the very code that composes batches for real engines.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from engine.cost import StepCost

# Pulls of handed-over KV, in order: none, waits for blocks, bytes on their way, all here.
NO_PULL, PULL_WAITS, PULLING, PULLED = 0, 1, 2, 3

ROW = np.dtype(
    [
        # The sequence: `known` tokens are prompt + output; a decode has all but the last of them computed.
        ("prompt_tokens", np.int64),
        ("output_tokens", np.int64),
        ("computed_tokens", np.int64),
        ("drafts", np.int64),  # that a verify could take
        ("running", np.bool_),
        ("blocked", np.bool_),
        # What was promised: best effort owes nothing.
        ("promised", np.bool_),
        ("first_due_s", np.float64),
        ("due_s", np.float64),  # of the next token
        ("grace_s", np.float64),  # by which the first token may be late and is not missed
        ("tpot_s", np.float64),
        ("depth", np.int64),  # tokens of a verify that were planned; 0: none planned, what room is left
        ("cached_tokens", np.int64),  # of the prompt: believed to have their KV
        ("pull", np.int64),
        ("offers", np.bool_),  # ends with its prefill, and offers the KV
        # The next batch.
        ("chunk_tokens", np.int64),  # most new tokens; 0: held out
        ("verify_tokens", np.int64),  # drafts among them
        ("gives_way", np.bool_),  # best effort that gives up slot and KV
        ("may_pull", np.bool_),  # handed over: memory may go to its KV now
        # Kept by virtual engines alone.
        ("end_tokens", np.int64),  # outputs after which it ends: its true length, or its max_tokens
        ("blocks", np.int64),  # KV blocks held
        ("new_tokens", np.int64),  # made in the last step
        ("thinking_tokens", np.int64),  # outputs up to the end of thinking, from where the answer's pace holds
        ("thinking_tpot_s", np.float64),
        ("answer_tpot_s", np.float64),
        ("arrived_s", np.float64),
        ("first_token_s", np.float64),  # NaN before
        ("seed", np.int64),  # of which drafts are accepted
        ("drafted", np.int64),  # in all, and how many of them were accepted
        ("accepted", np.int64),
        ("preempted", np.int64),  # times
        ("lacked", np.int64),  # a promise that waited for memory: 1 until it is on time again, 2 if it was late
    ],
    align=True,
)
Rows = npt.NDArray[np.void]
Index = npt.NDArray[np.int64]


class CostArrays(NamedTuple):
    """A StepCost for compiled code. lines [pieces, 3]: base, per token, per draft step; terms [5]: per context
    token, per prefill work, per sequence, per KV token of prefills, and the drift."""

    lines: npt.NDArray[np.float64]
    terms: npt.NDArray[np.float64]

    @classmethod
    def of(cls, cost: StepCost) -> CostArrays:
        """The same numbers."""
        lines = [[p.base_s, p.per_token_s, p.per_draft_step_s] for p in cost.pieces]
        terms = [
            cost.per_context_token_s,
            cost.per_prefill_work_s,
            cost.per_seq_s,
            cost.per_prefill_kv_token_s,
            cost.drift,
        ]
        return cls(np.array(lines, dtype=np.float64), np.array(terms, dtype=np.float64))
