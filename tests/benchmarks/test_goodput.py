"""vLLM's own client beside our scorecard: what it is asked, and what is called the same."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from benchmarks.real.goodput import CLASS, arguments, compared
from engine.errors import EngineError

SLO = {"ttft_ms": 400.0, "tpot_ms": 45.0}


def _facts(requests: int, good: int) -> dict[str, Any]:
    return {"attainment": {CLASS: {"requests": requests, "goodput": good / requests}} if requests else {}}


def _theirs(requests: int, good: int, seconds: float = 20.0) -> dict[str, Any]:
    return {
        "ttfts": [0.1] * requests,
        "completed": requests,
        "duration": seconds,
        "request_goodput": good / seconds,
        "median_ttft_ms": 100.0,
        "median_tpot_ms": 20.0,
    }


def test_only_what_came_during_the_run_is_compared() -> None:
    row = compared(_theirs(200, 180), _facts(70, 70), _facts(270, 246))
    assert (row["good_by_client"], row["good_by_scorecard"]) == (180, 176)
    assert row["difference"] == pytest.approx(0.02)
    assert row["goodput_by_scorecard_per_s"] == pytest.approx(8.8)


def test_requests_that_the_scorecard_never_saw_are_an_error() -> None:
    with pytest.raises(EngineError, match="sent 200 requests, and the scorecard has 199"):
        compared(_theirs(200, 180), _facts(0, 0), _facts(199, 180))


def test_what_is_promised_is_what_is_counted() -> None:
    asked = arguments("http://127.0.0.1:1", "m", Path("/m"), SLO, 2.5, 30, 7, Path("/out/goodput-0.json"))
    given = dict(pairwise(asked))
    assert json.loads(given["--extra-body"]) == {"slo": SLO}
    assert asked[-3:] == ["--goodput", "ttft:400", "tpot:45"]
    assert (given["--request-rate"], given["--num-prompts"], given["--seed"]) == ("2.5", "30", "7")
    assert (given["--result-dir"], given["--result-filename"]) == ("/out", "goodput-0.json")


def test_vllms_client_still_takes_these_arguments() -> None:
    serve = pytest.importorskip("vllm.benchmarks.serve")
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    serve.add_cli_args(parser)
    asked = arguments("http://127.0.0.1:1", "m", Path("/m"), SLO, 2.5, 30, 7, Path("/out/goodput-0.json"))
    parsed = parser.parse_args(asked)
    assert parsed.goodput == ["ttft:400", "tpot:45"]
    assert parsed.extra_body == {"slo": SLO}
