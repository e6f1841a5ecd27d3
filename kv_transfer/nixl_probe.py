"""Measure a link by reading from the peer's probe area into our own."""

from __future__ import annotations

import time
from typing import Any

from kv_transfer.base import Link, PeerAddress, TransferError
from kv_transfer.link import LARGE_PROBE_BYTES, SMALL_PROBE_BYTES, Sample, fit_link
from kv_transfer.nixl_memory import PeerMemory

_SIZES = (SMALL_PROBE_BYTES, LARGE_PROBE_BYTES // 16, LARGE_PROBE_BYTES)
_READS_PER_SIZE = 5
READS_TIMEOUT_S = 2.0  # of all of a probe: the node does nothing else meanwhile


def probe_link(worker: Any, local: PeerMemory, peer: PeerAddress, timeout_s: float) -> Link:
    """The link from `peer` to the engine of `worker`. Raises TransferError; takes `timeout_s` at most.

    The first read of every size is not counted: it pays for set-up and page faults. So the cost of the first
    transfer between the pair is paid here, and not by a request.
    """
    give_up_s = time.monotonic() + timeout_s
    agent_name, remote = worker.reach(peer, timeout_s)
    give_up_s = min(give_up_s, time.monotonic() + READS_TIMEOUT_S)
    samples: list[Sample] = []
    for size in _SIZES:
        if size > min(remote.probe_bytes, local.probe_bytes):
            raise TransferError(f"engine {peer.engine_id} has a probe area of {remote.probe_bytes} bytes only")
        for repeat in range(_READS_PER_SIZE):
            seconds = _timed_read(worker.nixl_wrapper, agent_name, local, remote, size, give_up_s)
            if repeat:
                samples.append((size, seconds))
    return fit_link(peer.engine_id, worker.engine_id, samples)


def _timed_read(
    agent: Any, peer_agent: str, local: PeerMemory, remote: PeerMemory, size: int, give_up_s: float
) -> float:
    local_descs = agent.get_xfer_descs([(local.probe_address, size, 0)], "DRAM")
    remote_descs = agent.get_xfer_descs([(remote.probe_address, size, 0)], "DRAM")
    start_s = time.perf_counter()
    try:
        handle = agent.initialize_xfer("READ", local_descs, remote_descs, peer_agent)
        state = agent.transfer(handle)
        while state == "PROC":
            if time.monotonic() > give_up_s:
                raise TransferError(f"a probe of {size} bytes did not come back in time: the peer hangs")
            state = agent.check_xfer_state(handle)
    except TransferError:
        raise
    except Exception as error:
        raise TransferError(f"a probe of {size} bytes failed: {error}") from error
    if state != "DONE":
        raise TransferError(f"a probe of {size} bytes failed: NIXL says {state}")
    seconds = time.perf_counter() - start_s
    agent.release_xfer_handle(handle)
    return seconds
