"""The works of a node in columns: made once for each account of it, read for every candidate that is judged."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coordinator.planner.lengths import ALWAYS, Floats, Ints, Lengths, bucket
from coordinator.planner.memory import request_rows
from coordinator.planner.outlook_kernel import CURVE, STARTS_S
from engine.messages import WorkState
from engine.request import WorkKind

TOLERANCE = 0.05  # of the decode time so far: later than that a promise is broken (the scoring rule)


@dataclass(frozen=True, slots=True, eq=False)
class Works:
    """All works of a node, in `states`. Those that hold memory for a promise, `holding`, are columns as well.

    `holding` [n] has what was promised first, `promised` of them, and then KV that is leased to best effort.
    A column has an entry for each: `due_left_s` until its next token, `late` where that is so far in the past
    that the promise is broken, `acceptance` nan where none is known. `decoding` and `prefilling` are the
    positions of those promised that are at it; `handed_on` counts those of which only the KV is still here,
    and `pull_tokens` the prompt tokens of those whose KV is still to come. `prompt_left_tokens` are still to be
    computed here, of all.
    """

    states: tuple[WorkState, ...]
    holding: tuple[WorkState, ...]
    names: list[str]
    promised: int
    handed_on: int
    pull_tokens: int
    prompt_left_tokens: int
    decoding: Ints
    prefilling: Ints
    paces_s: list[float]  # of those promised, sorted
    pace: Ints  # the row of each in `paces_s`
    due_left_s: Floats
    late: NDArray[np.bool_]
    context_tokens: Ints
    acceptance: Floats
    _first_token_left_s: Floats
    _begun: NDArray[np.bool_]
    _rows: Floats  # for the outlook; starts are filled in at each time
    _curves: list[tuple[str, int]]  # class and prompt tokens of each; before them, ALWAYS

    @classmethod
    def of(cls, states: Iterable[WorkState] = (), later: Iterable[tuple[WorkState, float]] = ()) -> Works:
        """The columns of these works. `later`: more of them, each with how many seconds more its first token
        has than it says. Raises ValueError where a pace is not above 0.
        """
        states, later = tuple(states), tuple(later)
        promised = [work for work in states if not work.best_effort]
        leased = [work for work in states if work.best_effort and _is_lease(work)]
        promised_later = [(work, more_s) for work, more_s in later if not work.best_effort]
        leased_later = [(work, more_s) for work, more_s in later if work.best_effort and _is_lease(work)]
        more_s = [0.0] * len(promised) + [more_s for _, more_s in promised_later]
        more_s += [0.0] * len(leased) + [more_s for _, more_s in leased_later]
        promised += [work for work, _ in promised_later]
        holding = (*promised, *leased, *(work for work, _ in leased_later))
        prefills = np.array([work.kind is WorkKind.PREFILL for work in holding], dtype=np.bool_)
        prompt = np.array([work.prompt_tokens for work in holding], dtype=np.int64)
        made = np.array([work.output_tokens for work in holding], dtype=np.int64)
        left = np.array([work.prefill_left_tokens for work in holding], dtype=np.int64)
        most = np.array([work.max_tokens for work in holding], dtype=np.int64)
        tpot_s = np.array([work.tpot_s for work in holding], dtype=np.float64)
        first_left_s = np.array([work.first_token_left_s for work in holding], dtype=np.float64) + more_s
        next_left_s = np.array([work.next_due_left_s for work in holding], dtype=np.float64)  # nan: None
        due_left_s = np.where(np.isnan(next_left_s), first_left_s, next_left_s)
        ours = np.arange(len(holding)) < len(promised)
        paces_s = sorted({work.tpot_s for work in promised})
        # What decodes elsewhere makes one token.
        rows = request_rows(
            prompt, np.where(prefills, 0, made), np.where(prefills, 1.0, tpot_s), np.where(prefills, 1, most)
        )
        rows[:, CURVE], curves = _curves(holding)
        return cls(
            states=(*states, *(work for work, _ in later)),
            holding=holding,
            names=[f"{work.request_id}#{work.attempt}" for work in holding],
            promised=len(promised),
            handed_on=int((ours & prefills & (left == 0)).sum()),
            pull_tokens=sum(
                work.prompt_tokens
                for work in promised
                if work.kind is WorkKind.DECODE and work.output_tokens == 0
            ),
            prompt_left_tokens=sum(work.prefill_left_tokens for work in states)
            + sum(work.prefill_left_tokens for work, _ in later),
            decoding=np.flatnonzero(ours & ~prefills & (left == 0)),
            prefilling=np.flatnonzero(ours & (left > 0)),
            paces_s=paces_s,
            pace=np.searchsorted(paces_s, tpot_s),
            due_left_s=due_left_s,
            # Whether it is late is for the report to say: since then it has made tokens that we do not know of.
            late=(due_left_s < -tpot_s) & (due_left_s < -TOLERANCE * made * tpot_s),
            context_tokens=prompt + made,
            acceptance=np.array([work.acceptance for work in holding], dtype=np.float64),
            _first_token_left_s=first_left_s,
            _begun=made > 0,
            _rows=rows,
            _curves=curves,
        )

    def __iter__(self) -> Iterator[WorkState]:
        return iter(self.states)

    def __len__(self) -> int:
        return len(self.states)

    def requests(self, lengths: Lengths, shift_s: float) -> tuple[Floats, list[Floats]]:
        """Those `holding`, `shift_s` later, as `memory.outlook_of_rows` takes them, and their curves."""
        rows = self._rows.copy()
        rows[:, STARTS_S] = np.where(self._begun, 0.0, np.maximum(self._first_token_left_s - shift_s, 0.0))
        return rows, [ALWAYS, *(lengths.survival(*key) for key in self._curves)]


def _is_lease(work: WorkState) -> bool:
    """Whether only its KV is here, to be pulled. Nobody takes it back for a promise, best effort or not."""
    return work.kind is WorkKind.PREFILL and work.prefill_left_tokens == 0


def _curves(works: Sequence[WorkState]) -> tuple[Ints, list[tuple[str, int]]]:
    """The row of each in the curves of lengths, 0 where its length is sure; class and prompt of the others."""
    rows: dict[tuple[str, int] | None, int] = {None: 0}
    keys: list[tuple[str, int]] = []
    curve = np.empty(len(works), dtype=np.int64)
    for at, work in enumerate(works):
        alike = None if work.kind is WorkKind.PREFILL else (work.class_name, bucket(work.prompt_tokens))
        row = rows.get(alike)
        if row is None:
            row = rows[alike] = len(rows)
            keys.append((work.class_name, work.prompt_tokens))
        curve[at] = row
    return curve, keys


NOTHING = Works.of()
