"""The chaos command: what counts as an error, a wrong token and a promise kept; and what its clients see."""

from __future__ import annotations

from typing import Any, cast

import pytest
import typer
from typer.testing import CliRunner

from benchmarks.chaos.clients import PROMPTS, Answer, Clients
from benchmarks.chaos.cluster import Cluster
from benchmarks.chaos.command import DETECTION_S, as_promised, chaos
from benchmarks.chaos.run import Chaos
from benchmarks.chaos.scenarios import SCENARIOS, Load, scenario
from benchmarks.report.chaos import chaos as section
from engine.errors import ConfigError
from tests.benchmarks.sse_server import SseServer, running

LOAD = Load(clients=2, prompt_tokens=4, output_tokens=3)
KILL = SCENARIOS[3]
FULL = next(one for one in SCENARIOS if one.allowed)
ALONE = [[prompt, prompt, prompt] for prompt in range(PROMPTS)]


def judged(one: Any, *answers: Answer, gone: str = "") -> dict[str, Any]:
    breaking = Chaos(cast("Cluster", None), "m", 1, 4.0)
    breaking._alone[one.load] = ALONE
    breaking._gone = {gone}
    return breaking.judged(one.load, answers, one.allowed)


def answer(prompt: int, tokens: list[int], **more: Any) -> Answer:
    return Answer(prompt, "http://a", 0.0, status=more.pop("status", 200), tokens=tokens, **more)


def test_a_token_that_differs_or_is_said_once_too_often_is_wrong() -> None:
    told = judged(KILL, answer(1, [1, 1, 1]), answer(2, [2, 9, 2]), answer(3, [3, 3, 3, 3]))
    assert (told["wrong_tokens"], told["client_errors"], told["tokens"]) == (2, 0, 10)


def test_what_the_contract_allows_is_no_error_and_all_else_is() -> None:
    away = answer(1, [], status=503, error="full", retry_after="1")
    bare = answer(1, [], status=503, error="full")
    broken = answer(1, [1], error="it ended after 1 of 3 tokens")
    told = judged(FULL, away, bare, broken)
    assert (told["turned_away"], told["client_errors"]) == (1, 2), (
        "without Retry-After nobody knows when to come"
    )
    assert judged(KILL, away)["client_errors"] == 1
    assert any("1 of 3" in error for error in told["errors"])
    cut = judged(KILL, broken, gone="http://a")
    assert (cut["cut_off"], cut["client_errors"]) == (1, 0)


CLEAN = {"client_errors": 0, "wrong_tokens": 0, "blocks_leaked": 0, "detection_s": 0.3, "in_flight": 4}


@pytest.mark.parametrize(
    "flaw",
    [
        {"client_errors": 1},
        {"wrong_tokens": 1},
        {"blocks_leaked": 2},
        {"detection_s": None},
        {"detection_s": DETECTION_S + 0.3},
        {"in_flight": 0},
    ],
)
def test_a_row_is_as_promised_only_if_nothing_is_wrong_with_it(flaw: dict[str, Any]) -> None:
    assert as_promised(KILL, CLEAN)
    assert not as_promised(KILL, CLEAN | flaw)


def test_wrong_kv_that_nobody_refused_is_no_row_as_promised() -> None:
    corrupt = next(one for one in SCENARIOS if one.kv_refused)
    clean = CLEAN | {"detection_s": None}
    assert as_promised(corrupt, clean | {"kv_not_used": 7})
    assert not as_promised(corrupt, clean | {"kv_not_used": 0})


def test_a_fault_that_takes_no_node_need_not_be_noticed() -> None:
    assert as_promised(FULL, CLEAN | {"detection_s": None})


async def test_clients_tell_a_whole_answer_from_one_that_was_cut_off_and_from_a_refusal() -> None:
    found = {}
    for fault in ("none", "cut", "refuse"):
        with running(SseServer(fault=fault)) as server:
            clients = Clients([server.base_url.removesuffix("/v1")], "m", LOAD, seed=1)
            found[fault] = await clients.ask(0, server.base_url.removesuffix("/v1"))
            await clients.close()
    assert found["cut"].error is not None
    assert found["refuse"].status >= 400
    assert found["refuse"].error is not None
    assert found["none"].status == 200
    assert found["none"].ended_s is not None


def test_every_scenario_names_its_line_of_the_contract_and_is_found_by_name() -> None:
    assert len({one.contract for one in SCENARIOS}) == len(SCENARIOS)
    assert all(scenario(one.name) is one for one in SCENARIOS)


def test_scenarios_are_listed_and_an_unknown_one_is_told_with_those_there_are() -> None:
    app = typer.Typer()
    app.command()(chaos)
    shown = CliRunner().invoke(app, ["--list"])
    assert all(one.name in shown.stdout for one in SCENARIOS)
    failed = CliRunner().invoke(app, ["--only", "earthquake"])
    assert isinstance(failed.exception, ConfigError)
    assert "decode-dies" in str(failed.exception)


def test_a_link_is_cut_only_where_there_are_two_hosts() -> None:
    app = typer.Typer()
    app.command()(chaos)
    failed = CliRunner().invoke(app, ["--only", "link-cut"])
    assert isinstance(failed.exception, ConfigError)
    assert "--hosts 2" in str(failed.exception)


def test_the_report_says_what_was_not_as_promised(tmp_path: Any) -> None:
    row = CLEAN | {
        "contract": "a node dies", "turned_away": 0, "cut_off": 0, "kv_not_used": 2, "resumed": 3,
        "resume_gap_p50_s": 0.5, "resume_gap_p99_s": None, "as_promised": False,
    }  # fmt: skip
    _, rows, processes = section({"rows": [row], "processes_left": 0}, tmp_path)
    assert "| a node dies | 4 | 0 |" in rows
    assert "**no**" in rows
    assert "0.50 s" in rows
    assert "left when the cluster was down: 0" in processes
