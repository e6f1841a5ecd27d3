"""Published coefficients: the formulas, the three forms made of them, and errors that name file and field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.coefficients import Coefficients
from engine.cost_fit import predicted_s
from engine.errors import ConfigError
from engine.profile import StepProfile
from engine.request import RoleName

# Rounded from those of OPT-13B on A100, which DistServe's authors published.
SETS = {
    "decoding_large_small_bs_threshold": 95,
    "prefill": [18.1, 0.102, 7.12e-06],
    "decoding_smallbs": [19.9, 0.00063, 0.0385],
    "decoding_largebs": [7.17, 0.00058, 0.158],
}
FILE: dict[str, Any] = {
    "note": "rounded",
    "kv_capacity_tokens": {"1": 66_144},
    "distserve": {"1": SETS},
    "vllm": {"1": SETS | {"prefill": [22.0, 0.14, 8e-6]}},
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "opt.json"
    path.write_text(json.dumps(FILE), encoding="utf-8")
    return path


@pytest.fixture
def published(file: Path) -> Coefficients:
    return Coefficients.read(file)


def test_the_formulas_are_those_of_the_file(published: Coefficients) -> None:
    prefill_ms = 18.1 + 0.102 * 700 + 7.12e-6 * (200**2 + 500**2) + 2 + 1e-4 * 700
    assert published.prefill_s([200, 500]) == pytest.approx(prefill_ms / 1e3)
    assert published.decode_s(94, 9400) == pytest.approx((19.9 + 0.00063 * 9400 + 0.0385 * 94 + 2 + 0.94) / 1e3)
    assert published.decode_s(95, 9500) == pytest.approx((7.17 + 0.00058 * 9500 + 0.158 * 95 + 2 + 0.95) / 1e3)


def test_each_system_has_its_own(file: Path) -> None:
    assert Coefficients.read(file, "vllm").prefill_s([100]) > Coefficients.read(file).prefill_s([100])


@pytest.mark.parametrize("prompts", [[1], [512], [2048], [100, 900, 30], [64] * 16])
def test_prefills_are_exact(published: Coefficients, prompts: list[int]) -> None:
    cost = published.profile(RoleName.PREFILL).cost
    work = sum(tokens**2 / 2 for tokens in prompts)
    predicted = cost.predict(sum(prompts), seqs=len(prompts), prefill_work=work)
    assert predicted == pytest.approx(published.prefill_s(prompts))


def test_a_prompt_in_chunks_does_the_same_work(published: Coefficients) -> None:
    cost = published.profile(RoleName.PREFILL).cost
    chunks = 2 * (18.1 + 2) + 0.102 * 1000 + 7.12e-6 * 1000**2 + 1e-4 * (500 + 1000)
    assert cost.prefill_alone_s(1000, 500) == pytest.approx(chunks / 1e3)


def test_decodes_err_by_what_the_profile_says(published: Coefficients) -> None:
    profile = published.profile(RoleName.DECODE)
    errors = [
        profile.cost.predict(seqs, seqs=seqs, context_tokens=seqs * context)
        / published.decode_s(seqs, seqs * context)
        - 1
        for seqs in (1, 10, 50, 94, 95, 100, 110, 150, 250)
        for context in (16, 200, 260)
    ]
    assert min(errors) > -0.05
    assert max(errors) < 0.06
    assert profile.about["error"].startswith("-4.")
    assert "second set from batch 95 on" in profile.about["switch"]
    assert "meet at batch 107" in profile.about["switch"]
    assert "from it on +0.0% to +5.5%" in profile.about["switch"]


def test_a_mixed_replica_is_never_promised_too_much(published: Coefficients) -> None:
    cost = published.profile(RoleName.MIXED).cost
    batches = published.grid(RoleName.MIXED)
    excess = predicted_s(cost, batches) / batches.seconds - 1
    assert excess.min() > -1e-6
    assert 0.15 < excess.max() < 0.25
    # Beyond the grid too, where the square of the length counts.
    assert cost.predict(20_000, seqs=1, prefill_work=2e8) > published.prefill_s([20_000])


@pytest.mark.parametrize("role", RoleName)
def test_the_saved_form_is_a_step_profile(published: Coefficients, tmp_path: Path, role: RoleName) -> None:
    profile = published.profile(role)
    profile.save(tmp_path / "p.json")
    assert StepProfile.load(tmp_path / "p.json") == profile
    assert profile.family == f"coefficients-{role}"
    assert profile.sources[0].file == "opt.json"
    assert profile.about["kv_tokens"] == "66144"
    assert profile.about["note"] == "rounded"
    assert profile.held_out.r2 > 0.9


def test_one_set_for_all_batches_is_exact(file: Path) -> None:
    same = SETS | {"decoding_largebs": SETS["decoding_smallbs"]}
    file.write_text(json.dumps(FILE | {"distserve": {"1": same}}), encoding="utf-8")
    profile = Coefficients.read(file).profile(RoleName.DECODE)
    assert profile.held_out.p99_error < 1e-9


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"distserve": {"2": SETS}}, r"distserve\.1 is missing; distserve has: 2"),
        ({"distserve": {"1": {"prefill": [1, 2, 3]}}}, r"distserve\.1: .*decoding_smallbs"),
        ({"distserve": {"1": SETS | {"prefill": [1, 2]}}}, r"distserve\.1: .*length 3.*\$\.prefill"),
        ({"distserve": {"1": SETS | {"prefill": [1, "x", 2]}}}, r"distserve\.1: .*\$\.prefill\[1\]"),
        ({"distserve": {"1": SETS | {"prefill": [1, -0.1, 2]}}}, r"distserve\.1: .*>= 0.*\$\.prefill\[1\]"),
        ({"distserve": [SETS]}, r"distserve\.1 is missing"),
        ({"kv_capacity_tokens": {"1": 0}}, r"kv_capacity_tokens\.1: .*>= 16"),
        ({"kv_capacity_tokens": {}}, r"kv_capacity_tokens\.1 is missing"),
    ],
)
def test_a_bad_field_is_named_with_its_file(file: Path, changed: dict[str, Any], complaint: str) -> None:
    file.write_text(json.dumps(FILE | changed), encoding="utf-8")
    with pytest.raises(ConfigError, match=rf"opt\.json: {complaint}"):
        Coefficients.read(file)


@pytest.mark.parametrize(("content", "complaint"), [("", "is not JSON"), ("[]", "holds no coefficients")])
def test_what_holds_no_coefficients_is_an_error(file: Path, content: str, complaint: str) -> None:
    file.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=rf"opt\.json: {complaint}"):
        Coefficients.read(file)


def test_a_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.json: cannot be read"):
        Coefficients.read(tmp_path / "none.json")
