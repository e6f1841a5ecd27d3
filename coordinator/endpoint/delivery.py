"""How long a token takes from here to the client's socket: what a promise needs besides the nodes."""

from __future__ import annotations

WEIGHT = 0.02  # of the last token: some fifty of them are remembered
MOST_S = 0.05  # of one token: a client that does not read slows nobody else's promise


class Delivery:
    """Follows, token by token, the time from when one came from a node until it was written.

    Mean and mean deviation are exponential averages, as TCP follows the time of a round trip (RFC 6298).
    """

    def __init__(self) -> None:
        self._mean_s = 0.0
        self._deviation_s = 0.0

    @property
    def seconds(self) -> float:
        """What to keep free for it: the mean, and a deviation."""
        return self._mean_s + self._deviation_s

    def note(self, seconds: float) -> None:
        """A token was written so long after it came."""
        seconds = min(max(seconds, 0.0), MOST_S)
        self._deviation_s += WEIGHT * (abs(seconds - self._mean_s) - self._deviation_s)
        self._mean_s += WEIGHT * (seconds - self._mean_s)
