"""The configuration: precedence, and a clear error for whatever is wrong."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from coordinator.cluster import node_names
from coordinator.config import ClusterConfig, load_config
from coordinator.config_layers import parse_assignment, shipped_configs
from coordinator.virtual_nodes import hosted, virtual_cost
from engine.errors import ConfigError


@pytest.fixture(autouse=True)
def _no_variables_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in [name for name in os.environ if name.startswith("SLOSSERVE_")]:
        monkeypatch.delenv(variable)


def write(folder: Path, text: str) -> Path:
    path = folder / "cluster.yaml"
    path.write_text(text)
    return path


def error_of(path: Path | str | None, overrides: dict[str, object] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def test_flag_beats_environment_beats_yaml_beats_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, "endpoint: {port: 1001, host: 0.0.0.0, max_waiting: 7}\n")
    monkeypatch.setenv("SLOSSERVE_ENDPOINT__PORT", "1002")
    monkeypatch.setenv("SLOSSERVE_ENDPOINT__HOST", "10.0.0.1")
    endpoint = load_config(path, {"endpoint.port": 1003}).endpoint
    assert (endpoint.port, endpoint.host, endpoint.max_waiting, endpoint.count) == (1003, "10.0.0.1", 7, 1)


@pytest.mark.parametrize("name", sorted(shipped_configs()))
def test_shipped_configurations_are_valid(name: str) -> None:
    config = load_config(name)
    assert config.name == name
    assert config.pools.total >= 1


def test_laptop_is_one_prefill_and_one_decode_node_within_two_cores() -> None:
    config = load_config("laptop")
    assert (config.pools.prefill, config.pools.decode, config.pools.mixed) == (1, 1, 0)
    assert config.engine.num_cpus * config.pools.total <= 2
    assert config.model == "tiny"


def test_slo_classes_are_those_of_the_paper_unless_changed(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "slo_classes: {coder: {ttft_ms: 250}, mine: {tpot_ms: 30}}\n"))
    classes = config.slo_classes
    assert {(name, slo.ttft_scale, slo.tpot_ms) for name, slo in classes.items()} == {
        ("chatbot", 5, 100),
        ("coder", 5, 50),
        ("summarizer", 3, 100),
        ("tool", 3, 50),
        ("reasoning", 3, 100),
        ("mine", 5, 30),
    }
    assert classes["coder"].ttft_ms == 250
    assert classes["reasoning"].thinking_tpot_ms == 50


def test_unknown_key_in_a_file_names_file_key_and_a_likely_one(tmp_path: Path) -> None:
    path = write(tmp_path, "endpoint: {prot: 8001}\n")
    error = error_of(path)
    assert str(path) in error
    assert "endpoint.prot" in error
    assert 'Did you mean "port"?' in error


def test_unknown_key_of_an_slo_class_is_found(tmp_path: Path) -> None:
    error = error_of(write(tmp_path, "slo_classes: {chatbot: {tpot: 80}}\n"))
    assert "slo_classes.chatbot.tpot" in error
    assert 'Did you mean "tpot_ms"?' in error


def test_unknown_environment_key_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLOSSERVE_ENDPOINT__PROT", "8001")
    assert "environment SLOSSERVE_ENDPOINT__PROT" in error_of("laptop")


@pytest.mark.parametrize("variable", ["SLOSSERVE_MODLE", "SLOSSERVE_ENDPIONT__PORT"])
def test_misspelt_section_in_the_environment_is_an_error(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "1")
    error = error_of("laptop")
    assert variable in error
    assert "Did you mean" in error


def test_variables_with_another_use_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CACHE", "RUN_DIR", "DATA", "URL", "RUN_MARK"):
        monkeypatch.setenv(f"SLOSSERVE_{name}", "/somewhere")
    assert load_config("laptop").name == "laptop"


def test_environment_of_the_engine_keeps_its_capitals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLOSSERVE_ENGINE__ENV__OMP_NUM_THREADS", "2")
    assert load_config("laptop").engine.env["OMP_NUM_THREADS"] == "2"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"pools.decode": 0}, ["command line", "pools", "decode"]),
        ({"pools.prefill": -1}, ["pools.prefill", "-1"]),
        ({"endpoint.port": 65536}, ["endpoint.port", "65536"]),
        ({"endpoint.port": 65535, "endpoint.count": 2}, ["endpoint", "65535"]),
        ({"engine.max_num_seqs": "many"}, ["engine.max_num_seqs", "many"]),
        ({"slo_classes.chatbot.tpot_ms": 0}, ["slo_classes.chatbot.tpot_ms", "greater than 0"]),
        ({"dtype": "int4"}, ["dtype", "bfloat16"]),
        ({"name": "Two Words"}, ["name", "Two Words"]),
        ({"endpoint": 3}, ["endpoint", "3"]),
        ({"transfer.lease_s": 0}, ["transfer.lease_s"]),
    ],
)
def test_wrong_values_are_named(overrides: dict[str, object], words: list[str]) -> None:
    error = error_of("laptop", overrides)
    assert all(word in error for word in words), error


def test_every_mistake_is_told_at_once() -> None:
    error = error_of("laptop", {"endpoint.prot": 1, "dtype": "int4"})
    assert "endpoint.prot" in error
    assert "dtype" in error


@pytest.mark.parametrize("text", ["endpoint: {port: 8000", "- a\n- list\n", "1: 2\n", "a: b: c\n"])
def test_files_that_are_no_configuration_are_refused_with_their_name(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, text)
    assert str(path) in error_of(path)


def test_no_such_configuration_lists_those_that_ship() -> None:
    error = error_of("labtop")
    assert 'Did you mean "laptop"?' in error
    assert "two-gpus" in error


def test_assignments_are_read_as_yaml() -> None:
    assert parse_assignment("engine.max_num_seqs=32") == ("engine.max_num_seqs", 32)
    assert parse_assignment("engine.speculative={method: ngram}") == (
        "engine.speculative",
        {"method": "ngram"},
    )
    with pytest.raises(ConfigError, match="key=value"):
        parse_assignment("engine.max_num_seqs")


def test_resolved_configuration_comes_back_as_written_and_is_private(tmp_path: Path) -> None:
    config = load_config("laptop", {"endpoint.api_key": "12345", "engine.speculative": {"method": "ngram"}})
    path = config.write(tmp_path)
    assert ClusterConfig.read(tmp_path) == config
    assert path.stat().st_mode & 0o077 == 0


def test_configuration_is_read_only() -> None:
    config = load_config("laptop")
    with pytest.raises(ValidationError):
        config.model = "other"


def test_a_step_profile_is_found_by_name_by_path_or_by_the_model() -> None:
    assert load_config(None, {"model": "tiny"}).step_profile is not None
    assert load_config(None, {"model": "some/model"}).step_profile is None
    named = load_config(None, {"model": "some/model", "engine.step_profile": "scale"}).step_profile
    assert named is not None
    assert named.name == "scale.json"
    with pytest.raises(ConfigError, match=r"engine\.step_profile: there is no such file.*scale, tiny"):
        load_config(None, {"engine.step_profile": "nowhere.json"})


def test_steps_are_held_to_a_profile_that_is_named() -> None:
    assert load_config(None, {"engine.hold_steps": True, "engine.step_profile": "scale"}).engine.hold_steps
    with pytest.raises(ConfigError, match=r"engine\.hold_steps .*give one"):
        load_config(None, {"engine.hold_steps": True})
    with pytest.raises(ConfigError, match=r"engine\.hold_steps holds the steps of real engines"):
        load_config("virtual", {"engine.hold_steps": True, "engine.step_profile": "scale"})


def test_virtual_engines_cost_what_their_own_section_says() -> None:
    config = load_config("virtual")
    assert config.engines == "virtual"
    assert config.step_profile is None, "never the profile of the model whose tokenizer they use"
    assert virtual_cost(config).predict(100) == pytest.approx(0.0248 + 100 * 68.8e-6)
    profiled = load_config("virtual", {"virtual.profile": "a100-opt-13b"})
    assert profiled.step_profile is not None
    assert virtual_cost(profiled).predict(100) < virtual_cost(config).predict(100)
    with pytest.raises(ConfigError, match=r"virtual\.profile: there is no such file"):
        load_config("virtual", {"virtual.profile": "b200"})


def test_every_host_gets_its_part_of_every_pool() -> None:
    config = load_config("virtual", {"pools.prefill": 2, "pools.mixed": 3, "virtual.processes": 2})
    hosts = hosted(config)
    assert {name: sorted(nodes.values()) for name, nodes in hosts.items()} == {
        "virtual-0": ["decode", "mixed", "mixed", "prefill"],
        "virtual-1": ["decode", "mixed", "prefill"],
    }
    assert {name for nodes in hosts.values() for name in nodes} == set(node_names(config))
