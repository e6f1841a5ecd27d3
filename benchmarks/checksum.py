"""What checksums add to a handoff: `python -m benchmarks.checksum`.

Two real engines, each in a process of its own, hand over prompts of random tokens, with checksums and without
in turn, so that whatever else the machine does falls on both.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from benchmarks.provenance import provenance
from engine.base import UNPLANNED, Work
from engine.models import resolve_model
from engine.vllm import VllmEngine, VllmEngineConfig, encode_sampling
from kv_transfer.base import Handoff, PullOutcome
from kv_transfer.nixl_exchange import find_exchange
from tests.contracts.engine_process import EngineProcess

LENGTHS = (256, 1024)
WARM_UP = 2
VOCABULARY = 1000
DECODES = 8  # tokens of an answer, for what a step of the target takes


class End:
    """One engine, stepped by hand. It caches no prefix: all of a prompt moves."""

    def __init__(self, model: str, dtype: str, engine_id: str, side_channel_port: int) -> None:
        self._engine = VllmEngine(
            VllmEngineConfig(
                model=resolve_model(model),
                engine_id=engine_id,
                dtype=dtype,
                max_model_len=2048,
                max_batch_tokens=2048,
                kv_cache_bytes=128 << 20,
                enable_prefix_caching=False,
                side_channel_port=side_channel_port,
                env={"OMP_NUM_THREADS": "1"},
            )
        )
        self._engine.start()
        exchange = find_exchange(engine_id)
        assert exchange is not None
        self._exchange = exchange
        self._summed_s: list[float] = []
        sums = exchange.worker.checksums

        def timed(block_ids: Any) -> Any:
            start_s = time.perf_counter()
            summed = sums(block_ids)
            self._summed_s.append(time.perf_counter() - start_s)
            return summed

        exchange.worker.checksums = timed

    def offer(self, work_id: str, prompt: Sequence[int], checksum: bool) -> tuple[Handoff, dict[str, float]]:
        """Prefill; the handoff, and the seconds that it took."""
        self._exchange.checksum = checksum
        start_s = time.perf_counter()
        self._engine.submit(Work(work_id, prompt, b"", 1, offer_kv=True))
        while True:
            for output in self._engine.step(lambda _: UNPLANNED).outputs:
                assert output.handoff is not None, output.error
                prefill_s = time.perf_counter() - start_s
                return output.handoff, {"prefill_s": prefill_s, "source_sums_s": self._summed()}

    def pull(self, work_id: str, prompt: Sequence[int], handoff: Handoff) -> dict[str, float]:
        """Pull and say some tokens; the seconds of the pull, to the first token, and of a step."""
        from vllm.sampling_params import SamplingParams

        self._exchange.checksum = "checksums" in handoff.params
        sampling = encode_sampling(SamplingParams(temperature=0.0, max_tokens=DECODES, ignore_eos=True))
        start_s = time.perf_counter()
        self._engine.submit(Work(work_id, prompt, sampling, DECODES, handoff=handoff))
        said_s: list[float] = []
        while len(said_s) < DECODES:
            said = sum(len(output.token_ids) for output in self._engine.step(lambda _: UNPLANNED).outputs)
            said_s += [time.perf_counter()] * said
        (pull,) = self._engine.kv.take_pulls()
        assert pull.outcome is PullOutcome.PULLED, pull
        return {
            "bytes": pull.kv_bytes,
            "pull_s": pull.seconds,
            "first_token_s": said_s[0] - start_s,
            "step_s": (said_s[-1] - said_s[0]) / (DECODES - 1),
            "target_sums_s": self._summed(),
        }

    def settle(self) -> None:
        """Step until nothing is left to do."""
        while self._engine.has_work():
            self._engine.step(lambda _: UNPLANNED)

    def _summed(self) -> float:
        return self._summed_s.pop() if self._summed_s else 0.0


def measure(
    source: EngineProcess, target: EngineProcess, length: int, repeats: int, seed: int
) -> dict[str, Any]:
    """Medians with and without, and of the differences between neighbours."""
    numbers = random.Random(seed)
    runs: dict[bool, list[dict[str, float]]] = {True: [], False: []}
    for repeat in range(WARM_UP + repeats):
        for checksum in (True, False) if repeat % 2 else (False, True):
            prompt = [numbers.randrange(VOCABULARY) for _ in range(length)]
            work_id = f"{length}-{repeat}-{checksum}"
            handoff, times = source.call("offer", work_id, prompt, checksum)
            times |= target.call("pull", work_id, prompt, handoff)
            for end in (source, target):
                end.call("settle")
            times["handoff_s"] = times["prefill_s"] + times["first_token_s"]
            if repeat >= WARM_UP:
                runs[checksum].append(times)
    return {"tokens": length, "with": _medians(runs[True]), "without": _medians(runs[False])} | {
        "adds": {
            name: median(on[name] - off[name] for on, off in zip(runs[True], runs[False], strict=True))
            for name in runs[True][0]
        }
    }


def _medians(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: median(run[name] for run in runs) for name in runs[0]}


def _line(row: Mapping[str, Any]) -> str:
    on, off, adds = row["with"], row["without"], row["adds"]
    share = (on["source_sums_s"] + on["target_sums_s"]) / off["handoff_s"]
    return (
        f"{row['tokens']:6d} {on['bytes'] / 1e6:4.1f} | "
        f"{on['source_sums_s'] * 1e3:12.2f} {on['target_sums_s'] * 1e3:6.2f} | "
        f"{off['prefill_s'] * 1e3:7.1f} {adds['prefill_s'] * 1e3:+5.2f} | "
        f"{off['pull_s'] * 1e3:4.1f} {adds['pull_s'] * 1e3:+5.2f} | "
        f"{off['handoff_s'] * 1e3:7.1f} {adds['handoff_s'] * 1e3:+5.2f} {share:6.2%} | "
        f"{off['step_s'] * 1e3:6.1f}"
    )


def main(
    model: Annotated[str, typer.Option(help="`tiny`, `scale`, or a folder.")] = "scale",
    dtype: Annotated[str, typer.Option(help="A CPU without bfloat16 of its own is slow at that.")] = "float32",
    repeats: Annotated[int, typer.Option(min=2, help="Handoffs of each length and kind.")] = 20,
    seed: Annotated[int, typer.Option(help="Of the prompts.")] = 1,
    out: Annotated[Path | None, typer.Option(help="A file for the figures.")] = None,
) -> None:
    """Measure handoffs with and without checksums, in turn, between two real engines."""
    ends = [EngineProcess(End, model, dtype, name, port) for name, port in (("source", 5761), ("target", 5762))]
    rows: list[dict[str, Any]] = []
    try:
        for end in ends:
            end.ready()
        print(
            f"{model} in {dtype}: {repeats} handoffs each with checksums and without, in turn; medians, in ms"
        )
        print("tokens   MB | sums: source target | prefill  adds | pull  adds | handoff  adds       | a step")
        for length in LENGTHS:
            rows.append(measure(ends[0], ends[1], length, repeats, seed))
            print(_line(rows[-1]), flush=True)
    finally:
        for end in ends:
            end.kill()
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(
            json.dumps({"model": model, "dtype": dtype, "rows": rows, "made": provenance(seed)}, indent=1)
            + "\n"
        )


if __name__ == "__main__":
    typer.run(main)
