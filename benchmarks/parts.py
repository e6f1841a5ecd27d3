"""Parts of a workload: what they are promised, how they are joined in order of time, and divided."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from benchmarks.traffic import SHORTEST_OUTPUT_TOKENS, SHORTEST_PROMPT_TOKENS
from benchmarks.workload import Floats, Ints, Workload
from coordinator.config import PAPER_SLO_CLASSES, SloClass
from engine.errors import ConfigError

# SLOs-Serve, table 1: the last call of a tool loop is loose.
SLO_CLASSES: Mapping[str, Mapping[str, float]] = {
    **PAPER_SLO_CLASSES,
    "tool_last": {**PAPER_SLO_CLASSES["tool"], "tpot_ms": 100.0},
}
# Where an endpoint has no class of that name: the client says there which call is the last.
ASKED: Mapping[str, Mapping[str, str]] = {"tool_last": {"class": "tool", "call": "last"}}
OWN_CLASS = "own"
TPOTS = ("tpot_ms", "thinking_tpot_ms")


def promise(slo_class: str, tpot_scale: float = 1.0) -> SloClass:
    """The promise of one of SLO_CLASSES, every TPOT times `tpot_scale`."""
    if slo_class not in SLO_CLASSES:
        raise ConfigError(f"no SLO class {slo_class!r}: choose from {', '.join(SLO_CLASSES)}")
    fields = SLO_CLASSES[slo_class]
    return SloClass(**{key: value * tpot_scale if key in TPOTS else value for key, value in fields.items()})


def asked(slo_class: str) -> dict[str, str]:
    """The SLO field of a request of this class, as an endpoint takes it."""
    return dict(ASKED.get(slo_class, {"class": slo_class}))


def own_promise(
    slo_class: str | None, ttft_s: float | None, tpot_ms: float | None, tpot_scale: float
) -> tuple[str, SloClass]:
    """Name and promise of `slo_class`, or of OWN_CLASS where a time is given; a TPOT given is not scaled."""
    if slo_class is None and (ttft_s is None or tpot_ms is None):
        raise ConfigError(
            f"what is promised? give a class ({', '.join(SLO_CLASSES)}), or both ttft_s and tpot_ms"
        )
    for name, value in (("ttft_s", ttft_s), ("tpot_ms", tpot_ms)):
        if value is not None and not 0 < value < np.inf:
            raise ConfigError(f"{name} must be above 0, not {value}")
    base = SloClass() if slo_class is None else promise(slo_class, tpot_scale)
    given: dict[str, float | None] = {}
    if ttft_s is not None:
        given["ttft_ms"] = ttft_s * 1e3
    if tpot_ms is not None:
        given |= {"tpot_ms": tpot_ms, "thinking_tpot_ms": None}
    return OWN_CLASS if slo_class is None or given else slo_class, base.model_copy(update=given)


def columns(
    name: str,
    duration_s: float,
    slo_classes: Mapping[str, SloClass],
    arrival_s: Floats,
    prompt_tokens: Ints,
    output_tokens: Ints,
    most_output: int,
    *,
    class_index: npt.NDArray[np.integer] | npt.NDArray[np.bool_] | None = None,
    thinking_tokens: Ints | None = None,
    parent: Ints | None = None,
    delay_s: Floats | None = None,
    prefix_tokens: Ints | None = None,
) -> Workload:
    """A workload whose further columns are of the first class, no thinking, no chain, where not given.

    `most_output` is what clients ask for; never less than what they get.
    """
    none = np.zeros(len(arrival_s), np.int64)
    return Workload(
        name=name,
        duration_s=duration_s,
        arrival_s=arrival_s,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        thinking_tokens=none if thinking_tokens is None else thinking_tokens,
        max_tokens=np.maximum(output_tokens, most_output),
        class_index=none if class_index is None else class_index.astype(np.int64),
        class_names=tuple(slo_classes),
        slo_classes=slo_classes,
        parent=none - 1 if parent is None else parent,
        delay_s=np.zeros(len(arrival_s)) if delay_s is None else delay_s,
        prefix_tokens=none if prefix_tokens is None else prefix_tokens,
    )


def joined(name: str, parts: Sequence[Workload]) -> Workload:
    """All requests of parts that share no class, in order of arrival; calls of a chain stay together."""
    sizes = np.array([len(part) for part in parts])
    rows_before = np.cumsum(sizes) - sizes
    classes_before = np.cumsum([0, *(len(part.class_names) for part in parts)])
    order = np.argsort(np.concatenate([part.arrival_s for part in parts]), kind="stable")
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    parent = np.concatenate(
        [np.where(part.parent < 0, -1, part.parent + n) for part, n in zip(parts, rows_before, strict=True)]
    )
    class_index = np.concatenate([part.class_index + n for part, n in zip(parts, classes_before, strict=False)])
    plain = ("arrival_s", "prompt_tokens", "output_tokens", "thinking_tokens", "max_tokens", "delay_s")
    sorted_columns = {
        column: np.concatenate([getattr(part, column) for part in parts])[order]
        for column in (*plain, "prefix_tokens")
    }
    return replace(
        parts[0],
        name=name,
        **sorted_columns,
        class_index=class_index[order],
        class_names=tuple(each for part in parts for each in part.class_names),
        slo_classes={key: value for part in parts for key, value in part.slo_classes.items()},
        parent=np.where(parent[order] < 0, -1, place[parent[order]]),
    )


def in_turn(name: str, windows: Sequence[Workload]) -> Workload:
    """Windows one after the other: each begins when the one before it stops taking requests."""
    starts_s = np.cumsum([0.0, *(window.duration_s for window in windows)])
    rows_before = np.cumsum([0, *(len(window) for window in windows)])
    promised = {key: value for window in windows for key, value in window.slo_classes.items()}
    names = tuple(promised)
    plain = ("prompt_tokens", "output_tokens", "thinking_tokens", "max_tokens", "delay_s", "prefix_tokens")
    rows = {column: [getattr(window, column) for window in windows] for column in plain}
    rows["arrival_s"] = [window.arrival_s + at for window, at in zip(windows, starts_s, strict=False)]
    rows["parent"] = [
        np.where(window.parent < 0, -1, window.parent + before)
        for window, before in zip(windows, rows_before, strict=False)
    ]
    rows["class_index"] = [
        np.array([names.index(each) for each in window.class_names])[window.class_index] for window in windows
    ]
    return replace(
        windows[0],
        name=name,
        duration_s=float(starts_s[-1]),
        class_names=names,
        slo_classes=promised,
        **{column: np.concatenate(parts) for column, parts in rows.items()},
    )


def divided(workload: Workload, divide: float) -> Workload:
    """Lengths divided for a small model, at least 8 tokens in and 4 out; an answer stays an answer."""
    if divide == 1:
        return workload
    prompt = np.maximum(_share(workload.prompt_tokens, divide), SHORTEST_PROMPT_TOKENS)
    output = np.maximum(_share(workload.output_tokens, divide), SHORTEST_OUTPUT_TOKENS)
    answers = workload.thinking_tokens < workload.output_tokens
    return replace(
        workload,
        prompt_tokens=prompt,
        output_tokens=output,
        thinking_tokens=np.minimum(_share(workload.thinking_tokens, divide), output - answers),
        max_tokens=np.maximum(_share(workload.max_tokens, divide), output),
        prefix_tokens=np.minimum(_share(workload.prefix_tokens, divide), prompt - 1),
    )


def _share(tokens: Ints, divide: float) -> Ints:
    return np.rint(tokens / divide).astype(np.int64)
