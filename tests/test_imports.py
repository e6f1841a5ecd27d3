"""What may import what: the core stays light, and folders import one way."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "vllm", "ray", "fastapi", "transformers")
LIGHT_MODULES = (
    "coordinator.config",
    "coordinator.cli",
    "coordinator.cli.main",
    "coordinator.cli.up",
    "coordinator.cli.status",
    "coordinator.cli.pools",
    "coordinator.cluster",
    "coordinator.cluster_process",
    "coordinator.placement",
    "coordinator.planner",
    "engine.base",
    "engine.batch",
    "engine.cost",
    "engine.messages",
    "kv_transfer.base",
)
# Each folder, and what of ours it may import beside itself.
MAY_IMPORT = {
    "kv_transfer": set(),
    "engine": {"kv_transfer", "configs"},
    "prefill_node": {"engine", "kv_transfer"},
    "decode_node": {"engine", "kv_transfer"},
    "coordinator": {"prefill_node", "decode_node", "engine", "kv_transfer", "configs"},
    "benchmarks": {"coordinator", "prefill_node", "decode_node", "engine", "kv_transfer", "configs"},
    "configs": set(),
}


@pytest.mark.parametrize("module", LIGHT_MODULES)
def test_core_imports_without_heavy_libraries(module: str) -> None:
    script = f"import sys, {module}; print(*[name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_imports_run_one_way(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    wrong = [
        f"{file.relative_to(ROOT)}:{line} imports {name}"
        for file in files
        for line, name in _imports(file)
        if name in MAY_IMPORT and name != folder and name not in MAY_IMPORT[folder]
    ]
    assert wrong == []


def test_every_package_of_ours_is_listed() -> None:
    ours = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
    assert ours == set(MAY_IMPORT)


def test_an_installation_has_every_folder_with_code() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    there = {
        path.parent.relative_to(ROOT).as_posix().replace("/", ".")
        for folder in MAY_IMPORT
        for path in (ROOT / folder).rglob("__init__.py")
    }
    assert listed == there


def test_a_planner_decides_without_clock_io_or_randomness() -> None:
    """The planner is a function of values: time is passed in."""
    forbidden = {"time", "random", "os", "socket", "asyncio", "zmq", "threading", "subprocess"}
    files = sorted((ROOT / "coordinator/planner").rglob("*.py"))
    wrong = [
        f"{file.name}:{line}: {name}" for file in files for line, name in _imports(file) if name in forbidden
    ]
    assert wrong == []


def test_only_one_file_touches_the_internals_of_vllm_scheduling() -> None:
    users = {
        str(file.relative_to(ROOT))
        for folder in MAY_IMPORT
        for file in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "") == "vllm.v1.core.sched.scheduler"
    }
    assert users <= {"engine/vllm_scheduler.py"}


def _imports(file: Path) -> list[tuple[int, str]]:
    """Line and first part of every imported name, wherever in the file it stands."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name.partition(".")[0]) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.append((node.lineno, node.module.partition(".")[0]))
    return found
