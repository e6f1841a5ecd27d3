"""Sessions of /v1/responses: a client that names the response before it goes on with that one's session."""

from __future__ import annotations

from collections import OrderedDict

RESPONSE = "resp_"  # how ids of responses begin
MOST_RESPONSES = 65_536


class ResponseSessions:
    """The session of each stored response. Bounded: the oldest are forgotten first.

    The front asks for a response in parts, whose ids are that of the response, and a number behind a "_".
    """

    def __init__(self) -> None:
        self._sessions: OrderedDict[str, str] = OrderedDict()

    def session_of(self, request_id: str, previous: str | None, named: str | None) -> str | None:
        """The session of a request: the one that it names itself, else that of the response before it, else a
        new one, called like this first response. None for what is no response and names none.
        """
        if not request_id.startswith(RESPONSE):
            return named
        response = RESPONSE + request_id.removeprefix(RESPONSE).partition("_")[0]
        before = None if previous is None else self._sessions.get(previous, previous)
        session = named or before or response
        self._sessions[response] = session
        while len(self._sessions) > MOST_RESPONSES:
            self._sessions.popitem(last=False)
        return session
