"""Real engines side by side: the client process, what a window adds up to, the knee and the headline."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import psutil
import pytest
from sse_server import SseServer
from sse_server import running as serving

from benchmarks import own_server
from benchmarks.capacity import Cache, Point
from benchmarks.hardware import hardware
from benchmarks.real import bench as bench_module
from benchmarks.real import running as running_module
from benchmarks.real.bench import Bench, OutOfTime
from benchmarks.real.cells import LAYOUTS, LEAST_SECONDS, Cell
from benchmarks.real.client import NO_ANSWER, Job, Seen, run
from benchmarks.real.headline import headline, ratios
from benchmarks.real.predicted import SHARE, Machine
from benchmarks.real.results import Results, crossing, of_other_runs
from benchmarks.real.running import Running, cores_of, keep_apart
from benchmarks.real.site import CPU, GPU, Site
from benchmarks.real.systems import SYSTEMS, configuration, systems
from benchmarks.real.window import measure, summary
from benchmarks.workload import Workload
from engine.errors import ConfigError
from engine.request import Slo

MACHINE = Machine(hardware("scale"), CPU)
CHAT = Cell("chatbot", 1)


def _job(targets: list[str], **changed: Any) -> Job:
    fields: dict[str, Any] = {
        "targets": targets,
        "pair": False,
        "model": "m",
        "vocab_size": 3072,
        "seed": 1,
        "hang_up": False,
        "arrival_s": [0.0, 0.02, 0.04],
        "prompt_tokens": [9, 10, 11],
        "output_tokens": [4, 5, 6],
        "max_tokens": [300, 300, 300],
        "slos": [None, None, None],
        "after": {},
        "cut_off_s": 20.0,
    }
    return Job(**fields | changed)


def _workload(rate: float = 2.0, seconds: float = 30.0) -> tuple[Workload, list[Slo]]:
    workload = CHAT.workload(CPU, rate, seconds, 1)
    return workload, MACHINE.promises(workload)


def _perfect(workload: Workload, slos: list[Slo], verdict: str | None = None) -> list[Seen]:
    """Every first token at half of its time, every other one at half of its pace."""
    seen = []
    for slo, tokens in zip(slos, workload.output_tokens.tolist(), strict=True):
        times = slo.ttft_s / 2 + np.arange(tokens) * slo.tpot_s / 2
        seen.append(Seen(0.001, times.tolist(), verdict, None))
    return seen


# ---- the client --------------------------------------------------------------------------------------------


async def test_two_servers_are_asked_by_turns() -> None:
    with serving(SseServer()) as one, serving(SseServer()) as other:
        seen = await run(_job([one.base_url, other.base_url]))
        assert [len(body["prompt"]) for body in one.bodies] == [9, 11]
        assert [len(body["prompt"]) for body in other.bodies] == [10]
    assert [len(each.token_times_s) for each in seen] == [4, 5, 6]
    assert not any(each.error for each in seen)


async def test_a_pair_computes_the_prompt_at_the_first_and_the_rest_at_the_second() -> None:
    with serving(SseServer()) as prefill, serving(SseServer()) as decode:
        seen = await run(_job([prefill.base_url, decode.base_url], pair=True))
        prompts, rest = list(prefill.bodies), list(decode.bodies)
    assert [len(each.token_times_s) for each in seen] == [4, 5, 6]
    for body in prompts:
        assert (body["max_tokens"], body["stream"]) == (1, False)
        assert body["kv_transfer_params"] == {"do_remote_decode": True}
        assert not {"stop_token_ids", "logit_bias", "min_tokens"} & set(body)  # it must end because it is full
    assert {body["kv_transfer_params"]["number"] for body in rest} == {1, 2, 3}
    assert [body["prompt"] for body in rest] == [body["prompt"] for body in prompts]


async def test_what_has_no_answer_in_time_is_given_up_and_what_has_one_is_kept() -> None:
    with serving(SseServer(token_delay_s=0.05)) as server:
        seen = await run(_job([server.base_url], output_tokens=[2, 2000, 2], cut_off_s=6.0))
    assert [each.error for each in seen] == [None, NO_ANSWER, None]


async def test_a_server_that_refuses_is_an_error_of_each_request() -> None:
    with serving(SseServer(fault="refuse")) as server:
        seen = await run(_job([server.base_url, server.base_url], pair=True))
    assert all("503" in str(each.error) for each in seen)


def test_the_client_is_a_process_of_its_own(tmp_path: Path) -> None:
    told: list[float] = []
    with serving(SseServer()) as server:
        started = Running((server.base_url,), False, "m", tuple(cores_of(1)[1]))
        seen = started.ask(_job([server.base_url]), tmp_path, told.append)
        assert [len(each.token_times_s) for each in seen] == [4, 5, 6]
        workload, slos = _workload(rate=6.0, seconds=2.0)
        row = measure(started, SYSTEMS["ours"], "scale", workload, slos, 1, tmp_path, told.append)
        asked = server.bodies[3:]
    assert told
    assert row["completed"] == row["counted"] > 0
    assert row["planning_share"] == pytest.approx(0.02)
    assert row["steps_over_profile"] == pytest.approx(2.0)
    assert row["acceptance"] is None  # nothing was drafted
    assert [len(body["prompt"]) for body in asked] == workload.prompt_tokens.tolist()
    assert asked[0]["slo"]["ttft_ms"] == pytest.approx(slos[0].ttft_s * 1e3)


# ---- the windows -------------------------------------------------------------------------------------------


def test_windows_are_long_enough_for_requests_and_for_many_of_them() -> None:
    for engines, names in LAYOUTS.items():
        for name in names:
            assert MACHINE.seconds(Cell(name, engines), 20.0) >= LEAST_SECONDS
    assert MACHINE.seconds(CHAT, 0.25) == pytest.approx(240.0)


def test_cells_are_smooth_as_well_as_in_bursts() -> None:
    assert {Cell(name, engines).arrivals for engines, names in LAYOUTS.items() for name in names} == {
        "poisson",
        "bursty",
    }


def test_thinking_is_scaled_to_fit_and_an_answer_stays() -> None:
    workload = Cell("reasoning", 1).workload(CPU, 2.0, 60.0, 1)
    assert (workload.thinking_tokens < workload.output_tokens).all()
    assert (workload.output_tokens <= workload.max_tokens).all()
    assert len(set(workload.max_tokens.tolist())) == 1  # it tells of no single output
    assert 100 < workload.output_tokens.mean() < 300


def test_a_window_in_which_all_is_in_time_is_attained_whole() -> None:
    workload, slos = _workload()
    row = summary(workload, slos, _perfect(workload, slos, "admitted"))
    assert row["attainment"] == row["admitted_kept"] == row["attainment_strict"] == 1.0
    assert row["admitted"] == row["counted"] == int((workload.arrival_s >= 3.0).sum())
    assert row["drained"]
    assert row["client_late_ms"]["p50"] == pytest.approx(1.0)


def test_what_failed_was_late_or_was_cut_short_is_a_miss() -> None:
    workload, slos = _workload()
    seen = _perfect(workload, slos, "admitted")
    late = [time + 2 * slos[-1].ttft_s for time in seen[-1].token_times_s]
    seen[-1] = Seen(0.0, late, "best_effort", None)
    seen[-2] = Seen(0.0, seen[-2].token_times_s[:-1], "admitted", None)
    seen[-3] = Seen(0.0, [], None, NO_ANSWER)
    row = summary(workload, slos, seen)
    assert row["attainment"] == pytest.approx(1 - 3 / row["counted"])
    assert row["admitted_kept"] == pytest.approx(1 - 1 / (row["counted"] - 2))
    assert (row["best_effort"], row["best_effort_completed"]) == (1, 1)
    assert (row["errors"], row["drained"]) == (1, False)


def test_a_window_is_measured_once_and_none_begins_when_time_is_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, events = _bench_of_fakes(tmp_path, monkeypatch)
    system = SYSTEMS["vllm"]
    rows = [bench.window(CHAT, system, system.defaults(CPU), rate, 1) for rate in (2.0, 3.0, 2.0)]
    assert rows[0] == rows[2] != rows[1]
    assert events == ["vllm starts"]
    assert rows[0]["predicted"]["attainment"] > 0.5
    bench.ends_s = -math.inf
    assert bench.window(CHAT, system, system.defaults(CPU), 3.0, 1) == rows[1]
    with pytest.raises(OutOfTime):
        bench.window(CHAT, system, system.defaults(CPU), 4.0, 1)
    bench.close()
    assert events == ["vllm starts", "vllm stops"]


def test_systems_that_take_turns_go_on_running_and_the_one_not_asked_longest_makes_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, events = _bench_of_fakes(tmp_path, monkeypatch)
    assert CPU.at_once == 3
    for seed, name in enumerate(["vllm", "ours", "vllm-ngram", "vllm", "ours-ngram", "vllm"]):
        bench.window(CHAT, SYSTEMS[name], SYSTEMS[name].defaults(CPU), 2.0, seed)
    assert events == [
        "vllm starts", "ours starts", "vllm-ngram starts", "ours stops", "ours-ngram starts",
    ]  # fmt: skip
    bench.close()
    assert [event for event in events if event.endswith("stops")] == [
        "ours stops", "vllm-ngram stops", "ours-ngram stops", "vllm stops",
    ]  # fmt: skip


def _bench_of_fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Bench, list[str]]:
    """A bench whose systems keep every promise, and what has started and stopped."""
    events: list[str] = []

    @contextmanager
    def fake(_site: Any, system: Any, *_: Any) -> Iterator[Running]:
        events.append(f"{system.name} starts")
        yield Running((), False, "m", ())
        events.append(f"{system.name} stops")

    def served(_: Running, system: Any, recipe: str, workload: Workload, slos: list[Slo], *rest: Any) -> Any:
        return summary(workload, slos, _perfect(workload, slos))

    monkeypatch.setattr(bench_module, "running", fake)
    monkeypatch.setattr(bench_module, "measure", served)
    profile = Path("configs/profiles/scale.json")
    bench = Bench(MACHINE, "scale", profile, tmp_path, Cache(tmp_path / "kept"), lambda _: None)
    bench.window_s = 10.0
    return bench, events


# ---- what they add up to -----------------------------------------------------------------------------------


def _point(rate: float, attainment: float, drained: bool = True) -> Point:
    return Point(rate, rate, attainment, drained, {})


def test_the_knee_is_where_the_line_between_two_rates_falls_through_the_share() -> None:
    assert crossing([_point(2.0, 0.95), _point(3.0, 0.85)]) == pytest.approx(2.5)
    assert crossing([_point(3.0, 0.85), _point(2.0, 0.9)]) == pytest.approx(2.0)
    assert crossing([_point(2.0, 0.95), _point(3.0, 0.95, drained=False)]) == 2.0
    assert crossing([_point(2.0, 0.95)]) == 2.0
    assert crossing([_point(2.0, 0.5)]) == 0.0


def _row(system: str, mean: float, scenario: str = "chatbot") -> dict[str, Any]:
    known = SYSTEMS[system]
    about = {"ours": known.ours, "tuned": known.tuned, "drafts": known.drafts, "engines": known.engines}
    return {"scenario": scenario, "system": system, "mean": mean, **about}


def test_ours_is_compared_with_the_best_of_what_ships_and_of_what_was_tuned() -> None:
    rows = [_row("vllm", 2.0), _row("vllm-tuned", 3.0), _row("ours", 4.5), _row("ours-ngram", 9.0)]
    rows += [_row("vllm-2", 2.0), _row("vllm-1p1d", 4.0), _row("ours-mixed", 4.0), _row("ours-1p1d", 3.0)]
    plain = [row for row in rows if not row["drafts"]]
    assert ratios(plain, tuned=False) == {("chatbot", 1): 2.25, ("chatbot", 2): 1.0}
    assert ratios(plain, tuned=True) == {("chatbot", 1): 1.5, ("chatbot", 2): 1.0}
    found = headline(rows, [], [])
    assert found["geomean_vs_stock_default"] == pytest.approx(1.5)
    assert (found["worst_ratio"], found["admitted_kept"]) == (1.0, None)


def test_the_promise_is_judged_by_its_worst_window_up_to_twice_the_capacity() -> None:
    def window(rate: float, kept: float | None, admitted: int, system: str = "ours") -> dict[str, Any]:
        return {**_row(system, 1.0), "asked_per_s": rate, "admitted": admitted, "admitted_kept": kept}

    rows = [_row("ours", 3.0), _row("vllm", 1.0), _row("ours-2", 9.0)]
    windows = [window(1.5, 1.0, 50), window(6.0, 0.98, 100), window(2.0, None, 0), window(7.0, 0.1, 50)]
    windows += [window(1.0, 0.2, 50, "vllm"), window(1.0, 0.3, 50, "ours-2")]
    found = headline(rows, [], windows)
    assert found["admitted_kept"] == 0.98
    assert found["admitted_kept_in_all"] == pytest.approx(148 / 150)
    assert headline(rows, [], [])["admitted_kept"] is None


def test_at_twice_the_capacity_as_much_is_to_be_kept_as_at_it() -> None:
    def load(of_capacity: float, kept_per_s: float) -> dict[str, Any]:
        return {**_row("ours", 1.0), "load": of_capacity, "kept_per_s": kept_per_s}

    found = headline([], [load(0.5, 2.0), load(1.0, 4.0), load(2.0, 3.8)], [])
    assert found["kept_at_twice"] == pytest.approx(0.95)


class _NoBench:
    """What results ask of a bench, of which every window holds below 10 requests a second, until time is up."""

    def __init__(self, windows: int) -> None:
        self.machine, self.model, self.left, self.window_s = MACHINE, "scale", windows, None
        self.asked: list[tuple[str, int]] = []
        self.on = {"device": "a CPU", "commit": f"commit {windows}", "date": "2026-01-02"}

    def say(self, text: str) -> None:
        del text

    def expected(self, cell: Cell, system: Any) -> Any:
        del cell, system
        return SYSTEMS["vllm"].defaults(CPU), 9.0

    def window(self, cell: Cell, system: Any, tuning: Any, rate: float, seed: int) -> dict[str, Any]:
        if self.left == 0:
            raise OutOfTime
        self.left -= 1
        self.asked.append((system.name, seed))
        held = 0.95 if rate < 10 else 0.5
        where = {"scenario": cell.scenario, "engines": cell.engines, "system": system.name, "seed": seed}
        return {**where, "rate_per_s": rate, "asked_per_s": rate, "attainment": held, "drained": True,
                "admitted": 9, "admitted_kept": 1.0, "kept_per_s": rate, "measured_on": self.on}  # fmt: skip


def _results(windows: int, before: dict[str, Any] | None = None) -> Results:
    return Results(cast("Bench", _NoBench(windows)), (1, 2), False, before=before or {})


def test_another_run_adds_its_cells_and_what_it_did_not_finish_replaces_nothing(tmp_path: Path) -> None:
    chosen, coder = systems(1, ["vllm", "ours"]), Cell("coder", 1)
    first = _results(1000)
    first.measure(CHAT, chosen)
    path = tmp_path / "real.json"
    path.write_text(json.dumps(first.told()))
    assert first.told()["geomean_vs_stock_default"] == 1.0

    second = _results(5, of_other_runs(path, first.method()))
    with pytest.raises(OutOfTime):
        second.measure(CHAT, chosen)
    assert second.told()["rows"] == json.loads(path.read_text())["rows"]
    third = _results(900, of_other_runs(path, first.method()))
    third.measure(coder, chosen)
    told = third.told()
    assert {row["scenario"]: row["measured_on"]["commit"] for row in told["rows"]} == {
        "chatbot": "commit 1000", "coder": "commit 900",
    }  # fmt: skip
    assert [(row["scenario"], row["system"]) for row in told["rows"]] == [
        ("chatbot", "vllm"), ("chatbot", "ours"), ("coder", "vllm"), ("coder", "ours"),
    ]  # fmt: skip
    assert {row["scenario"] for row in told["windows"]} == {row["scenario"] for row in told["loads"]}
    with pytest.raises(ConfigError, match="chatbot on 1 have ours as well"):
        third.measure(CHAT, chosen[:1])


def test_what_is_compared_is_measured_by_turns_and_the_same_settings_only_once() -> None:
    results = _results(1000)
    results.measure(CHAT, systems(1, ["vllm", "vllm-tuned", "ours"]))
    asked = cast("_NoBench", results.bench).asked
    searched = [turn for turn in dict.fromkeys(asked) if turn[0] != "vllm-tuned"]
    assert searched == list(dict.fromkeys(asked)) == [("vllm", 1), ("ours", 1), ("vllm", 2), ("ours", 2)]
    rows = {row["system"]: row for row in results.told()["rows"]}
    assert rows["vllm-tuned"] == {**rows["vllm"], "system": "vllm-tuned", "tuned": True}


def test_figures_of_another_method_are_not_mixed_with_these(tmp_path: Path) -> None:
    path, method = tmp_path / "real.json", _results(0).method()
    assert of_other_runs(path, method) == {}
    path.write_text(json.dumps({"rows": [], "method": {**method, "seeds": 5}}))
    with pytest.raises(ConfigError, match="seeds = 5, and now it is 2"):
        of_other_runs(path, method)
    path.write_text("[]")
    with pytest.raises(ConfigError, match="not of this bench"):
        of_other_runs(path, method)


# ---- the systems -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(SYSTEMS))
def test_every_system_has_a_configuration_and_a_simulated_twin(name: str) -> None:
    system = SYSTEMS[name]
    config = configuration(CPU, system, system.defaults(CPU), "scale", None)
    assert config.pools.total == system.engines
    assert all(one.ttft_floor_ms == 0 for one in config.slo_classes.values())
    assert (config.engine.speculative is not None) == bool(system.drafts)
    assert config.planner.pairs == (system.mode != "colocated")
    workload, _ = _workload(rate=0.5 * system.engines)
    out = MACHINE.serve(system, system.defaults(CPU), workload, 1)
    assert out.attainment >= SHARE


@pytest.mark.parametrize("name", list(SYSTEMS))
def test_on_gpus_every_system_is_as_it_comes_there(name: str) -> None:
    system = SYSTEMS[name]
    config = configuration(GPU, system, system.defaults(GPU), GPU.model, None)
    assert (config.engine.num_gpus, config.engine.async_scheduling) == (1, True)
    assert config.engine.max_batch_tokens == 8192
    workload = CHAT.workload(GPU, 2.0, 30.0, 1)
    assert workload.prompt_tokens.mean() > 3 * CHAT.workload(CPU, 2.0, 30.0, 1).prompt_tokens.mean()


@pytest.mark.parametrize("site", [CPU, GPU], ids=["cpu", "gpu"])
def test_a_profile_can_be_measured_and_every_request_fits(site: Site) -> None:
    config = configuration(site, SYSTEMS["ours"], site.our_defaults, site.model, None).engine
    assert config.max_model_len is not None
    assert config.max_model_len > config.max_batch_tokens, "chunks over KV that is there are measured as well"
    for scenario in {name for names in LAYOUTS.values() for name in names}:
        load = Cell(scenario, 1).workload(site, 2.0, 120.0, 1)
        assert (load.prompt_tokens + load.max_tokens).max() <= config.max_model_len


def test_vllms_own_server_has_graphs_and_overlapped_steps_on_a_gpu() -> None:
    pytest.importorskip("vllm")
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    system = SYSTEMS["vllm"]
    for site in (CPU, GPU):
        config = configuration(site, system, system.defaults(site), "tiny", None)
        asked = make_arg_parser(FlexibleArgumentParser()).parse_args(own_server.arguments(config, 1))
        assert asked.enforce_eager == (site is CPU)
        assert asked.async_scheduling is (False if site is CPU else None)
        assert asked.kv_transfer_config.kv_buffer_device == ("cpu" if site is CPU else "cuda")


def test_gpus_are_those_that_the_driver_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="nvidia-smi shows no GPU here"):
        GPU.devices()
    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\necho NVIDIA H200\necho NVIDIA H200\n")
    driver.chmod(0o755)
    assert GPU.devices() == ["NVIDIA H200", "NVIDIA H200"]
    assert GPU.environment(1) == {"CUDA_VISIBLE_DEVICES": "1"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert GPU.devices() == ["NVIDIA H200"]
    assert GPU.environment(0) == {"CUDA_VISIBLE_DEVICES": "1"}
    assert CPU.environment(1) == {}


def test_engines_share_no_core_and_leave_some_if_there_are_any(monkeypatch: pytest.MonkeyPatch) -> None:
    def on(cores: int, engines: int, each: int) -> Any:
        monkeypatch.setattr(running_module.os, "sched_getaffinity", lambda _: set(range(cores)))
        return cores_of(engines, each)

    assert on(2, 1, 1) == (((1,),), (0,))
    assert on(2, 2, 1) == (((0,), (1,)), (0, 1))
    assert on(8, 2, 2) == (((4, 5), (6, 7)), (0, 1, 2, 3))
    assert on(4, 2, 2) == (((2,), (3,)), (0, 1))


BUSY = """
import threading, time
threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
until = time.process_time() + 0.3
while time.process_time() < until: pass
print(threading.get_native_id(), flush=True)
time.sleep(60)
"""


def test_the_thread_that_steps_an_engine_has_its_core_to_itself() -> None:
    cores_here = sorted(os.sched_getaffinity(0))
    first, last = cores_here[0], cores_here[-1]
    with subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE, text=True) as engine:
        try:
            assert engine.stdout is not None
            stepping = int(engine.stdout.readline())
            keep_apart({engine.pid}, [engine.pid], [(last,)], (first,))
            cores = {one.id: os.sched_getaffinity(one.id) for one in psutil.Process(engine.pid).threads()}
        finally:
            engine.kill()
    assert cores.pop(stepping) == {last}
    assert list(cores.values()) == [{first}]


def test_a_system_that_there_is_not_is_named() -> None:
    with pytest.raises(ConfigError, match="no system 'sglang'; there are vllm"):
        systems(1, ["sglang"])


def test_tuning_finds_settings_that_hold_no_less(monkeypatch: pytest.MonkeyPatch) -> None:
    cell, system = Cell("summarizer", 1), SYSTEMS["vllm-tuned"]
    found: dict[Any, float] = {}
    knee: Callable[..., float] = Machine.knee

    def noted(self: Machine, *asked: Any) -> float:
        found[asked[2]] = knee(self, *asked)
        return found[asked[2]]

    monkeypatch.setattr(Machine, "knee", noted)
    best = MACHINE.tuned(cell, system)
    assert found[best] == max(found.values())
    assert found[best] >= found[replace(system.defaults(CPU))]
