"""Which sessions a node keeps KV for: bounded in time and memory, never one that is in a call."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from engine.sessions import Sessions

TTL_S, BUDGET_TOKENS = 60.0, 1000


@dataclass
class Kept:
    """A node's sessions and what its engine keeps for them, on a clock of their own."""

    sessions: Sessions = field(default_factory=lambda: Sessions(TTL_S, BUDGET_TOKENS))
    tokens: dict[str, int] = field(default_factory=dict)
    now_s: float = 0.0

    def call(self, session: str, tokens: int, after_s: float = 0.0) -> None:
        """A call that comes after a while and ends at once."""
        self.now_s += after_s
        self.sessions.called(session, self.now_s)
        self.sessions.answered(session, self.now_s)
        self.tokens[session] = tokens

    def review(self, after_s: float = 0.0) -> list[str]:
        self.now_s += after_s
        gone = self.sessions.review(self.tokens, self.now_s)
        for session in gone:
            del self.tokens[session]
        return gone


def test_a_session_that_is_idle_for_too_long_is_given_up() -> None:
    kept = Kept()
    kept.call("s", 100)
    assert kept.review(after_s=TTL_S - 1) == []
    assert kept.review(after_s=1) == ["s"]
    assert kept.sessions.kept == {}


def test_a_call_begins_its_time_anew_and_while_it_runs_there_is_no_end_to_it() -> None:
    kept = Kept()
    kept.call("s", 100)
    kept.call("s", 200, after_s=TTL_S - 1)
    assert kept.review(after_s=TTL_S - 1) == []
    kept.sessions.called("s", kept.now_s)
    assert kept.review(after_s=10 * TTL_S) == []
    kept.sessions.answered("s", kept.now_s)
    assert kept.review(after_s=TTL_S - 1) == []
    assert kept.review(after_s=1) == ["s"]


def test_beyond_the_budget_the_most_overdue_by_its_own_pace_goes_first() -> None:
    """A tool that always took a second is not coming back after ten; one that takes a minute is."""
    kept = Kept()
    for _ in range(6):
        kept.call("slow", 500, after_s=20.0)
    for _ in range(6):
        kept.call("quick", 500, after_s=0.5)
    assert kept.review(after_s=8.0) == []
    kept.call("new", 400)
    assert kept.review() == ["quick"]
    assert kept.tokens.keys() == {"slow", "new"}


def test_what_sessions_share_counts_once_in_the_budget() -> None:
    kept = Kept()
    for at in range(5):
        kept.call(f"s{at}", 500)
    assert kept.sessions.review(kept.tokens, kept.now_s, kept_tokens=BUDGET_TOKENS) == []
    assert len(kept.sessions.review(kept.tokens, kept.now_s, kept_tokens=BUDGET_TOKENS + 1)) == 1


def test_what_the_engine_gave_up_is_another_list_and_what_it_kept_is_the_same() -> None:
    kept = Kept()
    kept.call("a", 100)
    kept.call("b", 100)
    kept.review()
    before = kept.sessions.version
    kept.review(after_s=1)
    assert kept.sessions.version == before
    del kept.tokens["a"]
    kept.review()
    assert kept.sessions.version == before + 1
    assert kept.sessions.kept == {"b": 100}


steps = st.lists(
    st.tuples(
        st.sampled_from(["call", "begin", "end", "lose"]),
        st.integers(0, 9),
        st.integers(1, 600),
        st.floats(0, 2 * TTL_S),
    ),
    max_size=60,
)


@given(steps)
def test_whatever_is_called_memory_and_time_are_bounded_and_no_call_loses_its_history(
    steps: list[tuple[str, int, int, float]],
) -> None:
    kept = Kept()
    running: dict[str, int] = {}
    idle_since_s: dict[str, float] = {}
    for what, which, tokens, after_s in steps:
        session = f"s{which}"
        kept.now_s += after_s
        if what == "begin" or (what == "end" and not running.get(session)):
            kept.sessions.called(session, kept.now_s)
            running[session] = running.get(session, 0) + 1
        elif what == "end":
            kept.sessions.answered(session, kept.now_s)
            running[session] -= 1
            kept.tokens[session] = tokens
        elif what == "call":
            kept.call(session, tokens)
        else:
            kept.tokens.pop(session, None)
        idle_since_s[session] = kept.now_s
        gone = kept.review()
        assert not any(running.get(name) for name in gone)
        idle = {name: tokens for name, tokens in kept.tokens.items() if not running.get(name)}
        in_calls = sum(kept.tokens.values()) - sum(idle.values())
        assert not idle or sum(idle.values()) + in_calls <= BUDGET_TOKENS or in_calls > BUDGET_TOKENS
        assert all(kept.now_s - idle_since_s[name] < TTL_S for name in idle)
        assert kept.sessions.kept == kept.tokens
