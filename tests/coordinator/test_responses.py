"""Responses that name the one before them are calls of one session."""

from __future__ import annotations

import pytest

from coordinator.endpoint import responses
from coordinator.endpoint.responses import ResponseSessions


def test_a_chain_of_responses_is_one_session_called_like_the_first() -> None:
    sessions = ResponseSessions()
    assert sessions.session_of("resp_1", None, None) == "resp_1"
    assert sessions.session_of("resp_2", "resp_1", None) == "resp_1"
    assert sessions.session_of("resp_3_0", "resp_2", None) == "resp_1", "a part of resp_3"
    assert sessions.session_of("resp_3_1", "resp_2", None) == "resp_1"
    assert sessions.session_of("resp_5_0", None, None) == "resp_5"
    assert sessions.session_of("resp_4", None, None) == "resp_4"


def test_a_session_that_the_client_names_is_kept_by_those_who_go_on_from_it() -> None:
    sessions = ResponseSessions()
    assert sessions.session_of("resp_1", None, "mine") == "mine"
    assert sessions.session_of("resp_2", "resp_1", None) == "mine"


def test_what_is_no_response_opens_no_session() -> None:
    assert ResponseSessions().session_of("chatcmpl-1", None, None) is None
    assert ResponseSessions().session_of("chatcmpl-1", None, "mine") == "mine"


def test_the_oldest_are_forgotten_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(responses, "MOST_RESPONSES", 2)
    sessions = ResponseSessions()
    for number in range(4):
        sessions.session_of(f"resp_{number}", None, "mine")
    assert len(sessions._sessions) == 2
    assert sessions.session_of("resp_5", "resp_0", None) == "resp_0", "a stranger's name will do"
