"""Random-weight models, made here: `tiny` for tests and the demo, `scale` and `llama-8b` for measurements.

A model is made from its recipe (configs/models/NAME.yaml) with a fixed seed, so two machines get the same
weights and the same tokenizer. It is written beside its final place and renamed, under a lock: a reader sees
a whole model or none, and two makers do not disturb each other.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from engine.errors import ConfigError

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

MODEL_NAMES = ("tiny", "scale", "llama-8b")
END_OF_TURN = "<|im_end|>"
END_OF_TEXT = "<|endoftext|>"
CONTROL_TOKENS = ("<|im_start|>", END_OF_TURN, END_OF_TEXT)
# Parsers of reasoning and tool calls look for these in the text, so they are not dropped as control tokens.
THINK_END = "</think>"
MARKUP_TOKENS = ("<think>", THINK_END, "<tool_call>", "</tool_call>")
GENERATED_LINES = 4000
NOT_OF_THE_SHAPE = ("description", "seed", "dtype", "spare_tokens", "weights")
CONSTANT_CHANNEL = 0.5  # large beside the other channels of an embedding, so its share of the norm is steady

CHAT_TEMPLATE = """\
{%- if tools -%}
<|im_start|>system
{% if messages[0].role == 'system' %}{{ messages[0].content }}

