"""A thousand virtual replicas under one coordinator: what a placement costs, and what the cluster takes.

Everything but the engines is what serves: `ClusterProcess` starts Ray, the coordinator, the endpoint and the
process of the virtual nodes. Most of the load asks the coordinator as an endpoint does and submits to the nodes
where it says (an endpoint's own flights over its own links, without HTTP); some goes through the endpoint.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import httpx
import numpy as np
import psutil
import typer
import zmq.asyncio
from rich.console import Console
from rich.table import Table

from benchmarks.as_module import start
from benchmarks.provenance import provenance
from coordinator.cluster_process import ClusterProcess
from coordinator.config import ClusterConfig
from coordinator.endpoint.flight import Flight, Passenger
from coordinator.endpoint.links import CoordinatorLink, NodeLinks
from coordinator.endpoint.slo import Asked, to_slo
from coordinator.virtual_nodes import virtual_cost
from engine.errors import SlosserveError
from engine.messages import Declined, Delta, Finished, NodeAddress
from engine.score import score

MIX = {"chatbot": 0.5, "coder": 0.25, "summarizer": 0.25}
PROMPT_TOKENS, OUTPUT_TOKENS = (64, 1024), (16, 96)  # log-uniform
VOCABULARY = 2000
DRAIN_S = 30.0
TARGET_P99_MS = 5.0


@dataclass(frozen=True, slots=True)
class Asks:
    """One request of the load."""

    at_s: float
    slo_class: str
    prompt: list[int]
    max_tokens: int


@dataclass(slots=True)
class Tally:
    """What the client of the coordinator saw. Times in seconds."""

    placed_s: list[float] = field(default_factory=list)
    first_token_s: list[float] = field(default_factory=list)
    late_s: list[float] = field(default_factory=list)  # of this client itself, against its own plan
    verdicts: Counter[str] = field(default_factory=Counter)
    placements: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    retries: int = 0
    met: int = 0
    tokens: int = 0


class Endpoint:
    """An endpoint without HTTP: it has requests placed, submits them, and follows their tokens."""

    def __init__(self, config: ClusterConfig, run_dir: Path) -> None:
        self.tally = Tally()
        self._config = config
        self._context = zmq.asyncio.Context()
        identity = f"thousand-{time.monotonic_ns()}"
        self._coordinator = CoordinatorLink(self._context, identity, run_dir, config.timeouts.place_s)
        self._links = NodeLinks(
            self._context,
            identity,
            self,
            silent_s=config.timeouts.node_silent_s,
            stuck_limit_s=config.timeouts.stuck_step_s,
        )
        self._cost = virtual_cost(config)
        self._flights: dict[str, Flight] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self, asks: Sequence[Asks]) -> None:
        """Send all of them at their times, and wait until they are over."""
        await self._coordinator.connect()
        began_s = time.monotonic()
        for number, one in enumerate(asks):
            await asyncio.sleep(max(began_s + one.at_s - time.monotonic(), 0.0))
            self.tally.late_s.append(time.monotonic() - began_s - one.at_s)
            self._spawn(self._place(self._embark(f"t{number}", one)))
        deadline_s = time.monotonic() + DRAIN_S
        while self._flights and time.monotonic() < deadline_s:
            await asyncio.sleep(0.05)
        self.tally.outcomes["unfinished"] += len(self._flights)

    def close(self) -> None:
        """Let go of everything."""
        self._links.close()
        self._coordinator.close()
        self._context.destroy(linger=0)

    def _embark(self, request_id: str, one: Asks) -> Flight:
        slo = to_slo(
            Asked(one.slo_class),
            self._config.slo_classes,
            len(one.prompt),
            self._cost,
            self._config.engine.max_batch_tokens,
        )
        now_s = time.monotonic()
        passenger = Passenger(request_id, one.prompt, b"", one.max_tokens, slo, False, None, now_s)
        flight = Flight(passenger, self._links.send, self._config.transfer.pull_deadline_s, self._failed)
        flight.on_retry = self._again
        self._flights[request_id] = flight
        return flight

    async def _place(self, flight: Flight) -> None:
        question = flight.question()
        asked_s = time.perf_counter()
        try:
            placed = await self._coordinator.place(question)
            self.tally.placed_s.append(time.perf_counter() - asked_s)
            self.tally.verdicts[placed.verdict] += 1
            flight.depart(placed)
        except SlosserveError as error:
            self._failed(flight, error)

    def _again(self, flight: Flight) -> None:
        self.tally.retries += 1
        self._spawn(self._place(flight))

    def _failed(self, flight: Flight, error: SlosserveError) -> None:
        self._land(flight, type(error).__name__)

    def _land(self, flight: Flight, outcome: str) -> None:
        if self._flights.pop(flight.passenger.request_id, None) is None:
            return
        flight.over = True
        passenger, timeline, tally = flight.passenger, flight.timeline, self.tally
        completed = outcome == "completed"
        assert passenger.slo is not None
        result = score(passenger.slo, flight.token_times_s, completed=completed)
        admitted = timeline.verdict == "admitted"
        met = result.met and admitted
        tally.outcomes[outcome] += 1
        tally.placements[timeline.placement] += 1
        tally.met += met
        tally.tokens += len(flight.token_times_s)
        if timeline.first_token_s is not None:
            tally.first_token_s.append(timeline.first_token_s)
        pull = timeline.decode
        self._coordinator.send(
            Finished(
                request_id=passenger.request_id,
                attempt=flight.attempt,
                class_name=passenger.slo.class_name,
                outcome=outcome,
                verdict=timeline.verdict,
                met=met,
                strict=result.strict and admitted,
                goodput=result.goodput and admitted,
                stages={str(kind): kept and admitted for kind, kept in result.stages.items()},
                placement=timeline.placement,
                handoff_s=None if pull is None else pull.pull_s,
                kv_bytes=0 if pull is None else pull.pulled_bytes,
                prompt_tokens=len(passenger.prompt_token_ids),
                output_tokens=len(flight.token_times_s),
                nodes=[node for node in (timeline.prefill_node, timeline.decode_node) if node is not None],
                prefix_hashes=flight.prefix_hashes(),
            )
        )

    def _spawn(self, coroutine: Any) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def on_deltas(self, node: str, items: list[Delta]) -> None:
        """One step's tokens of one node."""
        for delta in items:
            flight = self._flights.get(delta.request_id)
            if flight is not None and flight.take(delta) and flight.over:
                self._land(flight, "completed")

    def on_declined(self, node: str, declined: Declined) -> None:
        """A node will not do it."""
        flight = self._flights.get(declined.request_id)
        if flight is not None:
            flight.declined(node, declined)

    def on_lost(self, node: NodeAddress) -> None:
        """A node fell silent."""
        for flight in list(self._flights.values()):
            flight.lost(node)


