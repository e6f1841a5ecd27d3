"""The workloads that results are measured on, by name: six scenarios and five recorded traces.

For one seed a higher rate is the same requests with the same gaps, compressed in time, and more of them at
the end: what attainment does from rate to rate is then the system's doing, not the draw's. Every kind of
random number has a stream of its own for that. (Agent sessions: the same sessions, and further ones.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks import lengths
from benchmarks.parts import columns, divided, joined, own_promise, promise
from benchmarks.recorded import load_lengths, load_recording, load_sessions, positions, trace_file
from benchmarks.traffic import APPLICATIONS, BURSTY_CV, LONGEST_TOKENS, Lengths
from benchmarks.workload import Floats, Ints, Workload
from coordinator.config import SloClass
from engine.errors import ConfigError

INTERARRIVAL_CV: Mapping[str, float] = {"poisson": 1.0, "bursty": BURSTY_CV}
ARRIVALS = (*INTERARRIVAL_CV, "azure-conv", "azure-code")
TOOL_MEDIAN_S, TOOL_SIGMA = 1.0, 0.5


@dataclass(frozen=True, slots=True)
class Stream:
    """Requests of one kind. Lengths are log-normal; prompts are clipped to LONGEST_TOKENS.

    `thinking` comes before `output`; both together are clipped to `longest_output`, and clients ask for as
    much. A chain has `calls` (least, most), the last one with the promise `last_class`. `lengths_file`: the
    recorded lengths to use where recorded ones are asked for.
    """

    slo_class: str
    arrivals: str
    prompt: Lengths
    output: Lengths
    thinking: Lengths | None = None
    longest_output: int = LONGEST_TOKENS
    calls: tuple[int, int] = (1, 1)
    last_class: str | None = None
    lengths_file: str | None = None


@dataclass(frozen=True, slots=True)
class Trace:
    """A recorded trace and what its requests are promised; the last call of an agent's turn `last_class`."""

    recorded: lengths.Trace
    slo_class: str
    last_class: str | None = None
    thinking_column: str | None = None


def _application(name: str, arrivals: str) -> Stream:
    found = APPLICATIONS[name]
    return Stream(name, arrivals, found.prompt, found.output, lengths_file=found.lengths_file)


CHATBOT = _application("chatbot", "poisson")
CODER = _application("coder", "bursty")
SUMMARIZER = _application("summarizer", "poisson")
# SLOs-Serve, table 1 (ToolBench).
TOOL = Stream("tool", "bursty", Lengths(690, 356), Lengths(116, 66), calls=(2, 6), last_class="tool_last")
# Means: SLOs-Serve, table 1 (s1K), which gives no deviations for thinking and answer. Their CVs are those of
# the DeepSeek-R1 trace of ServeGen: answers 0.93; thinking 1.09, from the deviation of its logarithm, 0.886
# (from moments it is 2.14, made by a few outputs beyond the clip, which would take a fifth off the mean).
REASONING = Stream(
    "reasoning", "poisson", Lengths(127, 83), Lengths(803, 747), Lengths(4693, 5125), longest_output=16384
)

# Streams of a scenario have equal shares of its rate.
SCENARIOS: Mapping[str, tuple[Stream, ...]] = {
    "chatbot": (CHATBOT,),
    "coder": (CODER,),
    "summarizer": (SUMMARIZER,),
    "mixed": (CHATBOT, CODER, SUMMARIZER),
    "tool": (TOOL,),
    "reasoning": (REASONING,),
}
TRACES: Mapping[str, Trace] = {
    "azure-conv": Trace(lengths.TRACES["azure conv"], "chatbot"),
    "azure-code": Trace(lengths.TRACES["azure code"], "coder"),
    "servegen-reasoning": Trace(
        lengths.TRACES["servegen reasoning"], "reasoning", thinking_column="reason_ratio"
    ),
    "agent-sessions": Trace(lengths.TRACES["agent sessions / 32"], "tool", "tool_last"),
    "mooncake": Trace(lengths.TRACES["mooncake"], "summarizer"),
}


@dataclass(frozen=True, slots=True)
class _Asked:
    """What is asked of every stream of a workload."""

    rate_per_s: float
    duration_s: float
    tpot_scale: float
    data: Path | None
    arrivals: str | None
    recorded_lengths: bool


