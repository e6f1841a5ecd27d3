"""Windows of load, one after the other."""

from __future__ import annotations

import numpy as np

from benchmarks.parts import in_turn
from benchmarks.scenarios import make


def test_windows_follow_one_another_in_order_of_arrival() -> None:
    windows = [make("mixed", 3.0, 20.0, 1), make("chatbot", 9.0, 5.0, 2), make("mixed", 3.0, 20.0, 3)]
    load = in_turn("spike", windows)
    assert load.duration_s == 45.0
    assert len(load) == sum(map(len, windows))
    assert (np.diff(load.arrival_s) >= 0).all()
    spike = (load.arrival_s >= 20.0) & (load.arrival_s < 25.0)
    assert spike.sum() == len(windows[1])
    assert np.array_equal(load.prompt_tokens[spike], windows[1].prompt_tokens)


def test_a_class_of_two_windows_is_one_class() -> None:
    windows = [make("coder", 3.0, 20.0, 1), make("mixed", 3.0, 20.0, 2)]
    load = in_turn("shift", windows)
    assert sorted(load.class_names) == ["chatbot", "coder", "summarizer"]
    names = [load.class_names[at] for at in load.class_index.tolist()]
    before = [window.class_names[at] for window in windows for at in window.class_index.tolist()]
    assert names == before


def test_calls_of_a_chain_stay_behind_their_own_first_one() -> None:
    windows = [make("tool", 4.0, 20.0, 1), make("tool", 4.0, 20.0, 2)]
    load = in_turn("chains", windows)
    later = np.flatnonzero(load.parent >= 0)
    assert len(later) == sum(int((window.parent >= 0).sum()) for window in windows)
    assert (load.arrival_s[later] == load.arrival_s[load.parent[later]]).all()