@dataclass(frozen=True, slots=True)
class Taken:
    """Memory and time of a process. `cpu_share`: of one core, while the load ran."""

    rss_mib: float
    cpu_share: float


class Meter:
    """What processes take while something runs."""

    def __init__(self, pids: dict[str, int]) -> None:
        self._processes = {name: psutil.Process(pid) for name, pid in pids.items()}
        self._began_s = time.monotonic()
        self._cpu_s = {name: _cpu_s(process) for name, process in self._processes.items()}

    def read(self) -> dict[str, Taken]:
        """By process, since it was made."""
        seconds = time.monotonic() - self._began_s
        return {
            name: Taken(process.memory_info().rss / 2**20, (_cpu_s(process) - self._cpu_s[name]) / seconds)
            for name, process in self._processes.items()
        }


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def draw(rate: float, seconds: float, seed: int) -> list[Asks]:
    """Poisson arrivals at `rate` a second."""
    rng = np.random.default_rng(seed)
    asks, at_s = [], 0.0
    while (at_s := at_s + float(rng.exponential(1 / rate))) < seconds:
        length, output = (round(float(np.exp(rng.uniform(*np.log(b))))) for b in (PROMPT_TOKENS, OUTPUT_TOKENS))
        slo_class = str(rng.choice(list(MIX), p=list(MIX.values())))
        asks.append(Asks(at_s, slo_class, rng.integers(0, VOCABULARY, length).tolist(), output))
    return asks


