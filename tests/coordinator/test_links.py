"""Links by name: measured, learned, forgotten with the engine that they led to."""

from __future__ import annotations

from coordinator.links import GivenLinks, MeasuredLinks
from kv_transfer.base import Link, Pull, PullOutcome


def _links() -> MeasuredLinks:
    links = MeasuredLinks()
    links.node_is("p", "p-1")
    links.node_is("d", "d-1")
    links.measured([Link("p-1", "d-1", 0.001, 1e9)])
    return links


def test_a_probe_is_found_by_the_names_of_the_nodes() -> None:
    assert _links().by_name() == {("p", "d"): Link("p", "d", 0.001, 1e9)}
    assert _links().unmeasured(["p", "d"]) == [("d", "p")]


def test_a_node_that_started_anew_has_no_links_until_it_is_probed() -> None:
    links = _links()
    links.node_is("p", "p-2")
    assert links.by_name() == {}
    assert ("p", "d") in links.unmeasured(["p", "d"])


def test_a_failed_probe_is_told_and_tried_again_only_when_asked() -> None:
    links = _links()
    links.failed("p", {"d": "no answer within 10 s"})
    assert links.unmeasured(["p", "d"]) == []
    assert {"source": "d", "target": "p", "error": "no answer within 10 s"} in links.rows()
    links.try_failed_again()
    assert links.unmeasured(["p", "d"]) == [("d", "p")]


def test_a_link_that_turns_slow_is_learned_from_its_pulls_each_once() -> None:
    links = _links()
    pulls = [Pull(f"r{n}", "p-1", PullOutcome.PULLED, 1_000_000, 0.101) for n in range(20)]
    for _ in range(3):  # reports repeat themselves
        links.observe("d", pulls)
    learned = links.by_name()["p", "d"]
    assert 0.5e7 < learned.bytes_per_s < 2e7


def test_pulls_of_many_nodes_are_learned_from_once_each_however_often_they_are_told() -> None:
    names = [f"n{number}" for number in range(40)]
    links = MeasuredLinks()
    for name in names:
        links.node_is(name, f"engine-{name}")
    links.measured([Link("engine-n0", f"engine-{name}", 1e-4, 1e9) for name in names[1:]])
    told = {
        name: [Pull(f"{name}-{turn}", "engine-n0", PullOutcome.PULLED, 10_000_000, 0.02) for turn in range(64)]
        for name in names[1:]
    }
    for name, pulls in told.items():
        links.observe(name, pulls)
    learned = dict(links.by_name())
    for name, pulls in told.items():
        links.observe(name, pulls)
    assert links.by_name() == learned


def test_given_links_are_there_for_any_pair_and_ask_for_no_probe() -> None:
    links = GivenLinks(0.001, 1e9)
    links.node_is("p", "p-1")
    links.observe("d", [Pull("r", "p-1", PullOutcome.PULLED, 1_000_000, 5.0)])
    assert links.by_name()["p", "d"] == links.by_name().get(("p", "d")) == Link("p", "d", 0.001, 1e9)
    assert links.unmeasured([str(at) for at in range(1000)]) == []
    assert [row["source"] for row in links.rows()] == ["any"]
