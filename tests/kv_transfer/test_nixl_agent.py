"""A NIXL agent as we make it: quiet when idle, and its reads carry no notification of their own."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest

from kv_transfer.nixl_agent import WatchedAgent, resting_progress
from kv_transfer.nixl_checks import Verdict, WordChecks
from kv_transfer.nixl_memory import Offers, SideMemory

nixl = pytest.importorskip("nixl._api")

Pair = tuple[Any, Any, SideMemory, SideMemory]


def test_an_idle_agent_takes_no_core() -> None:
    with resting_progress(nixl.nixl_agent):
        agent = nixl.nixl_agent("idle", nixl.nixl_agent_config(num_threads=4))
    before = os.times()
    time.sleep(1.0)
    after = os.times()
    assert (after.user - before.user) + (after.system - before.system) < 0.1
    del agent


@pytest.fixture(scope="module")
def ends() -> Pair:
    """Two agents of this process that know each other, the second's memory readable by the first."""
    agents, memories = [], []
    for name in ("reader", "holder"):
        with resting_progress(nixl.nixl_agent):
            agent = nixl.nixl_agent(name, nixl.nixl_agent_config(num_threads=1, capture_telemetry=True))
        memory = SideMemory()
        memory.register(agent, ["UCX"])
        agents.append(agent)
        memories.append(memory)
    agents[0].add_remote_agent(agents[1].get_agent_metadata())
    agents[1].add_remote_agent(agents[0].get_agent_metadata())
    return agents[0], agents[1], memories[0], memories[1]


def _read(agent: Any, local: SideMemory, remote: SideMemory, size: int, notif: bytes) -> None:
    sides = []
    for name, memory in (("NIXL_INIT_AGENT", local), ("holder", remote)):
        descs = agent.get_xfer_descs([(memory.as_peer().probe_address, size, 0)], "DRAM")
        sides += [agent.prep_xfer_dlist(name, descs), [0]]
    handle = agent.make_prepped_xfer("READ", *sides, notif_msg=notif)
    agent.transfer(handle)
    while agent.check_xfer_state(handle) == "PROC":
        time.sleep(0.001)
    agent.get_xfer_telemetry(handle)
    agent.release_xfer_handle(handle)


def _notifs(agent: Any, seconds: float) -> list[bytes]:
    got: list[bytes] = []
    give_up_s = time.monotonic() + seconds
    while not got and time.monotonic() < give_up_s:
        got = [notif for notifs in agent.get_new_notifs().values() for notif in notifs]
    return got


def test_a_watched_read_is_counted_and_keeps_its_notification_back(ends: Pair) -> None:
    reader, holder, local, remote = ends
    moved: list[tuple[str, int]] = []
    agent = WatchedAgent(reader, lambda request_id, size: moved.append((request_id, size)))
    agent.watch("r1")
    _read(agent, local, remote, 4096, b"done:1")
    assert agent.stop_watching() == [b"done:1"]
    assert moved == [("r1", 4096)]
    assert _notifs(holder, 0.3) == []
    _read(agent, local, remote, 4096, b"done:2")
    assert _notifs(holder, 10.0) == [b"done:2"]
    assert moved == [("r1", 4096)]


def test_a_word_says_whether_its_offer_stands(ends: Pair) -> None:
    reader, _, local, remote = ends
    offers = Offers(remote.words)
    checks = WordChecks(local, reader)
    offer = offers.open("kv", num_blocks=1)
    assert offer is not None
    address = remote.as_peer().word_address(offer.slot)

    def verdict(nonce: int) -> Verdict:
        checks.start("kv", "holder", address, nonce)
        for _ in range(1000):
            if verdicts := checks.poll():
                return verdicts["kv"][0]
            time.sleep(0.001)
        raise TimeoutError("the word was not read")

    assert verdict(offer.nonce) is Verdict.STANDS
    assert verdict(offer.nonce + 1) is Verdict.LOST
    offers.withdraw("kv")
    assert verdict(offer.nonce) is Verdict.LOST