async def by_http(url: str, model: str, rate: float, seconds: float, seed: int) -> dict[str, Any]:
    """Completions through the endpoint at a steady rate: their status, and seconds to the first token."""
    if rate <= 0:
        return {"requests": 0}
    statuses: Counter[str] = Counter()
    first_s: list[float] = []

    async def ask(client: httpx.AsyncClient, one: Asks) -> None:
        body = {"model": model, "prompt": one.prompt, "max_tokens": one.max_tokens, "stream": True}
        began_s = time.perf_counter()
        async with client.stream(
            "POST", "/v1/completions", json=body | {"slo": {"class": one.slo_class}}
        ) as got:
            statuses[f"{got.status_code} {got.headers.get('x-slosserve-verdict', '-')}"] += 1
            waits = True
            async for line in got.aiter_lines():
                if waits and line.startswith("data:"):
                    first_s.append(time.perf_counter() - began_s)
                    waits = False

    async with httpx.AsyncClient(base_url=url, timeout=60) as client, asyncio.TaskGroup() as group:
        began_s = time.monotonic()
        for one in draw(rate, seconds, seed):
            await asyncio.sleep(max(began_s + one.at_s - time.monotonic(), 0.0))
            group.create_task(ask(client, one))
    return {"requests": sum(statuses.values()), "statuses": dict(statuses), "ttft_ms": quantiles_ms(first_s)}


def quantiles_ms(seconds: Sequence[float]) -> dict[str, float | None]:
    """p50, p90, p99 and the largest, in ms."""
    if not seconds:
        return dict.fromkeys(("p50", "p90", "p99", "max"))
    values = np.quantile(np.array(seconds) * 1e3, (0.5, 0.9, 0.99, 1.0)).tolist()
    return dict(zip(("p50", "p90", "p99", "max"), values, strict=True))


def pools(nodes: int) -> dict[str, int]:
    """A fifth prefills, a fifth decodes, the others do both."""
    fifth = nodes // 5
    return {"prefill": fifth, "decode": fifth, "mixed": nodes - 2 * fifth}


