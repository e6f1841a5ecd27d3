"""Files of figures that several runs fill: what is there already, if it can stand beside what is new."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from engine.errors import ConfigError


def earlier(
    path: Path, part: str, asked: dict[str, Any], tables: tuple[str, ...], otherwise: str
) -> dict[str, Any] | None:
    """The figures in `path`, None if there is no such file.

    `part` of them says how they were measured, and must say what is `asked`; `tables` are lists of rows;
    `otherwise`: what to call a file that is another. Raises
    ConfigError for a file that is another, and for figures that were measured in another way.
    """
    if not path.exists():
        return None
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        theirs = {key: found[part].get(key) for key in asked}
        for name in tables:
            list(found[name])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"--out {path}: {otherwise} ({error!r}); give another name") from error
    now = json.loads(json.dumps(asked))
    for key, value in theirs.items():
        if value != now[key]:
            raise ConfigError(
                f"--out {path}: its figures have {key} = {value}, and now it is {now[key]}; "
                "give another name, or move the file away"
            )
    return found
