"""Every error of the cluster, as one tree.

    SlosserveError
    |-- ConfigError            the configuration is wrong: which key, in which file, what to do
    |-- RequestError           400  the client asked for something that cannot be served
    |-- Unauthorized           401  the key is missing, or another one
    |-- Refused                429  the promise cannot be made and the client asked to be told so
    |-- NoCapacity             503  nothing can serve this now; try again after `retry_after_s`
    |-- EngineError
    |   |-- EngineStartError        an engine did not start: which one, and the last lines of its log
    |   `-- MissingHook             the installed vLLM lacks an internal that the scheduler relies on
    |-- NodeLost                    a node died or stopped answering; the work is placed again
    `-- ProtocolError               a message of another version, or none of ours

Each knows its HTTP status, a machine-readable reason, and whether trying again can help.
"""

from __future__ import annotations

from typing import ClassVar


class SlosserveError(Exception):
    """Base of the tree. `http_status` is what a client sees, `reason` goes into a header."""

    http_status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False
    reason: str = "internal"

    def __init__(self, message: str, *, reason: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        if reason is not None:
            self.reason = reason
        self.retry_after_s = retry_after_s


class ConfigError(SlosserveError):
    """The configuration is wrong. The message names the key, the place and the remedy."""

    http_status = 400
    reason = "config"


class RequestError(SlosserveError):
    """The client asked for something that cannot be served."""

    http_status = 400
    reason = "bad_request"


class Unauthorized(SlosserveError):
    """The client did not give the key that is asked for."""

    http_status = 401
    reason = "api_key"


class Refused(SlosserveError):
    """The promise cannot be made, and the client asked to be refused rather than deferred."""

    http_status = 429
    retryable = True
    reason = "slo_unattainable"


class NoCapacity(SlosserveError):
    """No node can serve the request now."""

    http_status = 503
    retryable = True
    reason = "no_capacity"


class EngineError(SlosserveError):
    """An engine failed."""

    reason = "engine"


class EngineStartError(EngineError):
    """An engine did not start. The message names the node and carries the last lines of its log."""

    reason = "engine_start"


class MissingHook(EngineError):
    """The installed vLLM lacks an internal that `engine.vllm_scheduler` relies on."""

    reason = "missing_hook"


class NodeLost(SlosserveError):
    """A node died or stopped answering."""

    http_status = 503
    retryable = True
    reason = "node_lost"


class ProtocolError(SlosserveError):
    """A message that is none of ours, or of another version."""

    reason = "protocol"
