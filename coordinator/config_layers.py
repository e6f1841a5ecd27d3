"""Where configuration comes from: YAML files, the environment, flags; and how the three are merged."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import configs
from engine.errors import ConfigError

ENV_PREFIX = "SLOSSERVE_"


@dataclass(frozen=True, slots=True)
class Layer:
    """Values from one place, nested, and how to name the place of a key to a person."""

    place: str
    values: Mapping[str, Any]

    def named(self, path: Sequence[str]) -> str:
        """The place of one key: the variable itself where it came from the environment."""
        if self.place == "environment":
            return f"environment {ENV_PREFIX}{'__'.join(path).upper()}"
        return self.place


def shipped_configs() -> dict[str, Path]:
    """Configurations that come with the package, by name."""
    folder = Path(configs.__path__[0])
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_profile(path_or_name: str | None, model: str) -> Path | None:
    """The file of a step profile; without a name, the one that ships for `model`, if one does.

    Raises ValueError if the name is of neither.
    """
    folders = [Path(configs.__path__[0]) / name for name in ("profiles", "hardware")]
    if path_or_name is None:
        shipped = folders[0] / f"{model}.json"
        return shipped if "/" not in model and shipped.exists() else None
    for path in (Path(path_or_name), *(folder / f"{path_or_name}.json" for folder in folders)):
        if path.is_file():
            return path.resolve()
    names = ", ".join(sorted(path.stem for folder in folders for path in folder.glob("*.json")))
    raise ValueError(
        f"there is no such file, and no profile of that name ships ({names} do); "
        "`slosserve profile run` and `slosserve profile fit` make one"
    )


def find_config(path_or_name: str | Path) -> Path:
    """A file as it is, or a shipped configuration by its name. Raises ConfigError if there is neither."""
    path = Path(path_or_name)
    if path.is_file():
        return path
    shipped = shipped_configs()
    if str(path_or_name) in shipped:
        return shipped[str(path_or_name)]
    raise ConfigError(
        f"no configuration {str(path_or_name)!r}: neither a file nor one that ships."
        f"{did_you_mean(str(path_or_name), shipped)}"
        f" Give a path to a YAML file, or one of: {', '.join(shipped)}."
    )


def parse_assignment(text: str) -> tuple[str, Any]:
    """`key=value` with the value read as YAML. Raises ConfigError if it is not of that form."""
    key, separator, value = text.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"--set {text}: expected key=value, for example --set engine.max_num_seqs=32.")
    return key.strip(), _yaml(value, f"--set {key}")


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Values by dotted key, as nested mappings."""
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, last = key.split(".")
        branch = {last: value}
        for section in reversed(sections):
            branch = {section: branch}
        nested = merged(nested, branch)
    return nested


def merged(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """`top` over `base`, section by section."""
    result = dict(base)
    for key, value in top.items():
        old = result.get(key)
        result[key] = merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result


def file_layer(path: Path) -> Layer:
    """The values of a YAML file. Raises ConfigError if it cannot be read as such."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    values = _yaml(text, str(path))
    if values is None:
        values = {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"{path}: expected `key: value` lines, as in {shipped_configs()['laptop'].name}.")
    return Layer(str(path), values)


def _yaml(text: str, place: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{place}: not valid YAML: {' '.join(str(error).split())}") from None


def environment_layer(environment: Mapping[str, str], known: Collection[str]) -> Layer:
    """Values of `SLOSSERVE_SECTION__KEY` variables, read as YAML, for the `known` sections.

    Other variables of that prefix (SLOSSERVE_CACHE, SLOSSERVE_RUN_DIR) are left alone, unless they look like
    a section misspelt: ConfigError.
    """
    flat: dict[str, Any] = {}
    for variable, text in environment.items():
        if not variable.startswith(ENV_PREFIX):
            continue
        path = _path_of(variable.removeprefix(ENV_PREFIX).split("__"))
        if path[0] in known:
            flat[".".join(path)] = _yaml(text, variable)
        elif len(path) > 1 or difflib.get_close_matches(path[0], known, cutoff=0.8):
            raise ConfigError(
                f"environment {variable}: unknown key {path[0]}.{did_you_mean(path[0], known)}"
                " Unset or correct it."
            )
    return Layer("environment", nest(flat))


def _path_of(parts: Sequence[str]) -> list[str]:
    lower = [part.lower() for part in parts]
    # What stands below engine.env are variables themselves, in capitals.
    return lower[:2] + list(parts[2:]) if lower[:2] == ["engine", "env"] else lower


def did_you_mean(word: str, known: Collection[str]) -> str:
    """A hint with a space before it, or nothing."""
    close = difflib.get_close_matches(word, known, n=1)
    return f' Did you mean "{close[0]}"?' if close else ""
