"""A model is served in numbers that the processor computes with."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine import dtype
from engine.dtype import dtype_here


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        ("flags\t\t: fpu avx512f avx512_vnni\n", "float32"),
        ("flags\t\t: fpu avx512f avx512_bf16\n", "auto"),
        ("Features\t: fp asimd bf16\n", "auto"),
        ("Features\t: fp asimd\n", "float32"),
        ("processor\t: 0\n", "auto"),
    ],
)
def test_a_cpu_without_bfloat16_serves_in_float32_unless_told_otherwise(
    cpuinfo: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(cpuinfo)
    monkeypatch.setattr(dtype, "CPUINFO", tmp_path / "cpuinfo")
    assert dtype_here("auto", on_cpu=True) == expected
    assert dtype_here("auto", on_cpu=False) == "auto"
    assert dtype_here("bfloat16", on_cpu=True) == "bfloat16"


def test_a_system_that_does_not_say_is_left_to_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dtype, "CPUINFO", tmp_path / "none")
    assert dtype_here("auto", on_cpu=True) == "auto"
