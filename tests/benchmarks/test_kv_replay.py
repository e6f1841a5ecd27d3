"""A replay loses no request, and memory overflows only where lengths are not known for sure."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.kv_replay import (
    CAPACITY_TOKENS,
    Admission,
    ByOutlook,
    ByPrompt,
    ByReserve,
    Request,
    Running,
    Tally,
    replay,
)

MAX_TOKENS = 2000


def crowd(count: int = 250) -> list[Request]:
    """More requests than memory holds, outputs of 300 tokens on average."""
    rng = np.random.default_rng(4)
    prompts = rng.integers(50, 3000, count).tolist()
    outputs = np.clip(rng.exponential(300, count), 1, MAX_TOKENS).astype(int).tolist()
    return [
        Request(6 * index, prompt, output, MAX_TOKENS, 1 + index % 2, 3, 6 * index + 10)
        for index, (prompt, output) in enumerate(zip(prompts, outputs, strict=True))
    ]


def reserve(request: Request) -> int:
    return request.prompt_tokens + request.max_tokens


@pytest.mark.parametrize(
    "admission",
    [
        ByOutlook(0.0, known=True),
        ByOutlook(1.25),
        ByOutlook(1.25, aim=0.007),
        ByPrompt(),
        ByReserve(reserve),
    ],
)
def test_every_request_ends_is_preempted_or_is_turned_away(admission: Admission) -> None:
    tally = replay(crowd(), admission)

    assert tally.offered == 250
    assert tally.admitted == tally.kept + tally.overflowed
    assert 0 < tally.admitted < tally.offered
    assert max(tally.held_share) <= 1.0


def test_only_guesses_overflow() -> None:
    assert replay(crowd(), ByOutlook(0.0, known=True)).overflowed == 0
    assert replay(crowd(), ByReserve(reserve)).overflowed == 0
    assert replay(crowd(), ByPrompt()).overflowed > 0


def test_learned_lengths_keep_more_than_max_tokens_does() -> None:
    assert replay(crowd(), ByOutlook(1.25)).kept > 1.3 * replay(crowd(), ByReserve(reserve)).kept


def test_the_last_one_let_in_goes_first() -> None:
    big = CAPACITY_TOKENS // 2 - 100
    first, second = (Request(at, big, 200, 400, 1, 1, at) for at in (0, 5))
    ended: list[tuple[int, bool]] = []

    class Watched(ByPrompt):
        def learn(self, request: Request, made: int, cut: bool) -> None:
            ended.append((request.at, cut))

    tally: Tally = replay([first, second], Watched())

    assert ended == [(5, True), (0, False)]
    assert (tally.overflowed, tally.kept) == (1, 1)


def test_tokens_come_at_the_pace_after_the_prefill() -> None:
    run = Running(Request(0, 100, 10, 20, 2, 3, 9), since=4)

    assert [run.made(tick) for tick in (4, 7, 8, 9, 10, 11)] == [0, 0, 0, 1, 1, 2]
    assert run.ends == 4 + 3 + 2 * 10
    assert run.made(run.ends) == 10
