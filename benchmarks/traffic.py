"""Requests to send: when each arrives, how long its prompt and answer are, and of which class it is.

They are drawn from published statistics, or from recorded traces where these are at hand. Everything random
comes from the generator or seed that is handed in, so a seed names a workload.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks.traces import Arrival, read_lengths, read_trace
from engine.errors import ConfigError

LONGEST_TOKENS = 2048
SHORTEST_PROMPT_TOKENS = 8
SHORTEST_OUTPUT_TOKENS = 4
BURSTY_CV = 3.0


@dataclass(frozen=True, slots=True)
class Lengths:
    """Mean and standard deviation of a length in tokens."""

    mean: float
    std: float

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """`count` lengths of the log-normal with these moments, clipped to 1..LONGEST_TOKENS."""
        variance = np.log1p((self.std / self.mean) ** 2)
        raw = rng.lognormal(np.log(self.mean) - variance / 2, np.sqrt(variance), count)
        return np.clip(np.rint(raw), 1, LONGEST_TOKENS).astype(np.int64)


@dataclass(frozen=True, slots=True)
class Application:
    """Lengths of an application, how bursty it arrives, and the traces to prefer where they are at hand."""

    prompt: Lengths
    output: Lengths
    interarrival_cv: float
    arrivals_file: str | None
    lengths_file: str | None


# Means and deviations: SLOs-Serve (arXiv 2504.08784), table 1.
APPLICATIONS: Mapping[str, Application] = {
    "chatbot": Application(
        Lengths(763, 424), Lengths(266, 160), 1.0, "azure2023_conv", "lens_sharegpt_distserve_opt_tok"
    ),
    "coder": Application(
        Lengths(847, 617),
        Lengths(26, 47),
        BURSTY_CV,
        "azure2023_code_first30min",
        "azure2023_code_first30min",
    ),
    "summarizer": Application(
        Lengths(1333, 444), Lengths(202, 234), 1.0, None, "lens_arxiv_summarization_llama2tok"
    ),
}


def arrival_times(
    rate_per_s: float, duration_s: float, rng: np.random.Generator, interarrival_cv: float = 1.0
) -> np.ndarray:
    """Times in [0, duration_s) with gamma-distributed gaps: a CV of 1 is Poisson, 3 is bursty."""
    if rate_per_s <= 0 or duration_s <= 0 or interarrival_cv <= 0:
        raise ConfigError("rate, duration and CV of the arrivals must be above 0")
    shape = interarrival_cv**-2
    times = np.zeros(0)
    while not times.size or times[-1] < duration_s:
        gaps = rng.gamma(shape, 1 / (rate_per_s * shape), int(rate_per_s * duration_s) + 16)
        times = np.concatenate([times, (times[-1] if times.size else 0.0) + np.cumsum(gaps)])
    return times[times < duration_s]


def draw_class(slo_class: str, rate_per_s: float, duration_s: float, rng: np.random.Generator) -> list[Arrival]:
    """Requests of one class from its published statistics."""
    app = _application(slo_class)
    times = arrival_times(rate_per_s, duration_s, rng, app.interarrival_cv)
    prompts, outputs = app.prompt.draw(rng, len(times)), app.output.draw(rng, len(times))
    return [
        Arrival(float(at_s), int(prompt), int(output), slo_class)
        for at_s, prompt, output in zip(times, prompts, outputs, strict=True)
    ]


def trace_class(
    slo_class: str, rate_per_s: float, duration_s: float, rng: np.random.Generator, traces: Path
) -> list[Arrival]:
    """Requests of one class with lengths (and arrivals, where it has them) of its trace in `traces`."""
    app = _application(slo_class)
    pairs = read_lengths(_trace_file(traces, app.lengths_file))
    if app.arrivals_file is None:
        times = arrival_times(rate_per_s, duration_s, rng, app.interarrival_cv)
    else:
        recorded = read_trace(_trace_file(traces, app.arrivals_file))
        times = np.array([a.at_s for a in at_rate(recorded, rate_per_s, duration_s, rng)])
    chosen = rng.integers(len(pairs), size=len(times))
    lengths = np.minimum(pairs[chosen], LONGEST_TOKENS)
    return [
        Arrival(float(at_s), int(prompt), int(output), slo_class)
        for at_s, (prompt, output) in zip(times, lengths, strict=True)
    ]


def mixed(
    classes: Sequence[str], rate_per_s: float, duration_s: float, seed: int, traces: Path | None = None
) -> list[Arrival]:
    """Equal shares of `classes` at `rate_per_s` in all, in order of time."""
    arrivals: list[Arrival] = []
    for name, rng in zip(classes, np.random.default_rng(seed).spawn(len(classes)), strict=True):
        share = rate_per_s / len(classes)
        if traces is not None:
            arrivals += trace_class(name, share, duration_s, rng, traces)
        else:
            arrivals += draw_class(name, share, duration_s, rng)
    return sorted(arrivals, key=lambda arrival: arrival.at_s)


def label(arrivals: Sequence[Arrival], classes: Sequence[str], seed: int) -> list[Arrival]:
    """The same requests, each given one of `classes` by chance."""
    chosen = np.random.default_rng(seed).integers(len(classes), size=len(arrivals))
    return [replace(a, slo_class=classes[index]) for a, index in zip(arrivals, chosen, strict=True)]


def at_rate(
    arrivals: Sequence[Arrival], rate_per_s: float, duration_s: float, rng: np.random.Generator
) -> list[Arrival]:
    """A window of the trace, its times stretched so that the whole trace has `rate_per_s` on average.

    The window starts at a random place and is `duration_s` long after the stretching; a trace that is shorter
    is used whole. Burstiness stays.
    """
    span_s = arrivals[-1].at_s - arrivals[0].at_s
    if span_s <= 0:
        raise ConfigError("the trace has no time in it: give one with at least two arrival times")
    stretch = (len(arrivals) - 1) / span_s / rate_per_s
    start_s = rng.uniform(0, max(0.0, span_s * stretch - duration_s))
    moved = ((a, (a.at_s - arrivals[0].at_s) * stretch - start_s) for a in arrivals)
    return [replace(a, at_s=at_s) for a, at_s in moved if 0 <= at_s < duration_s]


def scaled(arrivals: Sequence[Arrival], factor: float = 6.0) -> list[Arrival]:
    """Lengths divided by `factor`, at least 8 tokens in and 4 out: the workload of the scale model."""
    return [
        replace(
            a,
            in_tokens=max(SHORTEST_PROMPT_TOKENS, round(a.in_tokens / factor)),
            out_tokens=max(SHORTEST_OUTPUT_TOKENS, round(a.out_tokens / factor)),
        )
        for a in arrivals
    ]


def _application(slo_class: str) -> Application:
    try:
        return APPLICATIONS[slo_class]
    except KeyError:
        known = ", ".join(APPLICATIONS)
        raise ConfigError(f"no statistics for class {slo_class!r}: choose from {known}") from None


def _trace_file(traces: Path, name: str | None) -> Path:
    return traces / f"{name}.csv.gz"
