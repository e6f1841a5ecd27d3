"""The made models: same seed, same bytes; a whole model or none; and every token can be read."""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from hashlib import sha256
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from coordinator.cli.model import app
from engine import models
from engine.errors import ConfigError

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache") / "models"


@pytest.fixture(scope="module")
def tiny(home: Path) -> Path:
    return models.make_model("tiny", home)


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(tiny))


def _digests(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize(
    ("name", "least", "most"), [("tiny", 4.5e6, 5.5e6), ("scale", 81e6, 83e6), ("llama-8b", 7e9, 8e9)]
)
def test_recipes_have_the_promised_size(name: str, least: float, most: float) -> None:
    recipe = models.load_recipe(name)
    assert least < recipe.parameters < most
    assert recipe.max_position_embeddings >= 4096


def test_a_model_without_weights_has_all_the_rest(tmp_path: Path, tiny: Path) -> None:
    made = models.make_model("llama-8b", tmp_path)
    assert models.lacks_weights(str(made))
    assert not models.lacks_weights(str(tiny))
    assert not models.lacks_weights("org/some-model")
    assert not list(made.glob("*.safetensors"))
    recipe = models.load_recipe("llama-8b")
    config = json.loads((made / "config.json").read_text())
    assert (config["num_hidden_layers"], config["dtype"]) == (32, "bfloat16")
    assert config["architectures"] == ["LlamaForCausalLM"]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(made))
    assert len(tokenizer) == config["vocab_size"] == recipe.vocab_size
    assert tokenizer.decode([recipe.vocab_size - 1]) == f"<spare-{recipe.spare_tokens - 1}>"


def test_parameters_written_are_those_of_the_recipe(tiny: Path) -> None:
    made = json.loads((tiny / "recipe.json").read_text())
    assert made["parameters"] == models.load_recipe("tiny").parameters
    assert set(made["versions"]) == {"torch", "transformers", "tokenizers"}
    assert json.loads((tiny / "config.json").read_text())["dtype"] == "float32"


def test_same_recipe_gives_the_same_bytes(tiny: Path, tmp_path: Path) -> None:
    assert _digests(models.make_model("tiny", tmp_path)) == _digests(tiny)


def test_made_once_and_again_only_when_asked_or_changed(tiny: Path, home: Path) -> None:
    before = (tiny / "model.safetensors").stat()
    assert models.make_model("tiny", home) == tiny
    assert (tiny / "model.safetensors").stat().st_mtime_ns == before.st_mtime_ns
    recipe_file = tiny / "recipe.json"
    recipe_file.write_text(recipe_file.read_text().replace('"num_hidden_layers": 4', '"num_hidden_layers": 3'))
    models.make_model("tiny", home)
    assert (tiny / "model.safetensors").stat().st_mtime_ns > before.st_mtime_ns
    assert sorted(path.name for path in home.iterdir()) == [".tiny.lock", "tiny"]


def test_two_makers_at_once_do_not_break_each_other(tmp_path: Path) -> None:
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        paths = [pool.submit(models.make_model, "tiny", tmp_path, True) for _ in range(2)]
        assert {path.result(timeout=120) for path in paths} == {tmp_path / "tiny"}
    assert (tmp_path / "tiny" / "recipe.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".tiny.lock", "tiny"]


@pytest.mark.parametrize("token", models.MARKUP_TOKENS)
def test_markup_has_the_id_that_is_told_without_a_tokenizer(tokenizer: Any, token: str) -> None:
    assert models.token_id_of("tiny", token) == tokenizer.convert_tokens_to_ids(token)


def test_every_token_can_be_read(tokenizer: Any) -> None:
    assert len(tokenizer) == models.load_recipe("tiny").vocab_size
    for token_id in range(len(tokenizer)):
        assert tokenizer.convert_ids_to_tokens(token_id) is not None
        assert tokenizer.decode([token_id]) != ""


def test_text_survives_encoding(tokenizer: Any) -> None:
    text = 'naïve 模型 🙂 {"a": [1, null]}\n    return x  '
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_control_and_markup_tokens_are_single(tokenizer: Any) -> None:
    for token in models.CONTROL_TOKENS + models.MARKUP_TOKENS:
        assert len(tokenizer(token).input_ids) == 1
    assert tokenizer.eos_token == "<|im_end|>"
    kept = tokenizer.decode(tokenizer("<think>a</think><|im_end|>").input_ids, skip_special_tokens=True)
    assert kept == "<think>a</think>"


def test_chat_template_renders_a_tool_loop(tokenizer: Any) -> None:
    call = {"name": "add", "arguments": {"a": 1}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": call}]},
        {"role": "tool", "tool_call_id": "1", "content": "2"},
    ]
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    text = tokenizer.apply_chat_template(messages, tools=[tool], tokenize=False, add_generation_prompt=True)
    assert text.startswith("<|im_start|>system\nBe brief.")
    assert '"parameters": {"type": "object"}' in text
    assert '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>' in text
    assert text.endswith("<|im_start|>tool\n2<|im_end|>\n<|im_start|>assistant\n")
    assert text.count("Be brief.") == 1


def test_chat_template_without_tools_keeps_the_system_message(tokenizer: Any) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
    )


def test_resolve_keeps_hub_names_and_existing_folders(tiny: Path) -> None:
    assert models.resolve_model("org/some-model") == "org/some-model"
    assert models.resolve_model(str(tiny)) == str(tiny)


def test_resolve_finds_a_named_model_in_the_cache(
    home: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLOSSERVE_CACHE", str(home.parent))
    assert models.resolve_model("tiny") == str(tiny)


@pytest.mark.parametrize("value", ["./missing", "/no/such/model", "~/no/such/model", "a/b/c", "gone/"])
def test_resolve_says_what_to_do_about_a_missing_path(value: str) -> None:
    with pytest.raises(ConfigError, match=r"does not exist.*slosserve model make"):
        models.resolve_model(value)


def test_resolve_refuses_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json"):
        models.resolve_model(str(tmp_path))


def test_unknown_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'huge'.*tiny, scale"):
        models.make_model("huge", tmp_path)


def test_command_prints_path_parameters_and_seconds(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLOSSERVE_CACHE", str(tmp_path))
    result = CliRunner().invoke(app, ["make", "tiny", "--json"])
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["path"] == str(tmp_path / "models" / "tiny")
    assert facts["parameters"] == models.load_recipe("tiny").parameters
    assert facts["seconds"] > 0


def test_command_refuses_an_unknown_name() -> None:
    result = CliRunner().invoke(app, ["make", "huge"])
    assert result.exit_code == 2
    assert "choose one of tiny, scale" in result.stderr
