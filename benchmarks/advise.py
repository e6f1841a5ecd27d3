"""`slosserve advise`: which split of GPUs keeps most promises for a trace, and whether to disaggregate at all.

Every split serves the same requests in simulated time, by the code that serves. Where the rate is so low or so
high that all splits look alike, the highest rate that each holds is compared instead.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.hardware import HARDWARE, Hardware, hardware
from benchmarks.parts import SLO_CLASSES
from benchmarks.provenance import provenance
from benchmarks.recorded import load_recording
from benchmarks.simulator.run import Network
from benchmarks.splits import (
    Each,
    Job,
    Question,
    Tried,
    Turn,
    best_other,
    best_ratio,
    do,
    noise,
    splits,
    turning_point,
)
from engine.errors import ConfigError

SECONDS = 600.0
DEFAULT_CLASS = "chatbot"
ALL_KEPT, FEW_KEPT = 0.995, 0.5  # beyond these a rate does not tell splits apart


def advise(
    trace: Annotated[Path, typer.Option(help="CSV of t_s,in_tokens,out_tokens, Azure CSV or Mooncake jsonl.")],
    gpus: Annotated[int, typer.Option(help="How many there are.")],
    profile: Annotated[
        str, typer.Option(help=f"Of {', '.join(HARDWARE)}, or a file of `slosserve profile fit`.")
    ] = "paper",
    rate: Annotated[float | None, typer.Option(help="Requests a second; else as recorded.")] = None,
    slo_class: Annotated[
        str | None,
        typer.Option(
            "--class",
            help=f"What is promised: {', '.join(SLO_CLASSES)}.",
            show_default=f"{DEFAULT_CLASS}, or what --slo-ttft-ms and --slo-tpot-ms say",
        ),
    ] = None,
    slo_ttft_ms: Annotated[float | None, typer.Option(help="First token within.")] = None,
    slo_tpot_ms: Annotated[float | None, typer.Option(help="Pace of the answer.")] = None,
    link_gbps: Annotated[
        float | None, typer.Option(help="Of a port, in gigabits a second; else 96 (100 GbE).")
    ] = None,
    share: Annotated[float, typer.Option(help="To be kept, where the capacity is searched.")] = 0.9,
    kv_tokens: Annotated[int | None, typer.Option(min=64, help="KV memory of a replica, in tokens.")] = None,
    seconds: Annotated[float, typer.Option(min=1, help="Of traffic; a shorter trace goes round.")] = SECONDS,
    seed: Annotated[int, typer.Option(min=0, help="Says where in the trace it begins.")] = 1,
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = os.cpu_count() or 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the splits into this file, PNG or SVG.")] = None,
) -> None:
    """Say which split of GPUs into prefill and decode keeps most promises of a trace, and by how much.

    Example: slosserve advise --trace azure.csv.gz --class chatbot --profile a100-llama-2-7b --gpus 4 --rate 8
    """
    if slo_class is None and slo_ttft_ms is None and slo_tpot_ms is None:
        slo_class = DEFAULT_CLASS
        told = f"promises are taken for those of {DEFAULT_CLASS}: say others by --class, or in ms by --slo-*"
        Console(stderr=True, highlight=False, soft_wrap=True).print(told)
    question = _question(
        trace, gpus, hardware(profile, kv_tokens=kv_tokens), rate, (slo_class, slo_ttft_ms, slo_tpot_ms),
        share, seconds, seed,
    )  # fmt: skip
    if link_gbps is not None and link_gbps <= 0:
        raise ConfigError(f"--link-gbps must be above 0, not {link_gbps:g}")
    network = Network() if link_gbps is None else Network(bytes_per_s=link_gbps * 1e9 / 8)
    with _pool(workers, quiet=as_json) as each:
        tried, search = _try_all(each, question, network)
        turn = turning_point(each, question, tried, network, search) if question.replicas > 1 else None
    advice = Advice(question, network, tried, search, turn)
    if plot is not None:
        from benchmarks.report.plots import draw_splits

        draw_splits(plot, advice.bars(), advice.unit, advice.head)
    if as_json:
        typer.echo(json.dumps(advice.as_json() | {"provenance": provenance(seed)}))
    else:
        advice.show(Console(highlight=False, soft_wrap=True))


def _question(
    trace: Path,
    gpus: int,
    chosen: Hardware,
    rate: float | None,
    slo: tuple[str | None, float | None, float | None],
    share: float,
    seconds: float,
    seed: int,
) -> Question:
    """What was asked. Raises ConfigError, in words of the command line, for what does not fit."""
    if not trace.is_file():
        raise ConfigError(f"--trace {trace}: there is no such file (`slosserve traces list` names public ones)")
    if gpus < 1:
        raise ConfigError(f"--gpus must be 1 or more, not {gpus}")
    if gpus % chosen.tp:
        raise ConfigError(
            f"--gpus {gpus}: a replica of {chosen.name} takes {chosen.tp} GPUs, give a multiple of {chosen.tp}"
        )
    if slo[0] is None and (slo[1] is None or slo[2] is None):
        raise ConfigError(
            f"what is promised? give --class ({', '.join(SLO_CLASSES)}), "
            "or both --slo-ttft-ms and --slo-tpot-ms"
        )
    if not 0 < share < 1:
        raise ConfigError(f"--share must be between 0 and 1, not {share:g}")
    if rate is not None and rate <= 0:
        raise ConfigError(f"--rate must be above 0, not {rate:g}")
    rate_per_s = 1 / load_recording(trace).mean_gap_s if rate is None else rate
    asked = Question(trace, *slo, chosen, gpus // chosen.tp, rate_per_s, seconds, share, seed)
    asked.workload(rate_per_s)  # raises what is wrong with the promise here, once, and not in every process
    return asked


def _try_all(each: Each, question: Question, network: Network) -> tuple[list[Tried], bool]:
    """Every split at the rate asked for; or its capacity, if that rate tells nothing."""
    listed = splits(question.replicas)
    tried = each([Job(question, split, network, search=False) for split in listed])
    values = [one.value for one in tried]
    if min(values) <= ALL_KEPT and max(values) >= FEW_KEPT:
        return tried, False
    return each([Job(question, split, network, search=True) for split in listed]), True


@dataclass(frozen=True, slots=True)
class Advice:
    """All that was found, and how it is said."""

    question: Question
    network: Network
    tried: Sequence[Tried]
    search: bool
    turn: Turn | None

    @property
    def ranked(self) -> list[Tried]:
        """The best first; of equals, what needs no link first."""
        return sorted(self.tried, key=lambda one: -one.value)

    @property
    def unit(self) -> str:
        """What `value` is."""
        if self.search:
            return f"requests a second and GPU with {self.question.share:.0%} kept"
        return f"promises kept at {self.question.rate_per_s:.3g} requests a second"

    @property
    def head(self) -> str:
        """What was asked, in a line."""
        asked, slo = self.question, self.question.slo_class or ""
        given = [(asked.ttft_ms, "first token within {:g} ms"), (asked.tpot_ms, "{:g} ms a token")]
        promised = ", ".join([slo] * bool(slo) + [text.format(ms) for ms, text in given if ms is not None])
        return (
            f"{asked.trace.name} ({promised}) on {asked.gpus} GPUs, {asked.hardware.name}, "
            f"links of {self.network.bytes_per_s / 1e9:.3g} GB/s"
        )

    def sentences(self) -> list[str]:
        """The advice."""
        said = [self._why_searched()] if self.search else []
        best, *others = self.ranked
        if not others:
            return [*said, f"One replica cannot be split: it {self._words(best.value)}."]
        scatter = noise(best, others[0])
        lead = f"{best.split.name} {self._words(best.value)}, {self._lead(best, others[0])} "
        if best.value - others[0].value > scatter:
            said.append(f"{lead}{others[0].split.name} (noise {self._gap(scatter)}).")
        else:
            level = [one.split.name for one in others if best.value - one.value <= noise(best, one)]
            said.append(
                f"{lead}{others[0].split.name}: no more than noise ({self._gap(scatter)}). "
                f"{', '.join([best.split.name, *level])} are level; colocated is the simplest."
            )
        if any(one.split.name == "mixed" and not one.facts["pairs"] for one in others):
            said.append("Mixed never found a second node worth its transfer.")
        return [*said, self._on_disaggregation()]

    def _why_searched(self) -> str:
        low = max(one.value for one in self.tried) * self.question.gpus > self.question.rate_per_s
        kept = f"more than {ALL_KEPT:.1%}" if low else f"less than {FEW_KEPT:.0%}"
        return (
            f"At {self.question.rate_per_s:.3g} requests a second every split keeps {kept}: the rate is too "
            f"{'low' if low else 'high'} to tell them apart, so the highest rate that each holds was searched."
        )

    def _on_disaggregation(self) -> str:
        ratio, other, turn = best_ratio(self.tried), best_other(self.tried), self.turn
        gap, scatter = ratio.value - other.value, noise(ratio, other)
        values = [f"{one.split.name} {self._words(one.value)}" for one in (ratio, other)]
        worth = "pays" if gap > scatter else "changes little" if gap >= -scatter else "is not worth it"
        said = [f"Disaggregation {worth} here: {values[0]}, {values[1]}."]
        moved_s, of_pace = ratio.facts["kv_transfer_s"], ratio.facts["kv_share_of_pace"]
        if moved_s is not None:
            share = f"{of_pace:.2g} times what the pace allows for a token"
            said.append(
                f"Moving KV takes {moved_s * 1e3:.3g} ms at the median, after the first token: {share}."
            )
        if turn is None:
            said.append("That is within the noise.")
        elif gap > 0:
            slowest = f"down to about {turn.gbps:g} Gbit/s" if turn.gbps else "even over 1 Gbit/s"
            said.append(f"It stays ahead over slower links, {slowest}.")
        elif turn.gbps is None and turn.free is not None:
            at_best = f"{ratio.split.name} {self._words(turn.free)}"
            said.append(f"No link changes that: if it took no time, {at_best}.")
        else:
            said.append(f"From about {turn.gbps:g} Gbit/s on it would be ahead.")
        return " ".join(said)

    def _words(self, value: float) -> str:
        return f"holds {value:.2f} requests/s a GPU" if self.search else f"keeps {value:.1%}"

    def _gap(self, gap: float) -> str:
        return f"{gap:.2f}" if self.search else f"{100 * gap:.1f} points"

    def _lead(self, best: Tried, other: Tried) -> str:
        if not self.search:
            return f"{self._gap(best.value - other.value)} more than"
        return f"{best.value / other.value:.2f}x as much as" if other.value else "and nothing by"

    def bars(self) -> list[tuple[str, float, str]]:
        """For a picture."""
        return [
            (one.split.name, one.value, f"{one.value:.2f}" if self.search else f"{one.value:.1%}")
            for one in self.ranked
        ]

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        asked, best = self.question, self.ranked[0]
        second = self.ranked[1] if len(self.ranked) > 1 else None
        return {
            "best": best.split.name,
            "value": best.value,
            "value_is": "capacity_per_gpu" if self.search else "attainment",
            "next_best": None if second is None else second.split.name,
            "margin": None if second is None else best.value - second.value,
            "noise": None if second is None else noise(best, second),
            "advice": self.sentences(),
            "link_that_changes_it_gbps": None if self.turn is None else self.turn.gbps,
            "with_free_transfer": None if self.turn is None else self.turn.free,
            "trace": asked.trace.name,
            "rate_per_s": asked.rate_per_s,
            "duration_s": asked.duration_s,
            "share": asked.share,
            "profile": asked.hardware.name,
            "gpus": asked.gpus,
            "link_bytes_per_s": self.network.bytes_per_s,
            "splits": [{"split": one.split.name, "value": one.value, **one.facts} for one in self.ranked],
        }

    def show(self, console: Console) -> None:
        """For people."""
        asked = self.question
        console.print(self.head)
        rounds = asked.rate_per_s * asked.duration_s / len(load_recording(asked.trace))
        served = f"{asked.rate_per_s:.3g} requests a second for {asked.duration_s:.0f} s"
        console.print(f"{served}, {rounds:.2g} times the trace; the first tenth is not counted")
        table = Table(box=None, padding=(0, 2, 0, 0))
        columns = ("kept", "in halves", "TTFT p50, p99", "TPOT p99", "pairs")
        for heading in ("split", *(["req/s a GPU"] if self.search else []), *columns):
            table.add_column(heading, justify="left" if heading == "split" else "right", no_wrap=True)
        for one in self.ranked:
            table.add_row(one.split.name, *([f"{one.value:.2f}"] if self.search else []), *_cells(one.facts))
        console.print(table)
        for sentence in self.sentences():
            console.print(sentence)


def _cells(facts: dict[str, Any]) -> list[str]:
    def ms(*seconds: float | None) -> str:
        return ", ".join("-" if one is None else f"{one * 1e3:.0f}" for one in seconds) + " ms"

    ttft, grows = facts["ttft_s"], "" if facts["drained"] else ", queue left"
    return [
        f"{facts['attainment']:.1%}{grows}",
        f"{100 * facts['attainment_first_half']:.1f}, {facts['attainment_second_half']:.1%}",
        ms(ttft["p50"], ttft["p99"]),
        ms(facts["tpot_s"]["p99"]),
        f"{facts['pairs'] / max(facts['counted'], 1):.0%}",
    ]


@contextmanager
def _pool(workers: int, *, quiet: bool) -> Iterator[Each]:
    """Carries out jobs in processes, with a bar on stderr. One worker is this process itself."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True, quiet=quiet)
    # Spawned, not forked: the bar has a thread of its own.
    pool = ProcessPoolExecutor(workers, get_context("spawn")) if workers > 1 else None
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("serving", total=0)
        asked = 0

        def each(jobs: Sequence[Job]) -> list[Tried]:
            nonlocal asked
            asked += len(jobs)
            searches = any(job.search for job in jobs)
            bar.update(task, total=asked, description="searching capacity" if searches else "serving")
            done = []
            for one in pool.map(do, jobs) if pool is not None else map(do, jobs):
                bar.advance(task)
                done.append(one)
            return done

        try:
            yield each
        finally:
            if pool is not None:
                pool.shutdown(cancel_futures=True)
