"""Links are measured while a node serves: who does not answer holds nobody up."""

from __future__ import annotations

from engine.messages import ProbeLinks
from engine.probing import REACHED_WITHIN_S, Probing
from kv_transfer.base import Link, PeerAddress, TransferError
from kv_transfer.fake import FakeFabric, FakePort

A, B, C = (PeerAddress(name, "host", at) for at, name in enumerate("abc"))


class Port(FakePort):
    """Peers are reached when it is said; those of `fails` cannot be."""

    def __init__(self) -> None:
        super().__init__(FakeFabric(lambda: 0.0), "me", 4, 4, 4096, 30.0)
        self.near: set[str] = set()
        self.fails: set[str] = set()
        self.probed: list[str] = []

    def reaches(self, peer: PeerAddress) -> bool:
        if peer.engine_id in self.fails:
            raise TransferError(f"{peer.engine_id} has another layout")
        return peer.engine_id in self.near

    def probe(self, peer: PeerAddress) -> Link:
        self.probed.append(peer.engine_id)
        return Link(peer.engine_id, "me", 1e-4, 1e9)


def test_who_is_near_is_measured_one_a_turn_and_the_others_are_waited_for() -> None:
    now_s = 0.0
    port = Port()
    probing = Probing(port, lambda: now_s)
    port.near, port.fails = {"a", "b"}, {"c"}
    probing.begin(b"coordinator", ProbeLinks(7, [A, B, C]))
    assert probing.go_on() == []
    assert port.probed == ["a"]
    assert probing.go_on() == []
    ((asker, answer),) = probing.go_on()
    assert (asker, answer.call_id, [link.source for link in answer.links]) == (b"coordinator", 7, ["a", "b"])
    assert answer.errors == {"c": "c has another layout"}
    assert not probing.busy


def test_who_does_not_answer_is_told_as_out_of_reach_in_time() -> None:
    now_s = 0.0
    port = Port()
    probing = Probing(port, lambda: now_s)
    probing.begin(b"coordinator", ProbeLinks(7, [A]))
    assert probing.go_on() == []
    now_s = REACHED_WITHIN_S + 0.1
    ((_, answer),) = probing.go_on()
    assert answer.links == []
    assert "no answer" in answer.errors["a"]


def test_nobody_to_measure_is_answered_at_once() -> None:
    probing = Probing(Port(), lambda: 0.0)
    probing.begin(b"coordinator", ProbeLinks(7, []))
    ((_, answer),) = probing.go_on()
    assert (answer.links, answer.errors) == ([], {})
