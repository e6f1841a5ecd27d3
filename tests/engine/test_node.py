"""What a node promises to those who ask it for work: real nodes, real sockets, a scripted engine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from engine import node
from engine.drafting import Drafting
from engine.errors import RequestError
from engine.messages import (
    Alive,
    Cancel,
    CloseSession,
    Credit,
    Declined,
    Deltas,
    LinksProbed,
    ListPrefixes,
    ListSessions,
    PrefixesListed,
    ProbeLinks,
    Promote,
    Release,
    Report,
    RoleSet,
    SessionsListed,
    SetRole,
    Submit,
)
from engine.node import LEASE_WAIT_S, NO_CREDIT
from engine.prefix_log import PrefixChanges
from engine.promise import Promise
from engine.request import BEST_EFFORT, Pace, RoleName, WorkKind
from kv_transfer.base import PeerAddress, TransferError
from kv_transfer.fake import Faults
from tests.engine.scripted_engine import BLOCK_TOKENS, COST, PATIENCE_S, STEP_S
from tests.engine.served_node import Client, Serve, Served, expected, is_idle, serving, submit, the_work

LONG = 100_000  # tokens, of a stream that does not end by itself


@pytest.fixture
def serve() -> Iterator[Serve]:
    with serving() as start:
        yield start


# ---- answers ---------------------------------------------------------------------------------------------


def test_a_submit_is_answered_token_by_token(serve: Serve) -> None:
    client = serve().client("endpoint")
    ask = submit("r", max_tokens=5, attempt=3)
    client.send(ask)
    assert client.stream("r") == expected(ask)
    deltas = client.deltas("r")
    assert [delta.index for delta in deltas] == [0, 1, 2, 3, 4]
    assert {delta.attempt for delta in deltas} == {3}
    assert [delta.finish_reason for delta in deltas] == [None] * 4 + ["length"]
    assert [delta.timing is not None for delta in deltas] == [True] + [False] * 4


def test_from_the_end_of_thinking_on_the_pace_is_that_of_the_answer(serve: Serve) -> None:
    served = serve()
    client, coordinator = served.client("endpoint"), served.coordinator()
    ask = submit("r", max_tokens=60)
    thought = 20
    end_id = expected(ask)[thought - 1]
    assert end_id not in expected(ask)[: thought - 1]
    client.send(replace(ask, think_end_id=end_id, pace=Pace(5.0, 0.04, answer_tpot_s=0.3)))
    before = the_work(
        coordinator.report(lambda report: bool(report.works) and the_work(report).output_tokens > 0)
    )
    assert before.tpot_s == 0.04
    after = the_work(coordinator.report(lambda report: the_work(report).output_tokens > thought))
    assert after.tpot_s == 0.3
    assert after.next_due_left_s is not None
    # From the first deadline, 19 tokens at one pace and the rest at the other.
    left_s = after.first_token_left_s + 19 * 0.04 + (after.output_tokens - 19) * 0.3
    assert after.next_due_left_s == pytest.approx(left_s, abs=0.01)
    assert client.stream("r") == expected(ask)


def test_a_stream_goes_on_after_what_was_said_of_it_elsewhere(serve: Serve) -> None:
    served = serve()
    client, coordinator = served.client("endpoint"), served.coordinator()
    ask = submit("r", 40, max_tokens=20, attempt=2)
    said = expected(ask)[:12]
    client.send(replace(ask, said_token_ids=said))
    work = the_work(coordinator.report(lambda report: bool(report.works)))
    assert (work.prompt_tokens, work.max_tokens) == (52, 8)  # to a plan, all that is known is prompt
    client.until(Deltas, lambda deltas: any(delta.finish_reason for delta in deltas.items))
    deltas = client.deltas("r")
    assert [token_id for delta in deltas for token_id in delta.token_ids] == expected(ask)[12:]
    assert [delta.index for delta in deltas] == list(range(12, 20))


def test_an_end_says_what_was_done_for_it(serve: Serve) -> None:
    served = serve()
    client = served.client("endpoint")
    client.send(submit("r", 40, max_tokens=5))
    client.stream("r")
    deltas = client.deltas("r")
    assert [delta.account is not None for delta in deltas] == [False] * 4 + [True]
    account = deltas[-1].account
    assert account is not None
    assert (account.batches, account.chunks) == (5, 1)
    assert (account.held, account.preempted, account.drafted_tokens) == (0, 0, 0)


def test_a_prefill_is_answered_with_a_handoff_under_a_lease(serve: Serve) -> None:
    served = serve(RoleName.PREFILL)
    client = served.client("endpoint")
    client.send(submit("r", 40, kind=WorkKind.PREFILL))
    assert len(client.stream("r")) == 1, "the first token"
    handoff = client.deltas("r")[-1].handoff
    assert handoff is not None
    assert handoff.num_tokens == 3 * BLOCK_TOKENS
    (lease,) = served.coordinator().report().leases
    assert (lease.request_id, lease.num_blocks) == (handoff.request_id, 3)
    client.send(Release("r", 1))
    served.coordinator("later").report(is_idle)


def test_a_lease_that_nobody_pulls_costs_few_steps(serve: Serve) -> None:
    served = serve()
    client = served.client("endpoint")
    client.send(submit("r", kind=WorkKind.PREFILL))
    client.stream("r")
    before, began_s = served.engine.steps, time.monotonic()
    client.listen(0.3)
    assert 0 < served.engine.steps - before <= 1 + (time.monotonic() - began_s) / LEASE_WAIT_S


def test_a_decode_pulls_its_prompt_and_says_how(serve: Serve) -> None:
    served = serve(RoleName.DECODE)
    client, coordinator = served.client("endpoint"), served.coordinator()
    ask = pulling(served, Faults(delay_s=0.2))
    client.send(ask)
    assert the_work(coordinator.report(lambda report: bool(report.works))).prefill_left_tokens == 0
    assert client.stream("r") == expected(ask)
    timing = client.deltas("r")[0].timing
    assert timing is not None
    assert (timing.pull_outcome, timing.pulled_bytes) == ("pulled", 2 * BLOCK_TOKENS * 4096)
    assert timing.pull_s is not None
    assert timing.first_token_s > timing.pull_s > 0.2
    assert timing.queued_s >= timing.pull_s
    assert coordinator.report(is_idle).local_prefills == 0


def test_a_prompt_whose_kv_came_corrupt_is_computed_and_counted(serve: Serve) -> None:
    served = serve(RoleName.DECODE)
    client, coordinator = served.client("endpoint"), served.coordinator()
    ask = pulling(served, Faults(corrupt=True))
    client.send(ask)
    assert client.stream("r") == expected(ask)
    timing = client.deltas("r")[0].timing
    assert timing is not None
    assert timing.pull_outcome == "corrupt"
    report = coordinator.report(lambda report: report.local_prefills == 1)
    assert report.corrupt_pulls == 1
    assert "blocks are not what was offered" in report.pulls[-1].detail


def test_a_prompt_whose_pull_failed_is_computed_and_counted(serve: Serve) -> None:
    served = serve(RoleName.DECODE)
    served.engine.step_s = 0.3
    client, coordinator = served.client("endpoint"), served.coordinator()
    ask = replace(pulling(served, Faults(source_dead=True)), prompt_token_ids=list(range(150)))
    client.send(ask)
    report = coordinator.report(lambda report: report.local_prefills == 1)
    assert report.pulls[-1].outcome == "failed"
    assert report.corrupt_pulls == 0
    left = coordinator.report(lambda report: the_work(report).prefill_left_tokens > 0)
    assert the_work(left).prefill_left_tokens < 150
    served.engine.step_s = STEP_S
    assert client.stream("r") == expected(ask)
    assert coordinator.report(is_idle).local_prefills == 1


@pytest.mark.parametrize(
    ("role", "kind"),
    [
        (RoleName.PREFILL, WorkKind.DECODE),
        (RoleName.PREFILL, WorkKind.WHOLE),
        (RoleName.DECODE, WorkKind.PREFILL),
    ],
)
def test_work_of_another_role_is_declined_by_name(serve: Serve, role: RoleName, kind: WorkKind) -> None:
    client = serve(role).client("endpoint")
    client.send(submit("r", kind=kind, attempt=2))
    declined = client.until(Declined)
    assert (declined.request_id, declined.attempt) == ("r", 2)
    assert declined.reason == f"a {role} node takes no {kind} work"


def test_a_node_hands_over_the_history_that_it_keeps_for_a_session_whatever_its_role(serve: Serve) -> None:
    served = serve(RoleName.DECODE)
    client, coordinator = served.client("endpoint"), served.coordinator()
    client.send(replace(submit("first", 40, max_tokens=5), session="s"))
    client.stream("first")
    coordinator.report(lambda report: report.sessions == 1)
    client.send(replace(submit("next", 60, kind=WorkKind.PREFILL), session="s"))
    client.stream("next")
    assert client.deltas("next")[-1].handoff is not None
    client.send(replace(submit("stranger", 60, kind=WorkKind.PREFILL), session="t"))
    assert client.until(Declined).request_id == "stranger"


def test_what_is_too_much_to_wait_is_declined(serve: Serve) -> None:
    served = serve(max_waiting=2)
    served.engine.slots = 1
    client = served.client("endpoint")
    client.send(submit("first", max_tokens=LONG))
    client.until(Deltas)
    client.send(*(submit(name, pace=BEST_EFFORT) for name in ("second", "third", "fourth")))
    declined = client.until(Declined)
    assert (declined.request_id, declined.reason) == ("fourth", "2 requests wait here already")
    client.send(Cancel("first", 1))
    assert client.stream("second") == client.stream("third") == expected(submit("second"))


def test_a_promise_is_taken_however_much_best_effort_waits(serve: Serve) -> None:
    served = serve(max_waiting=1)
    served.engine.slots = 1
    client = served.client("endpoint")
    client.send(submit("first", max_tokens=LONG))
    client.until(Deltas)
    client.send(submit("spare", pace=BEST_EFFORT), submit("promised"), Cancel("first", 1))
    assert client.stream("promised") == expected(submit("promised"))
    assert client.stream("spare") == expected(submit("spare"))


def test_what_the_engine_can_never_run_is_the_clients_error(serve: Serve) -> None:
    served = serve()
    served.engine.refuses = RequestError("the prompt is too long")
    client = served.client("endpoint")
    client.send(submit("r"))
    client.stream("r")
    (delta,) = client.deltas("r")
    assert (delta.error, delta.error_status) == ("the prompt is too long", 400)
    assert served.coordinator().report().works == []


def test_the_time_in_the_queue_ends_before_the_batch(serve: Serve) -> None:
    served = serve()
    served.engine.slots = 1
    client = served.client("endpoint")
    client.send(submit("first", max_tokens=30))
    client.send(submit("second", max_tokens=2))
    client.stream("second")
    first, second = (client.deltas(name)[0].timing for name in ("first", "second"))
    assert first is not None
    assert second is not None
    assert first.first_token_s - first.queued_s >= STEP_S  # the prompt fits one batch: no later step sees it
    assert second.first_token_s - second.queued_s >= STEP_S
    assert second.queued_s >= 20 * STEP_S  # planned and not admitted is not batched


# ---- cancel ----------------------------------------------------------------------------------------------


def _queued(served: Served, client: Client) -> None:
    served.engine.slots = 0
    client.send(submit("r"))
    served.coordinator("watcher").report(lambda report: report.usage.waiting == 1)


def _prefilling(served: Served, client: Client) -> None:
    client.send(submit("r", length=64 * 15))
    served.coordinator("watcher").report(
        lambda report: any(0 < work.prefill_left_tokens < 64 * 14 for work in report.works)
    )


def _pulling(served: Served, client: Client) -> None:
    client.send(pulling(served, Faults(delay_s=0.3)))
    served.coordinator("watcher").report(lambda report: report.usage.used_blocks == 2)


def _decoding(served: Served, client: Client) -> None:
    client.send(submit("r", max_tokens=LONG))
    client.until(Deltas)


def _offered(served: Served, client: Client) -> None:
    client.send(submit("r", kind=WorkKind.PREFILL))
    client.stream("r")
    assert served.coordinator("watcher").report().leases


def pulling(served: Served, faults: Faults) -> Submit:
    """Work that pulls from a source with faults."""
    source = served.source()
    source.faults = faults
    source.compute("elsewhere#1", [b"a", b"b"])
    return submit("r", 2 * BLOCK_TOKENS, kind=WorkKind.DECODE, handoff=source.offer("elsewhere#1"))


@pytest.mark.parametrize("reach", [_queued, _prefilling, _pulling, _decoding, _offered])
def test_cancel_in_each_phase_frees_everything(serve: Serve, reach: Callable[[Served, Client], None]) -> None:
    served = serve()
    served.engine.step_s = 0.02 if reach is _prefilling else STEP_S
    client = served.client("endpoint")
    reach(served, client)
    client.send(Cancel("r", 1))
    report = served.coordinator().report(is_idle)
    assert (report.usage.running, report.usage.waiting) == (0, 0)
    assert report.local_prefills == 0  # a pull that nobody wants any more is recomputed by nobody


def test_output_of_a_cancelled_attempt_is_not_sent(serve: Serve) -> None:
    served = serve()
    client = served.client("endpoint", credit=1)
    client.send(submit("r", max_tokens=LONG), submit("other", max_tokens=10))
    coordinator = served.coordinator()
    coordinator.report(lambda report: len(report.works) == 1 and report.works[0].output_tokens > 20)
    client.send(Cancel("r", 1))
    coordinator.report(is_idle)
    client.send(Credit(512))
    assert client.stream("other") == expected(submit("other", max_tokens=10))
    client.listen(0.1)
    assert len(client.tokens("r")) <= 1  # what the one credit had let out before


# ---- credit ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("payload_every", [None, 3])
def test_credit_bounds_messages_and_late_credit_loses_nothing(serve: Serve, payload_every: int | None) -> None:
    served = serve()
    served.engine.payload_every = payload_every
    client = served.client("endpoint", credit=2)
    asks = [submit("a", 20, 30), submit("b", 25, 17)]
    client.send(*asks)
    served.coordinator().report(lambda report: report.steps >= 30 and is_idle(report))
    client.listen(0.05)
    assert sum(isinstance(message, Deltas) for message in client.heard) == 2
    client.send(Credit(1))
    for ask in asks:
        assert client.stream(ask.request_id) == expected(ask)
    assert sum(isinstance(message, Deltas) for message in client.heard) == 3
    held = [delta for delta in client.deltas("a") if len(delta.token_ids) > 1]
    assert held  # tokens that waited came together
    payloads = sum(delta.payload is not None for delta in client.deltas("a"))
    assert payloads == (0 if payload_every is None else 10)


# ---- silence ---------------------------------------------------------------------------------------------


def test_a_silent_endpoint_loses_its_work_and_can_go_on_when_it_wakes(serve: Serve) -> None:
    served = serve()
    client, coordinator = served.client("endpoint", credit=512), served.coordinator()
    client.send(submit("stream", max_tokens=LONG), submit("offer", kind=WorkKind.PREFILL))
    client.stream("offer")
    served.put_clock_forward(4.0)
    coordinator.report(is_idle)
    declined = client.until(Declined)
    assert (declined.request_id, declined.attempt) == ("stream", 1)
    assert "had been silent" in declined.reason
    again = submit("again")
    client.send(again)
    assert client.stream("again") == expected(again)
    assert [m.request_id for m in client.heard if isinstance(m, Declined)] == ["stream"]


def test_a_silent_endpoint_is_told_of_what_it_was_never_sent(serve: Serve) -> None:
    served = serve()
    client, coordinator = served.client("endpoint", credit=0), served.coordinator()
    client.send(submit("over"), submit("offer", kind=WorkKind.PREFILL))
    coordinator.report(lambda report: len(report.works) == 1 and bool(report.leases))
    served.put_clock_forward(4.0)
    coordinator.report(is_idle)
    client.until(Declined)
    client.listen(0.05)
    assert sorted(m.request_id for m in client.heard if isinstance(m, Declined)) == ["offer", "over"]
    client.send(Credit(8), submit("again"))
    assert client.stream("again") == expected(submit("again"))
    assert client.deltas("over") == []


def test_silence_of_one_endpoint_costs_another_nothing(serve: Serve) -> None:
    served = serve(peer_silent_s=1.5)
    sleeper, client = served.client("sleeper"), served.client("endpoint")
    sleeper.send(submit("lost", max_tokens=LONG))
    sleeper.until(Deltas)
    client.send(submit("kept", max_tokens=LONG))
    client.until(Deltas)
    client.report(lambda report: [work.request_id for work in report.works] == ["kept"])
    before = len(client.tokens("kept"))
    client.send(Credit(8))
    client.until(Deltas)
    assert len(client.tokens("kept")) > before
    assert sleeper.until(Declined).request_id == "lost"


def test_a_forgotten_endpoint_is_told_to_reconnect(serve: Serve) -> None:
    served = serve()
    client, coordinator = served.client("endpoint"), served.coordinator()
    client.send(submit("first"))
    client.stream("first")
    served.put_clock_forward(70.0)
    coordinator.report()
    coordinator.listen(0.25)  # until its next upkeep
    client.send(submit("second", attempt=2))
    assert client.until(Declined) == Declined("second", 2, NO_CREDIT)
    client.send(Credit(8), submit("second", attempt=3))
    assert client.stream("second") == expected(submit("second"))


# ---- what it reports -------------------------------------------------------------------------------------


def test_a_change_of_role_is_read_back_and_keeps_the_streams(serve: Serve) -> None:
    served = serve(RoleName.DECODE)
    client, coordinator = served.client("endpoint"), served.coordinator()
    client.send(submit("r", max_tokens=100))
    client.until(Deltas)
    coordinator.send(SetRole(7, RoleName.PREFILL))
    assert coordinator.until(RoleSet) == RoleSet(7, RoleName.PREFILL)
    assert coordinator.report().role is RoleName.PREFILL
    pause_s = coordinator.report(lambda report: report.role_pause_s is not None).role_pause_s
    assert pause_s is not None
    assert 0 <= pause_s < PATIENCE_S
    assert client.stream("r") == expected(submit("r", max_tokens=100))


def test_what_was_placed_before_a_change_of_role_is_taken_after_it_for_a_while(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serve(RoleName.DECODE)
    client, coordinator = served.client("endpoint"), served.coordinator()
    coordinator.send(SetRole(7, RoleName.PREFILL))
    coordinator.until(RoleSet)
    client.send(submit("on its way"))
    assert client.stream("on its way") == expected(submit("on its way"))
    monkeypatch.setattr("engine.node.ROLE_GRACE_S", 0.0)
    coordinator.send(SetRole(8, RoleName.DECODE), SetRole(9, RoleName.PREFILL))
    coordinator.until(RoleSet, lambda done: done.call_id == 9)
    client.send(submit("late"))
    assert client.until(Declined).reason == "a prefill node takes no whole work"
    assert coordinator.report().role_pause_s is None, "nothing went on that could have paused"


def test_kv_of_a_session_is_listed_and_kept_until_its_time_is_over_or_it_is_closed(serve: Serve) -> None:
    served = serve(session_ttl_s=60.0)
    client, coordinator = served.client("endpoint"), served.coordinator()
    for name in ("s", "t"):
        client.send(submit(name, length=40, session=name))
        client.stream(name)
    report = coordinator.report(lambda report: report.sessions == 2)
    assert report.session_tokens == 2 * 44
    coordinator.send(ListSessions(3))
    listed = coordinator.until(SessionsListed)
    assert listed == SessionsListed(3, report.sessions_version, {"s": 44, "t": 44})
    coordinator.send(CloseSession("s"))
    closed = coordinator.report(lambda report: report.sessions == 1)
    assert closed.sessions_version != report.sessions_version
    served.put_clock_forward(61.0)
    assert coordinator.report(lambda report: report.sessions == 0).session_tokens == 0
    assert served.engine.kept() == {}


def test_what_the_prefix_cache_holds_is_told_as_it_changes(serve: Serve) -> None:
    served = serve()
    coordinator, log = served.coordinator(), served.engine.prefixes
    before = coordinator.report()
    log.add([1, 2, 3])
    report = coordinator.report(lambda report: report.prefixes_version != before.prefixes_version)
    log.discard([2])
    coordinator.send(ListPrefixes(4, before.prefixes_version), ListPrefixes(5, report.prefixes_version))
    of_all, of_one = coordinator.until(PrefixesListed), coordinator.until(PrefixesListed)
    assert of_all == PrefixesListed(4, PrefixChanges(log.version, added=[1, 3], gone=[2]))
    assert of_one == PrefixesListed(5, PrefixChanges(log.version, gone=[2]))


def test_a_history_is_kept_where_it_ends_and_not_where_its_prompt_was_computed() -> None:
    def kept_for(kind: WorkKind) -> str | None:
        return Promise.of(submit("r", kind=kind, session="s"), b"", 0.0, Drafting(0)).work().session

    assert [kept_for(kind) for kind in (WorkKind.WHOLE, WorkKind.DECODE, WorkKind.PREFILL)] == ["s", "s", None]


@pytest.mark.parametrize("skew_s", [0.0, 5.0, -5.0])
def test_a_new_coordinator_learns_every_promise_with_its_time_left(serve: Serve, skew_s: float) -> None:
    served = serve(skew_s=skew_s)
    served.engine.slots = 0
    client = served.client("endpoint")
    sent_s = time.monotonic()
    pace = Pace(first_token_left_s=7.0, tpot_s=0.05)
    client.send(submit("r", 33, 12, attempt=4, pace=pace), submit("o", kind=WorkKind.PREFILL))
    # One of now, and not of when a batch ends that was announced: it will find no slot.
    coordinator = served.coordinator("new")
    report = coordinator.report(lambda report: len(report.works) == 2 and report.in_flight_s == 0)
    work = next(work for work in report.works if work.request_id == "r")
    passed_s = time.monotonic() - sent_s
    assert 7.0 - passed_s <= work.first_token_left_s <= 7.0
    assert (work.attempt, work.kind, work.tpot_s) == (4, WorkKind.WHOLE, 0.05)
    assert (work.prompt_tokens, work.prefill_left_tokens) == (33, 32)
    assert (work.output_tokens, work.max_tokens, work.best_effort) == (0, 12, False)


def test_a_report_shows_leases_with_their_time_left(serve: Serve) -> None:
    served = serve(skew_s=5.0)
    client = served.client("endpoint")
    client.send(submit("r", 40, kind=WorkKind.PREFILL))
    client.stream("r")
    report = served.coordinator().report()
    (lease,) = report.leases
    assert 25.0 < lease.left_s <= 30.0
    assert the_work(report).prefill_left_tokens == 0


def test_what_comes_during_a_step_is_due_by_when_it_came(serve: Serve) -> None:
    served = serve()
    client, coordinator = served.client("endpoint"), served.coordinator()
    client.send(submit("before", max_tokens=LONG), submit("promoted", max_tokens=LONG, pace=BEST_EFFORT))
    coordinator.report(lambda report: len(report.works) == 2)
    served.engine.gate.clear()
    coordinator.until(Report, lambda report: report.stuck_s > 0.05)
    client.send(
        submit("during", max_tokens=LONG, pace=Pace(10.0, 1.0)), Promote("promoted", 1, Pace(20.0, 1.0))
    )
    sent_s = time.monotonic()
    coordinator.until(Report, lambda report: report.stuck_s > 0.8)
    served.engine.gate.set()
    report = coordinator.report(lambda report: len(report.works) == 3)
    gone_s = time.monotonic() - sent_s
    left_s = {work.request_id: work.first_token_left_s for work in report.works}
    assert gone_s > 0.6
    assert left_s["during"] == pytest.approx(10.0 - gone_s, abs=0.2)
    assert left_s["promoted"] == pytest.approx(20.0 - gone_s, abs=0.2)


def test_a_step_that_hangs_is_told_while_it_hangs(serve: Serve) -> None:
    served = serve()
    client, coordinator = served.client("endpoint"), served.coordinator()
    client.send(submit("r", max_tokens=LONG))
    client.until(Deltas)
    served.engine.gate.clear()
    coordinator.until(Report, lambda report: report.stuck_s > 0.3)
    client.until(Alive, lambda alive: alive.stuck_s > 0.3)
    served.engine.gate.set()
    coordinator.report(lambda report: report.stuck_s < 0.1)


def test_the_first_step_is_the_first_average_of_steps(serve: Serve) -> None:
    served = serve()
    served.engine.reported_s = 0.5
    client, coordinator = served.client("endpoint"), served.coordinator()
    assert coordinator.report().step_s == 0.0
    client.send(submit("r", max_tokens=1))
    client.stream("r")
    assert coordinator.report(lambda report: report.steps == 1).step_s == 0.5


def test_what_is_done_between_two_steps_delays_the_next_token_and_counts(serve: Serve) -> None:
    served = serve()
    predicted_s = COST.predict(1)
    served.engine.reported_s, served.engine.step_s = 0.5 * predicted_s, 4 * predicted_s
    client, coordinator = served.client("endpoint"), served.coordinator()
    client.send(submit("r", max_tokens=60))
    client.stream("r")
    report = coordinator.report(is_idle)
    assert report.cost.drift > 2 * report.idle_cost.drift


def test_an_idle_node_forgets_that_it_was_slow(serve: Serve) -> None:
    served = serve()
    served.engine.reported_s = 10 * COST.predict(1)
    client, coordinator = served.client("endpoint"), served.coordinator()
    client.send(submit("r", max_tokens=60))
    client.stream("r")
    slow = coordinator.report(is_idle)
    assert slow.cost.drift > 3 * slow.idle_cost.drift
    served.put_clock_forward(60.0)
    rested = coordinator.report(lambda report: report.cost.drift < 1.1 * report.idle_cost.drift)
    assert rested.cost.predict(100) == pytest.approx(rested.idle_cost.predict(100), rel=0.1)


# ---- soft admission --------------------------------------------------------------------------------------


def test_best_effort_that_is_promised_after_all_is_a_promise_from_then_on(serve: Serve) -> None:
    served = serve()
    served.engine.slots = 0  # it waits
    client, coordinator = served.client("endpoint"), served.coordinator()
    client.send(submit("r", pace=BEST_EFFORT, class_name="chatbot"))
    assert the_work(coordinator.report(lambda report: bool(report.works))).best_effort
    client.send(Promote("r", 1, Pace(first_token_left_s=3.0, tpot_s=0.2)))
    promised = the_work(coordinator.report(lambda report: not the_work(report).best_effort))
    assert promised.first_token_left_s == pytest.approx(3.0, abs=1.0)
    assert (promised.tpot_s, promised.class_name) == (0.2, "chatbot")


def test_a_promise_that_comes_just_after_the_first_token_still_counts(serve: Serve) -> None:
    """The coordinator that made it could not know of the token yet."""
    served = serve()
    client, coordinator = served.client("endpoint"), served.coordinator()
    client.send(submit("r", max_tokens=LONG, pace=BEST_EFFORT))
    coordinator.report(lambda report: bool(report.works) and the_work(report).output_tokens > 0)
    client.send(Promote("r", 1, Pace(first_token_left_s=3.0, tpot_s=0.2)))
    client.send(Promote("never-heard-of", 1, Pace(first_token_left_s=3.0, tpot_s=0.2)))
    promised = the_work(coordinator.report(lambda report: not the_work(report).best_effort))
    assert promised.next_due_left_s is not None
    assert promised.next_due_left_s > 0


# ---- what fails ------------------------------------------------------------------------------------------


def test_an_engine_that_fails_hands_its_work_back_but_for_offers(serve: Serve) -> None:
    served = serve()
    client = served.client("endpoint")
    client.send(submit("offer", kind=WorkKind.PREFILL))
    client.stream("offer")
    client.send(submit("r", max_tokens=LONG, attempt=2))
    client.until(Deltas)
    served.engine.fails = RuntimeError("the device is gone")
    assert client.until(Declined) == Declined("r", 2, "node: the engine failed")
    client.listen(0.1)
    assert sum(isinstance(message, Declined) for message in client.heard) == 1
    assert [str(error) for error in served.raised] == ["the device is gone"]


def test_a_submit_that_breaks_the_engines_intake_is_declined_and_undone(serve: Serve) -> None:
    served = serve()
    served.engine.refuses = MemoryError("no room for its prompt")
    client = served.client("endpoint")
    client.send(submit("r", max_tokens=LONG, attempt=2))
    declined = client.until(Declined)
    assert (declined.request_id, declined.attempt) == ("r", 2)
    assert "no room for its prompt" in declined.reason
    served.coordinator().report(is_idle)
    client.send(submit("r2"))
    assert client.stream("r2") == expected(submit("r2"))


def test_a_second_copy_of_a_submit_does_not_end_the_first(serve: Serve) -> None:
    client = serve().client("endpoint")
    client.send(submit("r", max_tokens=50), submit("r", max_tokens=50))
    assert client.until(Declined).reason == "this attempt is here already"
    assert client.stream("r") == expected(submit("r", max_tokens=50))


def test_bad_messages_are_survived(serve: Serve) -> None:
    served = serve()
    client = served.client("endpoint")
    client.send(submit("r", max_tokens=100))
    client.until(Deltas)
    client.send_raw(b"garbage")
    client.send_raw(b"Submit/1", b"\x81\xa1x\x01")
    client.send_raw(b"Submit/999", b"")
    client.send(Alive("not for a node", 0.0), Cancel("unknown", 1), Cancel("r", 2))
    assert client.stream("r") == expected(submit("r", max_tokens=100))


@pytest.mark.parametrize("error", [TransferError("another layout"), OSError("no such host")])
def test_a_probe_that_fails_is_answered_for_every_peer(serve: Serve, error: Exception) -> None:
    served = serve()
    served.engine.port.probe_fails = error
    coordinator = served.coordinator()
    coordinator.send(ProbeLinks(3, [PeerAddress("a", "host", 1), PeerAddress("b", "host", 2)]))
    probed = coordinator.until(LinksProbed)
    assert (probed.call_id, probed.links, set(probed.errors)) == (3, [], {"a", "b"})
    assert all(str(error) in text for text in probed.errors.values())
    served.engine.port.probe_fails = None
    served.source()
    coordinator.send(ProbeLinks(4, [PeerAddress("source", "host", 1)]))
    (link,) = coordinator.until(LinksProbed).links
    assert (link.source, link.target) == ("source", "engine")


def test_the_first_batch_after_steps_that_had_nothing_to_run_is_told_of_as_well(serve: Serve) -> None:
    served = serve()
    client, coordinator = served.client("endpoint"), served.coordinator()
    client.send(submit("lease", kind=WorkKind.PREFILL))
    coordinator.report(lambda report: len(report.leases) == 1)
    stepped = served.engine.steps
    coordinator.report(lambda _: served.engine.steps > stepped + 10)  # for the lease: there is no batch
    served.engine.step_s = 0.4
    client.send(submit("r", max_tokens=LONG))
    report = coordinator.until(Report, lambda report: report.in_flight_s > 0)
    assert report.age_s < 0.4, "it came before the batch had ended"
    assert "r" in [work.request_id for work in report.works]


def test_a_batch_is_told_of_as_it_begins_with_the_works_as_they_will_be(serve: Serve) -> None:
    served = serve()
    served.engine.step_s = 0.4
    client, coordinator = served.client("endpoint"), served.coordinator()
    coordinator.until(Report)
    client.send(submit("r", max_tokens=LONG))
    report = coordinator.until(Report, lambda report: report.in_flight_s > 0)
    assert report.age_s < 0.4, "it came before the batch had ended"
    work = the_work(report)
    assert (work.prefill_left_tokens, work.output_tokens) == (0, 1)
    assert work.next_due_left_s is not None
    assert work.next_due_left_s >= work.tpot_s, "counted from the end of the batch"


def test_a_node_that_has_nothing_left_says_so_at_once(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node, "REPORT_EVERY_S", 60.0)
    served = serve()
    client, coordinator = served.client("endpoint"), served.coordinator()
    coordinator.until(Report)
    client.send(submit("r", max_tokens=3))
    assert coordinator.until(Report, lambda report: report.steps >= 3).works == []
