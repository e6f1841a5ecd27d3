"""Links between simulated replicas: latency, then bytes; transfers that share a port take turns."""

from __future__ import annotations

import numpy as np

from kv_transfer.base import Link


class SharedLinks:
    """Every replica has one port out and one port in, each of `bytes_per_s`, first come first served."""

    def __init__(self, replicas: int, latency_s: float, bytes_per_s: float) -> None:
        self.latency_s = latency_s
        self.bytes_per_s = bytes_per_s
        self._out_free_s = np.zeros(replicas)
        self._in_free_s = np.zeros(replicas)

    def transfer(self, source: int, target: int, kv_bytes: int, now_s: float) -> float:
        """When the last byte is there, if the transfer is asked for now."""
        begins_s = max(now_s, self._out_free_s[source], self._in_free_s[target])
        ends_s = float(begins_s + kv_bytes / self.bytes_per_s)
        self._out_free_s[source] = self._in_free_s[target] = ends_s
        return ends_s + self.latency_s

    def between(self, source: str, target: str) -> Link:
        """The link as a probe of an idle one would measure it."""
        return Link(source, target, self.latency_s, self.bytes_per_s)
