"""Many nodes behind one socket and in one thread: each answers as a node of its own would."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import zmq

from engine.cost import StepCost
from engine.messages import Alive, Credit, Deltas, Message, Report, Reports, Submit, Watch, decode, encode
from engine.request import Pace, RoleName, WorkKind
from tests.engine.hosted import Hosted, hosting
from tests.engine.served_node import submit

PATIENCE_S = 5.0
NODES = {"p": RoleName.PREFILL, "d": RoleName.DECODE, "m": RoleName.MIXED}
PACE = Pace(first_token_left_s=30.0, tpot_s=1.0)


class Peer:
    """Somebody who links to the host, by hand."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str, name: str) -> None:
        self._socket = context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, name.encode())
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(address)
        self.heard: list[tuple[str, Message]] = []

    def send(self, channel: str, *messages: Message) -> None:
        for message in messages:
            self._socket.send_multipart([channel.encode(), *encode(message)])

    def listen(self, seconds: float) -> list[tuple[str, Message]]:
        """What comes in this time."""
        began = len(self.heard)
        deadline_s = time.monotonic() + seconds
        while self._take(deadline_s - time.monotonic()):
            pass
        return self.heard[began:]

    def _take(self, wait_s: float) -> bool:
        if wait_s <= 0 or not self._socket.poll(int(wait_s * 1e3)):
            return False
        channel, *frames = self._socket.recv_multipart()
        self.heard.append((channel.decode(), decode(frames)))
        return True

    def stream(self, channel: str) -> Deltas:
        """The message that ends a stream on a channel."""
        deadline_s = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline_s:
            for name, message in self.heard:
                if name == channel and isinstance(message, Deltas) and message.items[-1].finish_reason:
                    return message
            self.send("", Watch(reports=False))
            self._take(0.05)
        raise AssertionError(f"no end on {channel}; heard {self.heard[-5:]}")

    def tokens(self, channel: str) -> list[int]:
        """What was said on a channel so far."""
        deltas = [message for name, message in self.heard if name == channel and isinstance(message, Deltas)]
        return [token for message in deltas for delta in message.items for token in delta.token_ids]

    def close(self) -> None:
        self._socket.close()


@pytest.fixture(scope="module")
def hosted() -> Iterator[Hosted]:
    with hosting(NODES, cost=StepCost.line(base_s=0.005, per_token_s=1e-6)) as served:
        yield served


@pytest.fixture
def peer(hosted: Hosted, request: pytest.FixtureRequest) -> Iterator[Peer]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    linked = Peer(context, hosted.address, request.node.name)
    yield linked
    linked.close()
    context.term()


def reports(heard: list[tuple[str, Message]]) -> list[Report]:
    """All reports, whatever message they came in."""
    return [report for _, message in heard if isinstance(message, Reports) for report in message.items]


def test_each_channel_leads_to_its_node(peer: Peer) -> None:
    for channel in ("m:0", "d:1"):
        peer.send(channel, Credit(100), submit(f"on-{channel}", max_tokens=4))
    for channel in ("m:0", "d:1"):
        ended = peer.stream(channel)
        assert ended.node == channel[0]
        assert {delta.request_id for delta in ended.items} == {f"on-{channel}"}
    assert len(peer.tokens("m:0")) == 4
    assert peer.tokens("m:0") == peer.tokens("d:1"), "the same prompt"


def test_a_pair_of_one_host_hands_over(peer: Peer, hosted: Hosted) -> None:
    ask = submit("r", 100, kind=WorkKind.PREFILL)
    peer.send("p:0", Credit(10), ask)
    handoff = peer.stream("p:0").items[-1].handoff
    assert handoff is not None
    peer.send("d:1", Credit(10), submit("r", 100, max_tokens=5, kind=WorkKind.DECODE, handoff=handoff))
    peer.stream("d:1")
    deltas = [message for name, message in peer.heard if name == "d:1" and isinstance(message, Deltas)]
    timing = deltas[0].items[0].timing
    assert timing is not None
    assert timing.pull_outcome == "pulled"
    deadline_s = time.monotonic() + PATIENCE_S
    while hosted.engines["p"].usage().used_blocks and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert hosted.engines["p"].usage().used_blocks == 0, "the source was stirred and freed the blocks"


def test_a_link_that_is_made_anew_begins_with_no_credit(peer: Peer) -> None:
    peer.send("m:0", Credit(100))
    peer.send("m:1", submit("r"))
    heard = peer.listen(0.5)
    assert [type(message).__name__ for name, message in heard if name == "m:1"] == ["Declined"]


def test_the_host_answers_for_all_and_reports_only_what_has_changed(peer: Peer) -> None:
    peer.send("", Watch(reports=True))
    for channel in ("m:0", "d:1"):
        peer.send(channel, Watch(reports=True))
    first = peer.listen(1.0)
    assert next(message for name, message in first if name == "") == Alive("host", 0.0)
    assert {report.node for report in reports(first)} == {"m", "d"}
    peer.send("", Watch(reports=True))
    assert reports(peer.listen(1.0)) == [], "idle nodes have no news"
    peer.send("m:0", Credit(100), submit("r", max_tokens=3))
    peer.send("", Watch(reports=True))
    news = reports(peer.listen(1.5))
    assert {report.node for report in news} == {"m"}
    assert news[-1].steps > 0
    assert news[-1].works == []
    assert all(report.age_s < 0.5 for report in news)


def test_who_falls_silent_loses_its_work_on_every_channel(peer: Peer, hosted: Hosted) -> None:
    peer.send("m:0", Credit(10), submit("r", 20, max_tokens=1000))
    peer.send("", Watch(reports=False))
    peer.listen(0.2)
    assert hosted.engines["m"].usage().running == 1
    deadline_s = time.monotonic() + 2 * PATIENCE_S
    while hosted.engines["m"].has_work() and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert not hosted.engines["m"].has_work()


def test_what_is_for_no_node_is_counted_and_harms_nothing(peer: Peer, hosted: Hosted) -> None:
    peer.send("nobody:0", Credit(1))
    peer.send("", Submit("r", 1, WorkKind.WHOLE, [1], b"", 1, PACE))
    peer._socket.send_multipart([b"alone"])
    peer.send("m:0", Credit(100), submit("r", max_tokens=2))
    peer.stream("m:0")
    assert hosted.host._socket.rejected_messages == 3
