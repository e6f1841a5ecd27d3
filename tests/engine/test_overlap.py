"""Two batches under way at a time: the second begins when the first is over, after the token it makes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import pytest

from engine.base import BatchPlan, Output, Seq, StepReport, StepResult
from engine.batch import Duty, Moment
from engine.messages import Credit, Message, Report
from engine.node import Node
from engine.outbox import attempt_key
from engine.request import Pace, RoleName, WorkKind
from engine.socket import Heard
from kv_transfer.fake import FakeFabric
from tests.engine.scripted_engine import COST, ScriptedEngine
from tests.engine.served_node import submit

TPOT_S, TTFT_S, STEP_S = 0.05, 30.0, 0.03
ASKED = submit("a", pace=Pace(first_token_left_s=TTFT_S, tpot_s=TPOT_S), max_tokens=9)
A = attempt_key(ASKED)
WAITING = Seq(A, 20, 0, 0, running=False)
UNDER_WAY = Seq(A, 20, 20, 1, running=True)  # its first token is being made


class Overlapping(ScriptedEngine):
    overlaps = True


class Asked:
    """A role that notes what it is asked."""

    name = RoleName.MIXED

    def __init__(self) -> None:
        self.moments: list[Moment] = []
        self.duties: list[dict[str, Duty]] = []

    def declines(self, kind: WorkKind) -> str | None:
        return None

    def compose(self, seqs: Sequence[Seq], duties: Mapping[str, Duty], moment: Moment) -> BatchPlan:
        self.moments.append(moment)
        self.duties.append(dict(duties))
        first = len(self.moments) == 1
        return BatchPlan(depth={A: 2 if first else 0}, chunk_tokens={A: 20 if first else 1}, expected_s=STEP_S)


class Line:
    """Nobody at the other end."""

    report: Report | None = None
    reported_s = 0.0
    step_began_s: float | None = None

    def __init__(self, *messages: Message) -> None:
        self.coming = [Heard(b"endpoint", message, 100.0) for message in messages]
        self.sent: list[Message] = []

    def start(self) -> None: ...

    def tell(self) -> None: ...

    def stop(self) -> None: ...

    def send(self, peer: bytes, message: Message) -> None:
        self.sent.append(message)

    def drain(self, wait_s: float = 0.0) -> list[Heard]:
        came, self.coming = self.coming, []
        return came

    def heard(self) -> list[tuple[bytes, float]]:
        return []

    def forget(self, peer: bytes, heard_s: float) -> None: ...


def _node(engine: ScriptedEngine) -> tuple[Node, Asked, Line]:
    role, line = Asked(), Line(Credit(9), ASKED)
    info = dataclasses.replace(engine.start(), max_draft_tokens=4)
    node = Node("n", engine, info, {RoleName.MIXED: role}, RoleName.MIXED, COST, line, clock=lambda: 100.0)
    node.hear()
    return node, role, line


def test_a_batch_is_composed_for_when_the_one_before_it_is_over() -> None:
    node, role, line = _node(Overlapping(FakeFabric(lambda: 100.0)))
    node.compose([WAITING])
    assert node.take(StepResult([], None, begun=True)), "it runs: nothing to wait for"
    assert line.report is not None
    assert line.report.in_flight_s == pytest.approx(STEP_S)
    node.compose([UNDER_WAY])
    assert [moment.now_s for moment in role.moments] == [100.0, pytest.approx(100.0 + STEP_S)]
    due_s = 100.0 + TTFT_S
    assert role.duties[0][A].due_s == due_s
    assert role.duties[1][A].due_s == pytest.approx(due_s + TPOT_S), "of the token after the one under way"


def test_tokens_are_those_of_the_batch_that_is_over_and_so_are_its_drafts() -> None:
    node, _, _ = _node(Overlapping(FakeFabric(lambda: 100.0)))
    node.compose([WAITING])
    node.take(StepResult([], None, begun=True))
    node.compose([UNDER_WAY])
    ran = StepReport(STEP_S, 20, 1, 0, 0, 0.0)
    node.take(StepResult([Output(A, (7, 8))], ran, {A}, begun=True))
    account = node._promises[A].account
    assert (account.drafted_tokens, account.accepted_tokens) == (2, 1)
    node.take(StepResult([Output(A, (9,))], ran, {A}))
    assert (account.drafted_tokens, account.accepted_tokens) == (2, 1)


def test_a_batch_that_does_not_begin_is_not_waited_for_nor_taken_for_the_one_whose_tokens_come() -> None:
    node, role, line = _node(Overlapping(FakeFabric(lambda: 100.0)))
    node.compose([WAITING])
    node.take(StepResult([], None, begun=True))
    node.compose([UNDER_WAY])  # finds no memory: the step gives what the first one gave
    ran = StepReport(STEP_S, 20, 1, 0, 0, 0.0)
    node.take(StepResult([Output(A, (7, 8))], ran, {A}))
    assert node._promises[A].account.drafted_tokens == 2
    told = line.report
    node.compose([UNDER_WAY])
    assert role.moments[-1].now_s == 100.0, "nothing is under way"
    assert line.report is told, "a batch that may not begin either is not told of"


def test_an_engine_that_runs_one_at_a_time_begins_the_next_at_once() -> None:
    node, role, _ = _node(ScriptedEngine(FakeFabric(lambda: 100.0)))
    node.compose([WAITING])
    node.take(StepResult([], None))  # nothing could run
    node.compose([WAITING])
    assert [moment.now_s for moment in role.moments] == [100.0, 100.0]
    assert role.duties[1][A].due_s == 100.0 + TTFT_S
