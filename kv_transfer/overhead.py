"""What the check of the lease word adds to a pull: `python -m kv_transfer.overhead` (needs NIXL, no vLLM).

Reads buffers from an agent in another process, as a pull does, and checks a word after each read.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from multiprocessing.connection import Connection
from statistics import median
from typing import Any

from kv_transfer.nixl_agent import resting_progress
from kv_transfer.nixl_checks import Verdict, WordChecks
from kv_transfer.nixl_memory import Offers, PeerMemory, SideMemory

SIZES = (64 << 10, 1 << 20, 8 << 20)
REPEATS = 200


def _agent(name: str, memory: SideMemory) -> Any:
    from nixl._api import nixl_agent, nixl_agent_config

    with resting_progress(nixl_agent):
        agent = nixl_agent(name, nixl_agent_config(num_threads=4))
    memory.register(agent, ["UCX"])
    return agent


def _source(pipe: Connection) -> None:
    memory = SideMemory()
    agent = _agent("source", memory)
    offer = Offers(memory.words).open("kv", num_blocks=1)
    assert offer is not None
    pipe.send((agent.get_agent_metadata(), memory.as_peer(), offer.slot, offer.nonce))
    pipe.recv()


def _read(agent: Any, peer: str, local: PeerMemory, remote: PeerMemory, size: int) -> None:
    here = agent.get_xfer_descs([(local.probe_address, size, 0)], "DRAM")
    there = agent.get_xfer_descs([(remote.probe_address, size, 0)], "DRAM")
    handle = agent.initialize_xfer("READ", here, there, peer)
    state = agent.transfer(handle)
    while state == "PROC":
        state = agent.check_xfer_state(handle)
    if state != "DONE":
        raise RuntimeError(f"a read of {size} bytes ended as {state}")
    agent.release_xfer_handle(handle)


def _check(checks: WordChecks, peer: str, address: int, nonce: int) -> None:
    checks.start("kv", peer, address, nonce)
    verdicts = checks.poll()
    while not verdicts:
        verdicts = checks.poll()
    if verdicts["kv"][0] is not Verdict.STANDS:
        raise RuntimeError(f"the word says {verdicts['kv']}")


def main() -> None:
    """Print the median read and check per size."""
    pipe, theirs = multiprocessing.get_context("spawn").Pipe()
    source = multiprocessing.get_context("spawn").Process(target=_source, args=(theirs,), daemon=True)
    source.start()
    memory = SideMemory()
    agent = _agent("target", memory)
    metadata, remote, slot, nonce = pipe.recv()
    peer = agent.add_remote_agent(metadata)
    checks = WordChecks(memory, agent)
    print(f"UCX_TLS={os.environ.get('UCX_TLS', '(not set)')}, {REPEATS} reads per size, medians")
    print("   bytes    read us   check us    adds")
    for size in SIZES:
        reads, seconds = [], []
        for repeat in range(REPEATS + 10):
            start_s = time.perf_counter()
            _read(agent, peer, memory.as_peer(), remote, size)
            read_s = time.perf_counter()
            _check(checks, peer, remote.word_address(slot), nonce)
            if repeat >= 10:
                reads.append(read_s - start_s)
                seconds.append(time.perf_counter() - read_s)
        read_us, check_us = median(reads) * 1e6, median(seconds) * 1e6
        print(f"{size:8d} {read_us:10.1f} {check_us:10.1f} {check_us / read_us:7.1%}")
    pipe.send("done")
    source.join(5)


if __name__ == "__main__":
    main()
