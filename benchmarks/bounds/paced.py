"""The bound where TTFT and TPOT bind: prompts fit only before the first token is due, and decodes need steps.

A linear program over buckets of time, of what any schedule without speculation keeps to, for each request i
that is served (y_i, from 0 to 1) and bucket t. Let `steps[t]` be the steps of all replicas, x[i, t] the share
of its prompt that is computed and g[i, t] the output tokens after the first that it gets, all by the part of a
step that lies in the bucket. Then:

- the prompt is computed in time, sum_t x[i, t] = y_i until the first token is due; sum_t g[i, t] =
  (o_i - 1) y_i until the last is;
- a step gives a request one token and at most its whole prompt: g[i, t] <= steps[t], x[i, t] <= steps[t];
- a step holds the KV of those in it: sum_i (chunk + (p_i + 1) g[i, t]) <= kv_tokens * steps[t];
- for each piece of the cost, base * steps[t] + per_token * tokens[t] + attention <= replicas * seconds.

The second is the pace: whoever has o tokens due in a time must see o steps in it, each with its base, however
few are there to share them. It does not assume that a step is never longer than a TPOT: one may be, where the
score does not look or a request is ahead. Long runs are cut, each part with all replicas for itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import coo_array, csr_array, vstack

from benchmarks.bounds.windows import Windows, runs
from benchmarks.bounds.work import Demand
from benchmarks.workload import Floats, Ints
from engine.cost import StepCost

PART_REQUESTS = 400
PREFILL_BUCKETS = 2  # of a median prefill window
LEAST_BUCKETS = 20
MOST_BUCKETS = 4000


def most_paced(
    demand: Demand,
    windows: Windows,
    cost: StepCost,
    kv_tokens: int,
    replicas: int,
    *,
    bucket_s: float | None = None,
    part_requests: int = PART_REQUESTS,
) -> float:
    """The most requests that are served in time, of those given in order of arrival.

    `bucket_s`: None takes a part of the median time for a prefill. Smaller ones are tighter and slower.
    """
    if bucket_s is None:
        bucket_s = float(np.median(windows.prefill_end_s - windows.begin_s)) / PREFILL_BUCKETS
    total = 0.0
    for start in range(0, len(demand), part_requests):
        rows = np.arange(start, min(start + part_requests, len(demand)))
        total += _part(demand[rows], windows[rows], cost, kv_tokens, replicas, bucket_s)
    return total


@dataclass(frozen=True, slots=True, eq=False)
class _Pairs:
    """A request in a bucket that its window touches, one a row."""

    request: Ints
    bucket: Ints

    @classmethod
    def within(cls, begin_s: Floats, end_s: Floats, bucket_s: float) -> _Pairs:
        first = np.floor(begin_s / bucket_s).astype(np.int64)
        count = np.maximum(np.ceil(end_s / bucket_s).astype(np.int64) - first, 1)
        return cls(*runs(first, count))


@dataclass(frozen=True, slots=True, eq=False)
class _Columns:
    """The variables, in this order: y [requests], x [prefills], g [decodes], steps [buckets]."""

    requests: int
    prefills: _Pairs
    decodes: _Pairs

    @property
    def bucket(self) -> Ints:
        """Of each x and g."""
        return np.concatenate([self.prefills.bucket, self.decodes.bucket])

    @property
    def pairs(self) -> int:
        return len(self.bucket)

    @property
    def buckets(self) -> int:
        return int(self.bucket.max()) + 1

    def matrix(self, *runs_of_entries: tuple[Ints, Ints, Floats]) -> csr_array:
        """Rows, columns and values, run by run."""
        rows, at, values = (np.concatenate(parts) for parts in zip(*runs_of_entries, strict=True))
        width = self.requests + self.pairs + self.buckets
        return coo_array((values, (rows, at)), shape=(int(rows.max()) + 1, width)).tocsr()

    def at_steps(self, bucket: Ints) -> Ints:
        return self.requests + self.pairs + bucket

    def seen(self) -> csr_array:
        """[pairs]: each x and g, less the steps of its bucket."""
        pair, one = np.arange(self.pairs), np.ones(self.pairs)
        return self.matrix((pair, self.requests + pair, one), (pair, self.at_steps(self.bucket), -one))

    def by_bucket(self, prefill: Floats, decode: Floats, step: float) -> csr_array:
        """[buckets]: the sum of each request's x and g times these, and of the steps times `step`."""
        weights = np.concatenate([prefill[self.prefills.request], decode[self.decodes.request]])
        every = np.arange(self.buckets)
        return self.matrix(
            (self.bucket, self.requests + np.arange(self.pairs), weights),
            (every, self.at_steps(every), np.full(self.buckets, step)),
        )

    def done(self, decode_tokens: Floats) -> csr_array:
        """[2 * requests]: of each prompt, then of each output, what is done less what y asks for."""
        rows = np.concatenate([self.prefills.request, self.requests + self.decodes.request])
        wanted = np.concatenate([np.ones(self.requests), decode_tokens])
        every = np.arange(2 * self.requests)
        return self.matrix(
            (rows, self.requests + np.arange(self.pairs), np.ones(self.pairs)),
            (every, every % self.requests, -wanted),
        )


def _part(
    demand: Demand, windows: Windows, cost: StepCost, kv_tokens: int, replicas: int, bucket_s: float
) -> float:
    """The most served of one part."""
    start_s = float(windows.begin_s.min())
    span_s = float(windows.end_s.max()) - start_s
    bucket_s = float(np.clip(bucket_s, span_s / MOST_BUCKETS, span_s / LEAST_BUCKETS))
    begin_s = windows.begin_s - start_s
    columns = _Columns(
        len(demand),
        _Pairs.within(begin_s, windows.prefill_end_s - start_s, bucket_s),
        _Pairs.within(begin_s, windows.end_s - start_s, bucket_s),
    )
    one = np.ones(len(demand))
    chunk = np.maximum(demand.prompt_tokens - demand.cached_tokens, 1).astype(float)
    held = columns.by_bucket(chunk, demand.held_tokens + one, -float(kv_tokens))
    context_s = cost.per_context_token_s * demand.prompt_tokens.astype(float)
    time = []
    for piece in cost.pieces:
        prefill_s = piece.per_token_s * chunk + cost.per_seq_s
        decode_s = piece.per_token_s + cost.per_seq_s + context_s
        time.append(columns.by_bucket(prefill_s, decode_s, piece.base_s))
    time_s = replicas * bucket_s / cost.drift
    others = columns.pairs + columns.buckets
    found = linprog(
        np.concatenate([-one, np.zeros(others)]),
        A_ub=vstack([columns.seen(), held, *time]),
        b_ub=np.concatenate([np.zeros(others), np.full(columns.buckets * len(time), time_s)]),
        A_eq=columns.done(demand.output_tokens - one),
        b_eq=np.zeros(2 * len(demand)),
        bounds=[(0.0, 1.0)] * len(demand) + [(0.0, None)] * others,
        method="highs",
    )
    if not found.success:
        raise RuntimeError(f"HiGHS gave no optimum for {len(demand)} requests: {found.message}")
    return -float(found.fun)