{% endif -%}
You can call these tools:
{% for tool in tools %}{{ tool | tojson }}
{% endfor -%}
To call one, answer with <tool_call>{"name": NAME, "arguments": ARGUMENTS}</tool_call>.<|im_end|>
{% endif -%}
{%- for message in messages -%}
{%- if message.role == 'tool' -%}
<|im_start|>tool
{{ message.content }}<|im_end|>
{% elif not (tools and loop.first and message.role == 'system') -%}
<|im_start|>{{ message.role }}
{% if message.content %}{{ message.content }}{% endif -%}
{%- for call in message.tool_calls or [] %}
{%- set arguments = call.function.arguments %}
<tool_call>{"name": {{ call.function.name | tojson }}, "arguments": \
{{ arguments if arguments is string else arguments | tojson }}}</tool_call>
{%- endfor -%}
<|im_end|>
{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a model is made from. Field names are those of transformers' LlamaConfig where it has them.

    `spare_tokens` of the vocabulary occur in no text. Without `weights` the engine makes up its own.
    """

    description: str
    seed: int
    dtype: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    max_position_embeddings: int
    initializer_range: float
    spare_tokens: int
    weights: bool
    quiet_weight: float  # head weight that lowers the logits of white space and of parts of characters

    @property
    def parameters(self) -> int:
        """Weights of the Llama with this shape, embeddings untied."""
        head = self.hidden_size // self.num_attention_heads
        attention = 2 * self.hidden_size * head * (self.num_attention_heads + self.num_key_value_heads)
        layer = attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        return self.num_hidden_layers * layer + (2 * self.vocab_size + 1) * self.hidden_size


def load_recipe(name: str) -> Recipe:
    """The recipe of `name`. Raises ConfigError for an unknown name or a recipe with wrong keys."""
    if name not in MODEL_NAMES:
        raise ConfigError(f"no recipe for a model named {name!r}: choose one of {', '.join(MODEL_NAMES)}")
    values = yaml.safe_load(_recipe_text(f"{name}.yaml"))
    expected = {field.name for field in fields(Recipe)}
    if set(values) != expected:
        odd = ", ".join(sorted(set(values) ^ expected))
        raise ConfigError(f"configs/models/{name}.yaml: keys missing or unknown: {odd}")
    return Recipe(**values)


def token_id_of(name: str, token: str) -> int:
    """The id of one of the MARKUP_TOKENS in a model that is made here. Raises ConfigError for another model."""
    recipe = load_recipe(name)
    return recipe.vocab_size - recipe.spare_tokens - len(MARKUP_TOKENS) + MARKUP_TOKENS.index(token)


def lacks_weights(folder: str) -> bool:
    """Whether a model was made without weights, so that an engine has to make up its own."""
    try:
        made = json.loads((Path(folder) / "recipe.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return made.get("recipe", {}).get("weights") is False


def resolve_model(name_or_path: str) -> str:
    """What to hand to the engine: `tiny` and `scale` are made if missing; a path or a hub's name stays.

    Raises ConfigError when the value looks like a path and no model is there.
    """
    if name_or_path in MODEL_NAMES:
        return str(make_model(name_or_path))
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(
                f"model {name_or_path!r}: {path} has no config.json; give the folder of a saved model"
            )
        return str(path)
    if path.is_file():
        return str(path)
    if _looks_like_path(name_or_path):
        raise ConfigError(
            f"model {name_or_path!r}: {path} does not exist. Give an existing folder, a Hugging Face name "
            f"(org/name), or one of {', '.join(MODEL_NAMES)} (`slosserve model make tiny`)"
        )
    return name_or_path


def name_for_others(model: str) -> str:
    """What other hosts find a resolved model by: one that was made here is made there as well."""
    path = Path(model)
    return path.name if path.name in MODEL_NAMES and path.parent == cache_directory() / "models" else model


def make_model(name: str, directory: Path | None = None, force: bool = False) -> Path:
    """Folder of the model `name`, made if it is missing, if its recipe has changed, or if `force`.

    `directory` is where models are kept (default: `models` in the cache directory). Raises ConfigError for an
    unknown name or a folder that cannot be written.
    """
    recipe = load_recipe(name)
    home = directory if directory is not None else cache_directory() / "models"
    target = home / name
    if not force and _is_made(target, recipe):
        return target
    try:
        home.mkdir(parents=True, exist_ok=True)
        with _lock(home / f".{name}.lock"):
            if force or not _is_made(target, recipe):
                _write_model(recipe, target)
    except OSError as error:
        raise ConfigError(f"cannot write the model to {target}: {error}. Set SLOSSERVE_CACHE") from error
    return target


def cache_directory() -> Path:
    """Where made models are kept: SLOSSERVE_CACHE, or .cache/slosserve in the home folder."""
    return Path(os.environ.get("SLOSSERVE_CACHE") or "~/.cache/slosserve").expanduser()


def _looks_like_path(value: str) -> bool:
    return value.startswith(("/", ".", "~")) or value.endswith("/") or value.count("/") > 1 or "\\" in value


def _recipe_text(file_name: str) -> str:
    return files("configs").joinpath("models", file_name).read_text(encoding="utf-8")


def _is_made(target: Path, recipe: Recipe) -> bool:
    try:
        made = json.loads((target / "recipe.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return False
    return bool(made.get("recipe") == asdict(recipe))


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _write_model(recipe: Recipe, target: Path) -> None:
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        _fill(recipe, work / "new")
        if target.exists():
            target.rename(work / "old")
        (work / "new").rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _fill(recipe: Recipe, folder: Path) -> None:
    folder.mkdir()
    tokenizer = _train_tokenizer(recipe)
    tokenizer.save_pretrained(folder)
    parameters = _save_weights(recipe, tokenizer, folder)
    made = {
        "recipe": asdict(recipe),
        "parameters": parameters,
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers")},
    }
    (folder / "recipe.json").write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")


def _train_tokenizer(recipe: Recipe) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab_size - recipe.spare_tokens - len(CONTROL_TOKENS) - len(MARKUP_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(corpus(recipe.seed), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=END_OF_TURN,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[CONTROL_TOKENS[0]],
        model_max_length=recipe.max_position_embeddings,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_tokens([*MARKUP_TOKENS, *(f"<spare-{number}>" for number in range(recipe.spare_tokens))])
    tokenizer.chat_template = CHAT_TEMPLATE
    # An id that the model can sample but the tokenizer does not know would break detokenisation.
    if len(tokenizer) != recipe.vocab_size:
        raise ConfigError(f"the corpus gives {len(tokenizer)} tokens, the recipe asks for {recipe.vocab_size}")
    return tokenizer


def _save_weights(recipe: Recipe, tokenizer: PreTrainedTokenizerFast, folder: Path) -> int:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    shape = {key: value for key, value in asdict(recipe).items() if key not in NOT_OF_THE_SHAPE}
    config = LlamaConfig(
        **shape,
        bos_token_id=tokenizer.convert_tokens_to_ids(END_OF_TEXT),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    if not recipe.weights:
        config.architectures, config.dtype = ["LlamaForCausalLM"], recipe.dtype
        config.save_pretrained(folder)
        return recipe.parameters
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = LlamaForCausalLM(config)
    _quieten(model, _quiet_tokens(tokenizer), recipe.quiet_weight)
    model.to(getattr(torch, recipe.dtype)).save_pretrained(folder)
    return int(model.num_parameters())


def _quiet_tokens(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """White space, which pads a forced tool call, and parts of characters, which hold back a stream."""
    texts = ((token_id, tokenizer.decode([token_id])) for token_id in range(len(tokenizer)))
    return [token_id for token_id, text in texts if not text.strip() or "\ufffd" in text]


def _quieten(model: LlamaForCausalLM, token_ids: list[int], weight: float) -> None:
    """Lower the logits of `token_ids` by a bias. Llama's head has none, so channel 0 serves as one.

    Every embedding holds the same value there, no layer reads or writes it, and only the head sees it.
    """
    import torch

    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = CONSTANT_CHANNEL
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            for reads in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
                reads.weight[:, 0] = 0
            for writes in (attention.o_proj, mlp.down_proj):
                writes.weight[0, :] = 0
        model.lm_head.weight[:, 0] = 0
        model.lm_head.weight[token_ids, 0] = weight


def corpus(seed: int) -> Iterator[str]:
    """The tokenizer's training text: prose, then sentences, tool calls and JSON drawn from words."""
    yield from _corpus_source()["prose"].splitlines(keepends=True)
    words = corpus_words()
    draw = random.Random(seed)
    makers = (_sentence, _tool_call, _record)
    for line in range(GENERATED_LINES):
        yield makers[line % len(makers)](draw, words)


def corpus_words() -> list[str]:
    """Plain words, most of which are one token each for the made models."""
    return _corpus_source()["words"].split()


def _corpus_source() -> dict[str, str]:
    source: dict[str, str] = yaml.safe_load(_recipe_text("corpus.yaml"))
    return source


def _sentence(draw: random.Random, words: list[str]) -> str:
    chosen = draw.choices(words, k=draw.randint(4, 14))
    return " ".join(chosen).capitalize() + draw.choice((".", "?", "!", ",", ";")) + "\n"


def _tool_call(draw: random.Random, words: list[str]) -> str:
    arguments: dict[str, Any] = {draw.choice(words): draw.randint(0, 999), "unit": draw.choice(words)}
    return json.dumps({"name": f"{draw.choice(words)}_{draw.choice(words)}", "arguments": arguments}) + "\n"


def _record(draw: random.Random, words: list[str]) -> str:
    record = {draw.choice(words): [round(draw.random(), 2), True, None, draw.choice(words)] for _ in range(3)}
    return json.dumps(record, indent=draw.choice((None, 2))) + "\n"
