"""A seed names a workload, a higher rate is the same one compressed in time, and chains are well formed."""

from __future__ import annotations

import gzip
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks import scenarios
from benchmarks.scenarios import SCENARIOS, TRACES, from_file, make
from benchmarks.traces import data_directory
from benchmarks.workload import Workload
from engine.errors import ConfigError

DATA = data_directory()
REAL = pytest.mark.skipif(
    DATA is None or not (DATA / "traces").is_dir(), reason="needs recorded traces (SLOSSERVE_DATA)"
)
COLUMNS = (
    "arrival_s", "prompt_tokens", "output_tokens", "thinking_tokens", "max_tokens", "class_index", "parent",
    "delay_s", "prefix_tokens",
)  # fmt: skip
SYNTHETIC = list(SCENARIOS)
SESSION_CALLS = (1, 3, 8)


def _write(folder: Path, name: str, text: str) -> None:
    (folder / "traces").mkdir(exist_ok=True)
    (folder / "traces" / f"{name}.csv.gz").write_bytes(gzip.compress(text.encode()))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder of data in which row n of each trace has 100 + n tokens in, so that rows can be told apart."""
    at_s = np.cumsum(np.random.default_rng(0).exponential(2.0, 50))
    rows = [f"{second:.4f},{100 + n},{10 + n},0.5" for n, second in enumerate(at_s)]
    for stream in SCENARIOS["mixed"]:
        _write(tmp_path, str(stream.lengths_file), "in_tokens,out_tokens\n5000,7\n5001,0\n")
    for trace in TRACES.values():  # of which one also gives lengths to coder
        _write(tmp_path, trace.recorded.file, "t_s,in_tokens,out_tokens,reason_ratio\n" + "\n".join(rows))
    head = "trace,depth,t_s,in_tokens,out_tokens,stop,api_time_s,think_time_s\n"
    _write(tmp_path, TRACES["agent-sessions"].recorded.file, head + "".join(_session(n) for n in SESSION_CALLS))
    return tmp_path


def _session(calls: int) -> str:
    """Prompts grow by the output and 320 tokens; pauses of 40 s, answers of 2 s."""
    rows = [
        f"{calls:04},0,{42 * n}.0,{3200 + 420 * n},100,{'end_turn' if n == calls - 1 else 'tool_use'},2.0,"
        f"{40.0 if n else 0.0}\n"
        for n in range(calls)
    ]
    return "".join(rows)


def _same(first: Workload, second: Workload) -> bool:
    return len(first) == len(second) and all(
        np.array_equal(getattr(first, column), getattr(second, column)) for column in COLUMNS
    )


def _check_well_formed(workload: Workload) -> None:
    assert len(workload)
    assert (np.diff(workload.arrival_s) >= 0).all()
    assert workload.arrival_s[0] >= 0
    assert workload.arrival_s[-1] < workload.duration_s
    assert workload.prompt_tokens.min() >= 1
    assert workload.output_tokens.min() >= 1
    assert (workload.max_tokens >= workload.output_tokens).all()
    assert (workload.thinking_tokens >= 0).all()
    assert (workload.thinking_tokens <= workload.output_tokens).all()
    assert (workload.prefix_tokens < workload.prompt_tokens).all()
    assert set(workload.slo_classes) == set(workload.class_names)
    assert workload.class_index.max() < len(workload.class_names)
    child = np.flatnonzero(workload.parent >= 0)
    assert (workload.parent[child] == child - 1).all()
    assert (workload.arrival_s[child] == workload.arrival_s[child - 1]).all()
    assert (workload.delay_s[workload.parent < 0] == 0).all()
    assert (workload.prefix_tokens[workload.parent < 0] == 0).all()


@pytest.mark.parametrize("name", [*SCENARIOS, *TRACES])
def test_a_seed_names_a_workload(name: str, data: Path) -> None:
    first = make(name, 2.0, 300.0, 1, data=data)
    _check_well_formed(first)
    assert _same(first, make(name, 2.0, 300.0, 1, data=data))
    assert not _same(first, make(name, 2.0, 300.0, 2, data=data))


@pytest.mark.parametrize("name", [*SCENARIOS, *TRACES])
def test_a_rate_too_low_for_a_single_request_makes_none(name: str, data: Path) -> None:
    assert len(make(name, 1e-9, 1.0, 1, data=data, divide=6.0)) == 0


@pytest.mark.parametrize("arrivals", [None, "poisson", "bursty", "azure-conv", "azure-code"])
@pytest.mark.parametrize("name", [*SCENARIOS, *(name for name in TRACES if name != "agent-sessions")])
def test_a_higher_rate_is_the_same_requests_compressed_in_time(
    name: str, arrivals: str | None, data: Path
) -> None:
    slow = make(name, 1.0, 300.0, 5, data=data, arrivals=arrivals)
    fast = make(name, 1.7, 300.0, 5, data=data, arrivals=arrivals)
    assert len(slow) < len(fast)
    for column in COLUMNS[1:]:
        assert np.array_equal(getattr(slow, column), getattr(fast, column)[: len(slow)]), column
    assert fast.arrival_s[: len(slow)] * 1.7 == pytest.approx(slow.arrival_s)


def test_more_agent_calls_are_the_same_sessions_and_further_ones(data: Path) -> None:
    few = make("agent-sessions", 0.1, 600.0, 5, data=data)
    many = make("agent-sessions", 0.3, 600.0, 5, data=data)
    assert (len(few), len(many)) == (60, 180)
    starts, more_starts = few.arrival_s[few.parent < 0], many.arrival_s[many.parent < 0]
    assert np.isin(starts, more_starts).all()


@pytest.mark.parametrize(
    ("name", "prompt", "output"),
    [
        ("chatbot", (763, 424), (266, 160)),
        ("coder", (847, 617), (26, 47)),
        ("summarizer", (1333, 444), (202, 234)),
        ("tool", (690, 356), (116, 66)),
    ],
)
def test_lengths_have_the_moments_of_table_1(
    name: str, prompt: tuple[float, float], output: tuple[float, float]
) -> None:
    made = make(name, 20.0, 3000.0, 3)
    for tokens, (mean, std) in ((made.prompt_tokens, prompt), (made.output_tokens, output)):
        assert tokens.max() <= 2048
        # Clipping takes a little off the mean and more off the deviation.
        assert tokens.mean() == pytest.approx(mean, rel=0.05)
        assert tokens.std() == pytest.approx(std, rel=0.25)
    assert set(made.max_tokens) == {2048}


def test_reasoning_thinks_and_then_answers() -> None:
    made = make("reasoning", 20.0, 3000.0, 3)
    assert made.prompt_tokens.mean() == pytest.approx(127, rel=0.03)
    assert made.prompt_tokens.std() == pytest.approx(83, rel=0.1)
    answer = made.output_tokens - made.thinking_tokens
    assert answer.min() >= 1
    assert made.output_tokens.max() == 16384
    assert made.thinking_tokens.mean() == pytest.approx(4693, rel=0.07)
    assert answer.mean() == pytest.approx(803, rel=0.07)
    assert set(made.max_tokens) == {16384}
    promised = made.slo_classes["reasoning"]
    assert (promised.thinking_tpot_ms, promised.tpot_ms, promised.ttft_scale) == (50, 100, 3)


@pytest.mark.parametrize(
    ("name", "cv"), [("chatbot", 1), ("summarizer", 1), ("reasoning", 1), ("coder", 3), ("tool", 3)]
)
def test_arrivals_have_rate_and_burstiness(name: str, cv: float) -> None:
    made = make(name, 5.0, 10_000.0, 7)
    assert made.rate_per_s == pytest.approx(5.0, rel=0.08)
    gaps = np.diff(made.arrival_s[made.parent < 0])
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.15)


def test_mixed_has_equal_shares_each_with_its_own_burstiness() -> None:
    made = make("mixed", 6.0, 5000.0, 2)
    assert made.class_names == ("chatbot", "coder", "summarizer")
    cvs = []
    for index in range(3):
        at_s = made.arrival_s[made.class_index == index]
        assert len(at_s) / 5000 == pytest.approx(2.0, rel=0.12)
        cvs.append(np.diff(at_s).std() / np.diff(at_s).mean())
    assert cvs == pytest.approx([1, 3, 1], rel=0.15)
    coder = made.class_index == 1
    assert made.output_tokens[coder].mean() == pytest.approx(26, rel=0.1)
    assert made.prompt_tokens[~coder].mean() == pytest.approx((763 + 1333) / 2, rel=0.05)


def test_tool_chains_have_2_to_6_calls_and_the_last_is_loose() -> None:
    made = make("tool", 10.0, 5000.0, 4)
    first = np.flatnonzero(made.parent < 0)
    sizes = np.diff(np.append(first, len(made)))
    assert set(sizes) == {2, 3, 4, 5, 6}
    assert np.bincount(sizes)[2:] / len(sizes) == pytest.approx([0.2] * 5, abs=0.02)
    last = np.append(first[1:], len(made)) - 1
    assert (np.flatnonzero(made.class_index == 1) == last).all()
    assert made.class_names == ("tool", "tool_last")
    tight, loose = (made.slo_classes[name] for name in made.class_names)
    assert (tight.ttft_scale, tight.tpot_ms, loose.ttft_scale, loose.tpot_ms) == (3, 50, 3, 100)
    pauses = made.delay_s[made.parent >= 0]
    assert np.median(pauses) == pytest.approx(1.0, rel=0.05)
    assert np.log(pauses).std() == pytest.approx(0.5, rel=0.05)
    assert not made.prefix_tokens.any()


def test_tpot_scale_doubles_every_tpot_and_nothing_else() -> None:
    for name in ("mixed", "tool", "reasoning"):
        plain, doubled = make(name, 1.0, 60.0, 1), make(name, 1.0, 60.0, 1, tpot_scale=2.0)
        for slo_class, promised in plain.slo_classes.items():
            other = doubled.slo_classes[slo_class]
            assert other.tpot_ms == 2 * promised.tpot_ms
            assert other.ttft_scale == promised.ttft_scale
            if promised.thinking_tpot_ms is not None:
                assert other.thinking_tpot_ms == 2 * promised.thinking_tpot_ms
        assert _same(plain, doubled)


@pytest.mark.parametrize("name", [*SCENARIOS, *TRACES])
def test_dividing_keeps_floors_and_stays_well_formed(name: str, data: Path) -> None:
    plain, small = (make(name, 2.0, 300.0, 1, data=data, divide=divide) for divide in (1.0, 6.0))
    _check_well_formed(small)
    assert np.array_equal(small.arrival_s, plain.arrival_s)
    assert (small.prompt_tokens == np.maximum(np.rint(plain.prompt_tokens / 6), 8)).all()
    assert (small.output_tokens == np.maximum(np.rint(plain.output_tokens / 6), 4)).all()
    answers = plain.thinking_tokens < plain.output_tokens
    assert (small.thinking_tokens < small.output_tokens)[answers].all()


def test_ten_thousand_requests_take_no_time(data: Path) -> None:
    for name in [*SCENARIOS, *TRACES]:
        make(name, 10.0, 100.0, 1, data=data)
        seconds = []
        for _ in range(5):
            start_s = time.perf_counter()
            make(name, 10.0, 1000.0, 1, data=data)
            seconds.append(time.perf_counter() - start_s)
        assert min(seconds) < 0.05, name


@pytest.mark.parametrize("name", ["azure-conv", "azure-code", "mooncake", "servegen-reasoning"])
def test_a_short_trace_goes_round_in_order(name: str, data: Path) -> None:
    made = make(name, 1.0, 500.0, 9, data=data)
    rows = made.prompt_tokens - 100
    assert (np.diff(rows) % 50 == 1).all()
    assert len(made) == pytest.approx(500, abs=10)
    assert (made.output_tokens == rows + 10).all()
    starts = {int(make(name, 1.0, 5.0, seed, data=data).prompt_tokens[0]) for seed in range(20)}
    assert len(starts) > 5


def test_thinking_is_the_recorded_share(data: Path) -> None:
    made = make("servegen-reasoning", 1.0, 60.0, 1, data=data)
    assert (made.thinking_tokens == np.rint(made.output_tokens / 2)).all()


def test_agent_sessions_are_chains_on_their_own_history(data: Path) -> None:
    made = make("agent-sessions", 0.2, 600.0, 3, data=data)
    child = made.parent >= 0
    assert (made.delay_s[child] == 40).all()
    nth = np.rint((made.prompt_tokens * 32 - 3200) / 420).astype(int)
    assert (nth[child] == nth[made.parent[child]] + 1).all()
    assert (made.prefix_tokens[child] == (3200 + 420 * (nth[child] - 1) + 100) // 32).all()
    ends = made.class_index == made.class_names.index("tool_last")
    assert set(nth[ends]) == {calls - 1 for calls in SESSION_CALLS}
    # A session lasts up to 294 s of the 600: some pass the end, and go on at the beginning as a chain.
    assert (nth[~child] > 0).any()
    first = np.flatnonzero(~child)
    lasting_s = np.diff(np.append(first, len(made))) * 42
    assert (made.arrival_s[first] + lasting_s - 42 < 600).all()


def test_a_cut_history_is_not_taken_for_cached(data: Path) -> None:
    head = "trace,depth,t_s,in_tokens,out_tokens,stop,api_time_s,think_time_s\n"
    rows = [
        "a,0,0,6400,100,tool_use,1,0",
        "a,1,0,9600,10,end_turn,,2",
        "a,0,9,6720,10,tool_use,1,3",
        "a,0,9,9600,1,,1,",
    ]
    _write(data, TRACES["agent-sessions"].recorded.file, head + "\n".join(rows) + "\n")
    made = make("agent-sessions", 0.004, 1000.0, 1, data=data)
    own = dict(zip(made.prompt_tokens.tolist(), made.prefix_tokens.tolist(), strict=False))
    assert own[200] == own[210] == 0
    assert made.prefix_tokens[made.prompt_tokens == 300].max() == (6720 + 10) // 32


def test_recorded_lengths_are_used_where_asked_for(data: Path) -> None:
    made = make("chatbot", 1.0, 60.0, 1, data=data, recorded_lengths=True)
    assert (set(made.prompt_tokens), set(made.output_tokens)) == ({2048}, {7, 1})
    assert make("chatbot", 1.0, 60.0, 1, data=data).output_tokens.max() > 7
    with pytest.raises(ConfigError, match="no recorded lengths for tool"):
        make("tool", 1.0, 60.0, 1, data=data, recorded_lengths=True)


def test_synthetic_workloads_need_no_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {name: make(name, 2.0, 60.0, 1) for name in SYNTHETIC}
    monkeypatch.setenv("SLOSSERVE_DATA", str(tmp_path))
    for name in SYNTHETIC:
        assert _same(make(name, 2.0, 60.0, 1), kept[name])
    with pytest.raises(ConfigError, match=r"no traces/azure2023_conv.csv.gz.*SLOSSERVE_DATA"):
        make("azure-conv", 1.0, 60.0, 1)
    with pytest.raises(ConfigError, match=r"no traces/azure2023_code_first30min"):
        make("coder", 1.0, 60.0, 1, arrivals="azure-code")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"name": "poet"}, r"no workload 'poet': choose from chatbot, .*mooncake"),
        ({"arrivals": "tidal"}, r"no arrivals 'tidal': choose from poisson, bursty, azure-conv, azure-code"),
        ({"name": "agent-sessions", "arrivals": "bursty"}, r"choose from poisson"),
        ({"rate_per_s": 0.0}, r"rate_per_s must be above 0, not 0"),
        ({"duration_s": float("inf")}, r"duration_s must be above 0"),
        ({"tpot_scale": -1.0}, r"tpot_scale must be above 0"),
        ({"divide": float("nan")}, r"divide must be above 0"),
        ({"seed": -1}, r"seed must be 0 or more"),
    ],
)
def test_what_cannot_be_made_is_named(change: dict[str, object], expected: str) -> None:
    asked = {"name": "chatbot", "rate_per_s": 1.0, "duration_s": 1.0, "seed": 1, **change}
    with pytest.raises(ConfigError, match=expected):
        make(**asked)  # type: ignore[arg-type]


FILES = {
    "own.csv": "t_s,in_tokens,out_tokens\n7,12,6\n9,600,60\n13,0,0\n",
    "azure.csv": "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,12,6\n"
    "2023-11-16 18:15:48,600,60\n2023-11-16 18:15:52,0,0\n",
    "mooncake.jsonl": "".join(
        f'{{"timestamp": {at_ms}, "input_length": {tokens}, "output_length": {out}, "hash_ids": [1]}}\n'
        for at_ms, tokens, out in ((0, 12, 6), (2000, 600, 60), (6000, 0, 0))
    ),
}


@pytest.mark.parametrize("file", list(FILES))
def test_a_file_runs_as_recorded_in_every_format(tmp_path: Path, file: str) -> None:
    (tmp_path / file).write_text(FILES[file])
    made = from_file(tmp_path / file, "coder")
    _check_well_formed(made)
    assert made.arrival_s.tolist() == pytest.approx([0, 2, 6])
    assert made.duration_s == pytest.approx(9)  # one mean gap after the last
    assert (made.prompt_tokens.tolist(), made.output_tokens.tolist()) == ([12, 600, 1], [6, 60, 1])
    assert made.max_tokens.tolist() == [60, 60, 60]  # none tells its own output
    assert made.class_names == ("coder",)
    assert made.slo_classes["coder"].tpot_ms == 50


def test_a_file_is_scaled_in_rate_time_and_length(tmp_path: Path) -> None:
    path = tmp_path / "own.csv"
    path.write_text(FILES["own.csv"])
    fast = from_file(path, "coder", rate_per_s=2.0, divide=6.0, max_tokens=300)
    assert fast.arrival_s.tolist() == pytest.approx([0, 1 / 3, 1])
    assert fast.rate_per_s == pytest.approx(2.0)
    assert (fast.prompt_tokens.tolist(), fast.output_tokens.tolist()) == ([8, 100, 8], [4, 10, 4])
    assert set(fast.max_tokens) == {50}
    long = from_file(path, "coder", rate_per_s=2.0, duration_s=50.0, seed=1)
    assert len(long) == pytest.approx(100, abs=2)
    assert long.duration_s == 50


def test_a_file_can_be_promised_times_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "own.csv"
    path.write_text(FILES["own.csv"])
    own = from_file(path, ttft_s=0.4, tpot_ms=30.0, tpot_scale=2.0)
    assert own.class_names == ("own",)
    assert (own.slo_classes["own"].ttft_ms, own.slo_classes["own"].tpot_ms) == (400, 30)
    part = from_file(path, "summarizer", ttft_s=0.4, tpot_scale=2.0).slo_classes["own"]
    assert (part.ttft_ms, part.tpot_ms) == (400, 200)
    with pytest.raises(ConfigError, match=r"what is promised\? .*both ttft_s and tpot_ms"):
        from_file(path, ttft_s=0.4)
    with pytest.raises(ConfigError, match=r"no SLO class 'poet': choose from chatbot.*tool_last"):
        from_file(path, "poet")
    with pytest.raises(ConfigError, match="tpot_ms must be above 0, not -1"):
        from_file(path, "coder", tpot_ms=-1.0)
    with pytest.raises(ConfigError, match="duration_s must be above 0, not 0"):
        from_file(path, "coder", duration_s=0.0)
    path = tmp_path / "still.csv"
    path.write_text("t_s,in_tokens,out_tokens\n3,1,1\n3,1,1\n")
    with pytest.raises(ConfigError, match=r"still.csv: no time in it"):
        from_file(path, "coder")


@REAL
def test_azure_traces_keep_their_statistics() -> None:
    conv = make("azure-conv", 5.53, 3500.0, 1)
    assert conv.prompt_tokens.mean() == pytest.approx(1155, rel=0.01)
    assert conv.output_tokens.mean() == pytest.approx(211, rel=0.01)
    assert set(conv.max_tokens) == {1024}
    code = make("azure-code", 3.21, 1780.0, 1)
    assert code.output_tokens.mean() == pytest.approx(27, rel=0.05)
    per_s = np.bincount(code.arrival_s.astype(int), minlength=1780)
    assert per_s.std() / per_s.mean() > 2  # the bursts survive
    bursty = make("chatbot", 3.21, 1780.0, 1, arrivals="azure-code")
    assert len(bursty) == pytest.approx(len(code), rel=0.1)
    assert bursty.prompt_tokens.max() <= 2048


@REAL
def test_servegen_thinks_as_recorded() -> None:
    made = make("servegen-reasoning", 4.0, 3500.0, 1)
    _check_well_formed(made)
    assert made.thinking_tokens.sum() / made.output_tokens.sum() == pytest.approx(0.80, abs=0.02)
    log = np.log(np.maximum(made.thinking_tokens, 1))
    cv = scenarios.REASONING.thinking
    assert cv is not None
    assert np.sqrt(np.expm1(log.std() ** 2)) == pytest.approx(cv.std / cv.mean, rel=0.02)


@REAL
def test_real_agents_have_the_rate_asked_for_and_mostly_cached_prompts() -> None:
    made = make("agent-sessions", 2.0, 600.0, 1)
    _check_well_formed(made)
    assert made.rate_per_s == pytest.approx(2.0)
    assert 0.7 < made.prefix_tokens.sum() / made.prompt_tokens.sum() < 0.97
    assert 0.03 < (made.class_index == 1).mean() < 0.12
    assert made.delay_s.max() < 600