def make(
    name: str,
    rate_per_s: float,
    duration_s: float,
    seed: int,
    *,
    data: Path | None = None,
    arrivals: str | None = None,
    tpot_scale: float = 1.0,
    divide: float = 1.0,
    recorded_lengths: bool = False,
) -> Workload:
    """The scenario or trace `name` for `duration_s` at `rate_per_s` on average, calls of chains included.

    `arrivals`, one of ARRIVALS, replaces a stream's own. `data` is the folder of recorded data (else
    SLOSSERVE_DATA), needed for traces, recorded arrivals, and `recorded_lengths`: lengths drawn from files in
    place of the fits. `tpot_scale` 2 is for models of 13B and larger. Lengths are divided by `divide`, at
    least 8 tokens in and 4 out. Calls of a chain carry the arrival of its first one, a lower bound.
    Raises ConfigError for what is unknown, impossible or not at hand.
    """
    _check(seed, rate_per_s=rate_per_s, duration_s=duration_s, tpot_scale=tpot_scale, divide=divide)
    _choose("workload", name, (*SCENARIOS, *TRACES))
    _choose("arrivals", arrivals, (None, *ARRIVALS))
    asked = _Asked(rate_per_s, duration_s, tpot_scale, data, arrivals, recorded_lengths)
    rng = np.random.default_rng(seed)
    if name in TRACES:
        replay = _sessions if TRACES[name].last_class else _replayed
        return divided(replay(name, asked, rng), divide)
    streams = SCENARIOS[name]
    share = replace(asked, rate_per_s=rate_per_s / len(streams))
    parts = [_drawn(each, share, own) for each, own in zip(streams, rng.spawn(len(streams)), strict=True)]
    return divided(joined(name, parts), divide)


def from_file(
    path: Path,
    slo_class: str | None = None,
    rate_per_s: float | None = None,
    duration_s: float | None = None,
    seed: int = 0,
    *,
    ttft_s: float | None = None,
    tpot_ms: float | None = None,
    max_tokens: int | None = None,
    tpot_scale: float = 1.0,
    divide: float = 1.0,
) -> Workload:
    """A trace of one's own: t_s,in_tokens,out_tokens CSV, Azure CSV or Mooncake jsonl, each gzipped or not.

    Without `rate_per_s` it runs as recorded, without `duration_s` once from its beginning; else `seed` says
    where the window starts. The promise is that of `slo_class`, with `ttft_s` and `tpot_ms` in its place where
    given; with both no class is needed. `max_tokens`: what clients ask for, else the longest output in it.
    """
    recording = load_recording(path)
    rate = 1 / recording.mean_gap_s if rate_per_s is None else rate_per_s
    asked_s = 1.0 if duration_s is None else duration_s
    _check(seed, rate_per_s=rate, duration_s=asked_s, tpot_scale=tpot_scale, divide=divide)
    name, promised = own_promise(slo_class, ttft_s, tpot_ms, tpot_scale)
    if duration_s is None:
        duration_s = len(recording) / rate
        rows, arrival_s = np.arange(len(recording)), recording.at_gaps / rate
    else:
        start = np.random.default_rng(seed).uniform(0, len(recording))
        rows, arrival_s = recording.window(rate, duration_s, start)
    prompt, output = recording.prompt_tokens[rows], recording.output_tokens[rows]
    # Never each request's own output: that would tell a scheduler what it cannot know.
    most_output = int(recording.output_tokens.max()) if max_tokens is None else max_tokens
    whole = columns(path.name, duration_s, {name: promised}, arrival_s, prompt, output, most_output)
    return divided(whole, divide)


def _drawn(stream: Stream, asked: _Asked, rng: np.random.Generator) -> Workload:
    arriving, sizing, pausing, prompts, outputs, thoughts = rng.spawn(6)
    least, most = stream.calls
    chain_s = _arrivals(asked.arrivals or stream.arrivals, asked, 2 / (least + most), arriving)
    chain, nth = positions(sizing.integers(least, most + 1, len(chain_s)))
    count, is_first = len(chain), nth == 0
    if asked.recorded_lengths:
        prompt, answer = _recorded_lengths(stream, asked, count, outputs)
    else:
        prompt, answer = _log_normal(stream.prompt, count, prompts), _log_normal(stream.output, count, outputs)
    thinking = np.zeros(count, np.int64)
    if stream.thinking is not None:
        thinking = _log_normal(stream.thinking, count, thoughts)
    output = np.minimum(thinking + answer, stream.longest_output)
    return columns(
        stream.slo_class,
        asked.duration_s,
        _promises(asked, stream.slo_class, stream.last_class),
        chain_s[chain],
        np.minimum(prompt, LONGEST_TOKENS),
        output,
        stream.longest_output,
        class_index=np.roll(is_first, -1) if stream.last_class else None,
        thinking_tokens=np.minimum(thinking, output - 1),
        parent=np.where(is_first, -1, np.arange(count) - 1),
        delay_s=np.where(is_first, 0.0, pausing.lognormal(np.log(TOOL_MEDIAN_S), TOOL_SIGMA, count)),
    )


