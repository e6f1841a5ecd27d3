"""`slosserve bench tokens`: the same tokens as stock vLLM at temperature 0, whatever is done to a batch.

Prompts are answered one at a time by vLLM's own server, all at once by it, for comparison, and all at once by
our cluster of a prefill and a decode node with little memory, small batches and drafts: chunks, skips,
preemptions, verified drafts and handoffs all happen, and are counted. In float32, and again in bfloat16, where
two tokens may tie in one shape of a batch and not in another.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import httpx
import numpy as np
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.cluster_facts import fetch_facts
from benchmarks.open_loop import FIRST_TOKEN_ID, PATH, TIMEOUT_S
from benchmarks.own_server import own_server
from benchmarks.provenance import provenance
from benchmarks.startup import step
from benchmarks.studies.crew import write
from coordinator.config import ClusterConfig, load_config
from engine.errors import EngineError, SlosserveError
from engine.models import load_recipe

Row = dict[str, Any]
DTYPES = ("float32", "bfloat16")
PROMPTS = 100
DRAFTS = 4
KV_TOKENS = 1_600  # of each node: some of a hundred prompts have to wait, or to give way
BATCH_TOKENS, SLOTS = 256, 32
LONGEST_PROMPT, LONGEST_OUTPUT = 400, 96
# Tight, loose, and without any: by turns.
SLOS: tuple[Mapping[str, Any] | None, ...] = (
    {"ttft_ms": 2_000, "tpot_ms": 60},
    {"ttft_ms": 20_000, "tpot_ms": 400},
    None,
)
GAP_S = 0.05  # between two requests: new ones come while old ones run


def tokens(
    prompts: Annotated[int, typer.Option(min=1, help="How many.")] = PROMPTS,
    dtype: Annotated[list[str] | None, typer.Option(help="float32, bfloat16 (repeatable); else both.")] = None,
    model: Annotated[str, typer.Option(help="Of `slosserve model make`.")] = "scale",
    seed: Annotated[int, typer.Option(help="Of prompts and lengths.")] = 1,
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = Path("out/bench/tokens.json"),
) -> None:
    """Compare tokens with those of vLLM's own server while everything that a planner can do is done.

    Example: slosserve bench tokens --prompts 20 --dtype float32
    """
    console = Console(width=100, highlight=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    try:
        with console.status("starting") as status:
            for name in dtype or DTYPES:
                config = configuration(model, name)
                bodies = questions(config, model, prompts, np.random.default_rng(seed))
                rows.append({"dtype": name, **_compare(config, bodies, out.parent, status.update)})
    except SlosserveError as error:
        Console(stderr=True).print(f"[red]error:[/red] {escape(str(error))}", highlight=False)
        raise typer.Exit(2) from error
    results: Row = {
        "equal_in_float32": next(
            (row["equal"] == row["prompts"] for row in rows if row["dtype"] == "float32"), None
        ),
        "rows": rows,
        "provenance": provenance(seed),
    }
    write(out, results)
    console.print(_table(rows))
    console.print(f"figures in {out}", soft_wrap=True)


def compared(expected: Sequence[Sequence[int]], got: Sequence[Sequence[int]]) -> Row:
    """How many answers are equal; of each that is not, where it is other for the first time."""
    differing = []
    for index, (one, other) in enumerate(zip(expected, got, strict=True)):
        if list(one) != list(other):
            first = next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
            differing.append({"prompt": index, "first_other_token": first, "tokens": [len(one), len(other)]})
    return {
        "prompts": len(expected),
        "equal": len(expected) - len(differing),
        "tokens": sum(map(len, expected)),
        "differing": differing,
    }


def configuration(model: str, dtype: str) -> ClusterConfig:
    """A pair with little memory, small batches and drafts."""
    recipe = load_recipe(model)
    head_dim = recipe.hidden_size // recipe.num_attention_heads
    value_bytes = 4 if dtype == "float32" else 2
    kv_bytes = 2 * recipe.num_hidden_layers * recipe.num_key_value_heads * head_dim * value_bytes
    overrides = {
        "name": "bench-tokens",
        "model": model,
        "dtype": dtype,
        "endpoint.port": 0,
        "pools.mixed": 0,
        "pools.prefill": 1,
        "pools.decode": 1,
        "engine.kv_cache_gib": KV_TOKENS * kv_bytes / 2**30,
        "engine.max_batch_tokens": BATCH_TOKENS,
        "engine.max_num_seqs": SLOTS,
        "engine.max_model_len": 1024,
        "engine.enable_prefix_caching": False,
        "engine.speculative": {
            "method": "ngram",
            "num_speculative_tokens": DRAFTS,
            "prompt_lookup_max": 3,
            "prompt_lookup_min": 1,
        },
    }
    return load_config("colocated", overrides)


def questions(config: ClusterConfig, model: str, count: int, rng: np.random.Generator) -> list[Row]:
    """Prompts that repeat themselves, so that n-grams are found, and no two alike."""
    most_id = load_recipe(model).vocab_size - 1
    bodies = []
    for _ in range(count):
        length = int(rng.integers(8, LONGEST_PROMPT))
        pattern = rng.integers(FIRST_TOKEN_ID, most_id, int(rng.integers(4, 40)))
        bodies.append(
            {
                "model": config.model,
                "prompt": np.resize(pattern, length).tolist(),
                "max_tokens": int(rng.integers(16, LONGEST_OUTPUT)),
                "temperature": 0,
                "ignore_eos": True,
                "return_token_ids": True,
            }
        )
    return bodies


def _compare(config: ClusterConfig, bodies: Sequence[Row], folder: Path, say: Callable[[str], None]) -> Row:
    from coordinator.cluster_process import ClusterProcess

    say(f"{config.dtype}: vLLM's own server")
    alone = config.model_copy(
        update={"engine": config.engine.model_copy(update={"speculative": None, "max_batch_tokens": 2048})}
    )
    with own_server(alone, folder / "tokens-vllm.log") as url:
        expected = asyncio.run(_answers(url, bodies, at_once=False, say=say))
        together = asyncio.run(_answers(url, bodies, at_once=True, say=say))
    with ClusterProcess.start(config, None, lambda event: say(step(event))) as cluster:
        slos = [SLOS[at % len(SLOS)] for at in range(len(bodies))]
        asked = [body if slo is None else {**body, "slo": slo} for body, slo in zip(bodies, slos, strict=True)]
        got = asyncio.run(_answers(cluster.base_url, asked, at_once=True, say=say))
        facts = asyncio.run(_facts(cluster.base_url))
    itself = compared(expected, together)["equal"]
    return {**compared(expected, got), "vllm_equal_to_itself": itself, "happened": _happened(facts)}


async def _answers(
    url: str, bodies: Sequence[Row], *, at_once: bool, say: Callable[[str], None]
) -> list[list[int]]:
    """The tokens of every answer. Raises EngineError for a failure."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, limits=limits) as client:
        done = 0

        async def one(body: Row) -> list[int]:
            nonlocal done
            response = await client.post(PATH, json=body)
            if response.status_code != httpx.codes.OK:
                raise EngineError(f"status {response.status_code}: {response.text[:300]}")
            done += 1
            say(f"{done} of {len(bodies)} answers")
            return list(response.json()["choices"][0]["token_ids"])

        if not at_once:
            return [await one(body) for body in bodies]
        tasks = []
        for body in bodies:
            tasks.append(asyncio.create_task(one(body)))
            await asyncio.sleep(GAP_S)
        return await asyncio.gather(*tasks)


async def _facts(url: str) -> Row:
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S) as client:
        return await fetch_facts(client)


def _happened(facts: Row) -> Row:
    """How often batches were treated in each way, by all nodes; and handoffs."""
    kinds = ("chunked", "skipped", "preempted", "drafted_tokens", "accepted_tokens")
    counted = {kind: sum(node["tally"][kind] for node in facts["nodes"]) for kind in kinds}
    return {**counted, "handoffs": facts["handoffs"]["count"], "local_prefills": facts["local_prefills"]}


def _table(rows: Sequence[Row]) -> Table:
    table = Table(title="the same tokens as vLLM's own server", title_justify="left")
    for heading in ("dtype", "equal", "vLLM to itself", *rows[0]["happened"]):
        table.add_column(heading.replace("_", " "), justify="right")
    for row in rows:
        equal = [f"{row[key]} of {row['prompts']}" for key in ("equal", "vllm_equal_to_itself")]
        table.add_row(row["dtype"], *equal, *map(str, row["happened"].values()))
    return table


if __name__ == "__main__":
    typer.run(tokens)