def bench_thousand(
    nodes: Annotated[int, typer.Option(min=1, help="Virtual replicas.")] = 1000,
    rate: Annotated[
        float, typer.Option(min=0.1, help="Requests a second, straight to the coordinator.")
    ] = 40.0,
    http_rate: Annotated[float, typer.Option(min=0, help="Requests a second through the endpoint.")] = 1.0,
    seconds: Annotated[float, typer.Option(min=1, help="How long the load lasts.")] = 60.0,
    processes: Annotated[int, typer.Option(min=1, help="That host the replicas.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the load.")] = 1,
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = Path("out/bench/thousand.json"),
) -> None:
    """Start a thousand virtual replicas under one coordinator, and measure what placing costs.

    Example: python -m benchmarks.thousand --nodes 100 --seconds 10
    """
    console = Console(width=100, highlight=False)
    sizes = pools(nodes)
    settings: dict[str, Any] = {f"pools.{role}": count for role, count in sizes.items()}
    settings |= {"name": "thousand", "endpoint.port": 0, "virtual.processes": processes}
    busy = psutil.getloadavg()[0]
    began_s = time.monotonic()
    with ClusterProcess.start("virtual", settings, lambda event: _say(console, event)) as cluster:
        started_s = time.monotonic() - began_s
        result = asyncio.run(measure(cluster, rate, http_rate, seconds, seed))
    result = {
        "nodes": nodes,
        "pools": sizes,
        "start_s": started_s,
        "load_average_before": busy,
        "load": {"rate": rate, "http_rate": http_rate, "seconds": seconds, "mix": MIX},
        "target_p99_ms": TARGET_P99_MS,
        **result,
        "provenance": provenance(seed),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    console.print(shown(result))
    console.print(f"all figures: {out}", soft_wrap=True)


async def measure(
    cluster: ClusterProcess, rate: float, http_rate: float, seconds: float, seed: int
) -> dict[str, Any]:
    """Load a cluster that is ready, and say what it was like."""
    async with httpx.AsyncClient(base_url=cluster.base_url, timeout=60) as client:
        before = (await client.get("/cluster")).json()
        hosts = sorted({node["pid"] for node in before["nodes"]})
        pids = {"coordinator": cluster.pids["coordinator"], "endpoint": cluster.pids["endpoint-0"]}
        pids |= {f"host-{at}": pid for at, pid in enumerate(hosts)}
        idle_meter = Meter(pids)
        await asyncio.sleep(5.0)
        idle = idle_meter.read()
        endpoint, meter = Endpoint(cluster.config, cluster.run_dir), Meter(pids)
        try:
            model = cluster.config.served_model_name or "tiny"
            _, http = await asyncio.gather(
                endpoint.run(draw(rate, seconds, seed)),
                by_http(cluster.base_url, model, http_rate, seconds, seed + 1),
            )
            loaded = meter.read()
        finally:
            endpoint.close()
        after = (await client.get("/cluster")).json()
    tally = endpoint.tally
    return {
        "ready_nodes": sum(node["state"] == "ready" for node in after["nodes"]),
        "requests": len(tally.late_s),
        "placement_ms": quantiles_ms(tally.placed_s),
        "placing_inside_ms": after["placing"],
        "ttft_ms": quantiles_ms(tally.first_token_s),
        "client_late_ms": quantiles_ms(tally.late_s),
        "verdicts": dict(tally.verdicts),
        "placements": dict(tally.placements),
        "outcomes": dict(tally.outcomes),
        "retries": tally.retries,
        "met": tally.met,
        "tokens": tally.tokens,
        "steps": sum(node["steps"] for node in after["nodes"]) - sum(node["steps"] for node in before["nodes"]),
        "handoffs": after["handoffs"],
        "local_prefills": after["local_prefills"],
        "http": http,
        "idle": {name: asdict(taken) for name, taken in idle.items()},
        "loaded": {name: asdict(taken) for name, taken in loaded.items()},
    }


def shown(result: dict[str, Any]) -> Table:
    """The figures that one asks for first."""
    table = Table(title=f"{result['nodes']} virtual replicas, one coordinator", box=None, show_header=False)
    placement, inside = result["placement_ms"], result["placing_inside_ms"]
    load = result["load"]
    rows = [
        ("ready after", f"{result['start_s']:.1f} s"),
        ("processes that wanted a core before", f"{result['load_average_before']:.1f}"),
        ("load", f"{load['rate']:g} requests/s and {load['http_rate']:g} by HTTP, for {load['seconds']:g} s"),
        ("placement, asked of the coordinator", f"p50 {placement['p50']:.2f}, p99 {placement['p99']:.2f} ms"),
        ("placement, inside the coordinator", f"p50 {inside['p50_ms']:.2f}, p99 {inside['p99_ms']:.2f} ms"),
        ("of that the processor's", f"p50 {inside['cpu_p50_ms']:.2f}, p99 {inside['cpu_p99_ms']:.2f} ms"),
        ("target", f"p99 below {result['target_p99_ms']:g} ms"),
        ("verdicts", _counts(result["verdicts"])),
        ("placements", _counts(result["placements"])),
        ("outcomes", _counts(result["outcomes"])),
        ("promises kept", f"{result['met']} of {result['verdicts'].get('admitted', 0)} admitted"),
        ("first token", f"p50 {result['ttft_ms']['p50']:.0f}, p99 {result['ttft_ms']['p99']:.0f} ms"),
        ("steps of the replicas", f"{result['steps']}, {result['tokens']} tokens"),
        ("through the endpoint", _counts(result["http"].get("statuses", {}))),
    ]
    for name, taken in result["loaded"].items():
        idle = result["idle"][name]
        share = f"{idle['cpu_share']:.0%} of a core idle, {taken['cpu_share']:.0%} loaded"
        rows.append((name, f"{taken['rss_mib']:.0f} MiB, {share}"))
    for row in rows:
        table.add_row(*row)
    return table


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items() if count) or "none"


def _say(console: Console, event: dict[str, Any]) -> None:
    what = event.get("name") or event.get("process")
    console.print(f"{what}: {event.get('state') or event.get('event')} {event.get('detail') or ''}".rstrip())


if __name__ == "__main__":
    start(bench_thousand)