def _log_normal(moments: Lengths, count: int, rng: np.random.Generator) -> Ints:
    variance = np.log1p((moments.std / moments.mean) ** 2)
    raw = rng.lognormal(np.log(moments.mean) - variance / 2, np.sqrt(variance), count)
    tokens: Ints = np.maximum(np.rint(raw), 1).astype(np.int64)
    return tokens


def _recorded_lengths(stream: Stream, asked: _Asked, count: int, rng: np.random.Generator) -> tuple[Ints, Ints]:
    if stream.lengths_file is None:
        raise ConfigError(f"no recorded lengths for {stream.slo_class}: leave recorded_lengths out")
    pairs = load_lengths(trace_file(stream.lengths_file, asked.data))
    chosen = np.maximum(pairs[rng.integers(0, len(pairs), count)], 1)
    return chosen[:, 0], chosen[:, 1]


def _arrivals(process: str, asked: _Asked, per_request: float, rng: np.random.Generator) -> Floats:
    """Times in [0, duration_s), `per_request` of them for each request that is asked for."""
    rate_per_s = asked.rate_per_s * per_request
    if process not in INTERARRIVAL_CV:
        recording = load_recording(trace_file(TRACES[process].recorded.file, asked.data))
        return recording.window(rate_per_s, asked.duration_s, rng.uniform(0, len(recording)))[1]
    shape = INTERARRIVAL_CV[process] ** -2
    end_gaps, gaps = rate_per_s * asked.duration_s, np.zeros(0)
    while gaps.sum() <= end_gaps:
        gaps = np.append(gaps, rng.gamma(shape, 1 / shape, int(end_gaps) + 16))
    at_gaps = np.cumsum(gaps)
    return at_gaps[at_gaps < end_gaps] / rate_per_s


def _replayed(name: str, asked: _Asked, rng: np.random.Generator) -> Workload:
    """A trace as recorded. Of Mooncake's prompts only the number of hashes is known: prefixes are 0."""
    trace = TRACES[name]
    recording = load_recording(trace_file(trace.recorded.file, asked.data), trace.thinking_column)
    starting, arriving = rng.spawn(2)
    start = starting.uniform(0, len(recording))
    rows, arrival_s = recording.window(asked.rate_per_s, asked.duration_s, start)
    if asked.arrivals is not None:
        arrival_s = _arrivals(asked.arrivals, asked, 1, arriving)
        rows = recording.rows_from(start, len(arrival_s))
    return columns(
        name,
        asked.duration_s,
        _promises(asked, trace.slo_class),
        arrival_s,
        recording.prompt_tokens[rows],
        recording.output_tokens[rows],
        trace.recorded.max_tokens,
        thinking_tokens=recording.thinking_tokens[rows],
    )


def _sessions(name: str, asked: _Asked, rng: np.random.Generator) -> Workload:
    """Chains of agents: a turn's last call is loose. The file does not say when sessions started."""
    trace = TRACES[name]
    _choose("arrivals of agent sessions", asked.arrivals, (None, "poisson"))
    path = trace_file(trace.recorded.file, asked.data)
    sessions = load_sessions(path, trace.recorded.prompt_divisor)
    calls = round(asked.rate_per_s * asked.duration_s)
    rows, parent, arrival_s = sessions.on_a_circle(calls, asked.duration_s, rng)
    return columns(
        name,
        asked.duration_s,
        _promises(asked, trace.slo_class, trace.last_class),
        arrival_s,
        sessions.prompt_tokens[rows],
        sessions.output_tokens[rows],
        trace.recorded.max_tokens,
        class_index=sessions.ends_turn[rows],
        parent=parent,
        delay_s=np.where(parent < 0, 0.0, sessions.think_s[rows]),
        prefix_tokens=np.where(parent < 0, 0, sessions.prefix_tokens[rows]),
    )


def _promises(asked: _Asked, *names: str | None) -> dict[str, SloClass]:
    return {name: promise(name, asked.tpot_scale) for name in names if name is not None}


def _check(seed: int, **above_0: float) -> None:
    if seed < 0:
        raise ConfigError(f"seed must be 0 or more, not {seed}")
    for name, value in above_0.items():
        if not 0 < value < np.inf:
            raise ConfigError(f"{name} must be above 0, not {value}")


def _choose(what: str, name: str | None, choices: Sequence[str | None]) -> None:
    if name not in choices:
        known = ", ".join(choice for choice in choices if choice is not None)
        raise ConfigError(f"no {what} {name!r}: choose from {known}")
