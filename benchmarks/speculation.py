"""Speculation on the paper's profile: depths, the request rates they hold, and how often luck breaks a pace."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.provenance import provenance
from engine.cost import Piece, StepCost
from engine.score import CHECK_EVERY, TOLERANCE
from engine.speculation import (
    GRACE_TOKENS,
    MAX_DEPTH,
    START_THETA,
    Depths,
    TierLoad,
    allowed_s,
    choose_depths,
    expected_tokens,
    theta_for,
)

# OPT-7B on an A100-40G, a 125M draft model, ChatBot (SLOs-Serve, arXiv 2504.08784).
PAPER = StepCost((Piece(24.8e-3, 6.88e-5, 1.2e-6), Piece(3.0e-3, 7.52e-5, 3.46e-3)))
KV_TOKENS = 40_000
PROMPT_TOKENS, OUTPUT_TOKENS = 763, 266
TPOT_S = 0.1
BATCH_TOKENS = 2048
ACCEPTANCES = (0.5, 0.7, 0.9)

# Depth, paced or not, requests per second at acceptance 0.7: what the published analysis of this profile gives.
PUBLISHED_RATES = ((2, True, 1.68), (1, False, 4.58), (2, False, 6.21), (5, False, 7.21))
# Acceptance 0.7, 266 tokens of output: depth, theta, share kept.
PUBLISHED_WALKS = ((2, 1.0, 0.34), (4, 1.0, 0.15), (4, 0.7, 0.93), (4, 0.6, 0.99))
WALKS = 20_000
STEERED_WALKS = 2_000
GRACE_WALKS = 2_000
TIMED_CALLS = 1_000
SHARE = 0.9


@dataclass(frozen=True, slots=True)
class Steady:
    """A replica in which memory binds: as many residents as its KV holds, half way through their output."""

    cost: StepCost
    kv_tokens: int
    prompt_tokens: int
    output_tokens: int

    @property
    def residents(self) -> float:
        """Requests that decode at a time."""
        return self.kv_tokens / (self.prompt_tokens + self.output_tokens / 2)

    def batch_s(self, depth: int, acceptance: float) -> float:
        """Seconds of a batch with every resident in it, and the prefill of those that take over from them."""
        made = expected_tokens(depth, acceptance)
        tokens = self.residents * (depth + made * self.prompt_tokens / self.output_tokens)
        return self.cost.predict(tokens, draft_steps=depth - 1)  # type: ignore[arg-type]  # an average

    def requests_per_s(self, depth: int, acceptance: float, at_least_s: float = 0.0) -> float:
        """What the replica serves if no batch ends before `at_least_s`."""
        made = self.residents * expected_tokens(depth, acceptance)
        return made / (self.output_tokens * max(self.batch_s(depth, acceptance), at_least_s))


STEADY = Steady(PAPER, KV_TOKENS, PROMPT_TOKENS, OUTPUT_TOKENS)


def paced_rate(depth: int, acceptance: float, theta: float) -> float:
    """Requests per second where each batch lasts as long as the pace allows."""
    made = expected_tokens(depth, acceptance)
    return STEADY.requests_per_s(depth, acceptance, allowed_s(TPOT_S, made, theta))


def regimes(acceptance: float) -> list[dict[str, Any]]:
    """What each regime chooses at this acceptance, and the rate that it holds."""
    load = TierLoad(TPOT_S, acceptance, round(STEADY.residents), KV_TOKENS)

    def chosen(theta: float, kv_bound: bool) -> Depths:
        return choose_depths(
            PAPER,
            [load],
            max_batch_tokens=BATCH_TOKENS,
            theta=theta,
            kv_bound=kv_bound,
            prefill_per_output=PROMPT_TOKENS / OUTPUT_TOKENS,
        )

    rows = []
    for name, theta, kv_bound in (
        ("paced, theta 1", 1.0, False),
        (f"paced, theta {START_THETA}", START_THETA, False),
        (f"full speed, theta {START_THETA}", START_THETA, True),
    ):
        choice = chosen(theta, kv_bound)
        depth = choice.depths[0]
        rate = STEADY.requests_per_s(depth, acceptance) if kv_bound else paced_rate(depth, acceptance, theta)
        row = {"regime": name, "acceptance": acceptance, "depth": depth, "batch_s": choice.batch_s}
        rows.append(row | {"requests_per_s": rate, "prefill_tokens_per_s": choice.prefill_tokens_per_s})
    return rows


Tokens = NDArray[np.int64]


def accepted(depth: int, acceptance: float, shape: tuple[int, int], rng: np.random.Generator) -> Tokens:
    """Tokens that each verify gives [walks, verifies]: up to the first rejection, and one more."""
    draws = np.maximum(rng.random(shape), 1e-300)
    before_rejection: Tokens = np.floor(np.log(draws) / np.log(acceptance)).astype(np.int64)
    return np.minimum(1 + before_rejection, depth)


def kept_share(made: Tokens, batch: float, output_tokens: int, slack: float) -> float:
    """Share of walks that the score passes. Times in TPOTs since the first token: batch m ends at m * batch."""
    total = made.cumsum(axis=1)
    late = np.zeros(len(made), dtype=bool)
    for number in {*range(CHECK_EVERY, output_tokens + 1, CHECK_EVERY), output_tokens}:
        after = number - 1  # tokens after the first
        in_time = int((after * (1 + TOLERANCE) + slack) / batch + 1e-9)
        if in_time < total.shape[1]:
            late |= (total[:, in_time - 1] if in_time > 0 else 0) < after
    return 1 - float(late.mean())


def walk(depth: int, theta: float, seed: int, slack: float = 0.0, acceptance: float = 0.7) -> float:
    """Share kept where every batch takes `theta * Acc` TPOTs, whatever happened before (no feedback)."""
    batch = theta * expected_tokens(depth, acceptance)
    rng = np.random.default_rng(seed)
    made = accepted(depth, acceptance, (WALKS, OUTPUT_TOKENS), rng)
    return kept_share(made, batch, OUTPUT_TOKENS, slack)


def steered(depth: int, seed: int, acceptance: float = 0.7) -> dict[str, float]:
    """The same where each batch takes what `theta_for` allows at the slack of that moment."""
    expected = expected_tokens(depth, acceptance)
    rng = np.random.default_rng(seed)
    made = accepted(depth, acceptance, (STEERED_WALKS, OUTPUT_TOKENS), rng)
    allowed: Callable[[int, float], float] = _remembered(depth, acceptance)
    kept, speeds = 0, []
    for verifies in made:
        now, total, batches, good = 0.0, 0, 0, True
        while total < OUTPUT_TOKENS - 1:
            now += allowed(OUTPUT_TOKENS - total, total - now) * expected
            before, total = total, min(total + int(verifies[batches]), OUTPUT_TOKENS - 1)
            batches += 1
            checked = [n for n in range(before + 2, total + 2) if n % CHECK_EVERY == 0 or n == OUTPUT_TOKENS]
            good = good and all(now <= (n - 1) * (1 + TOLERANCE) + 1e-9 for n in checked)
        kept += good
        speeds.append(now / (batches * expected))
    return {"depth": depth, "kept": kept / STEERED_WALKS, "mean_theta": float(np.mean(speeds))}


def _remembered(depth: int, acceptance: float) -> Callable[[int, float], float]:
    """`theta_for` at slack rounded down to a quarter of a token and output to 8 tokens: few distinct calls."""
    seen: dict[tuple[int, int], float] = {}

    def allowed(remaining: int, slack: float) -> float:
        key = (-(-remaining // 8), int(slack // 0.25))
        if key not in seen:
            seen[key] = theta_for(depth, acceptance, 8 * key[0], 0.25 * key[1], SHARE)
        return seen[key]

    return allowed


def thetas(seed: int) -> list[dict[str, Any]]:
    """theta_for over slack, and the share kept where it stays what it was at the start."""
    rows = []
    for depth in (2, 4, 8):
        for slack in (0.0, 2.0, 5.0, 10.0, 20.0, 50.0):
            theta = theta_for(depth, 0.7, OUTPUT_TOKENS, slack, SHARE)
            kept = walk(depth, theta, seed, slack)
            rows.append({"depth": depth, "slack_tokens": slack, "theta": theta, "share": SHARE, "kept": kept})
    return rows


def forgiven(seed: int) -> list[dict[str, Any]]:
    """Cases that keep less than asked for by over a point, by how much slack the score is taken to be worth."""
    cases = list(product((0.3, 0.5, 0.7, 0.9), (2, 3, 4, 6, 8), (26, 100, 266), (0, 3)))
    rows = []
    for grace in (0.0, 1.0, GRACE_TOKENS, 2.0, 3.0):
        for share in (0.9, 0.95, 0.99):
            short = []
            for a, depth, tokens, slack in cases:
                theta = theta_for(depth, a, tokens, slack, share, grace_tokens=grace)
                made = accepted(depth, a, (GRACE_WALKS, tokens), np.random.default_rng(seed))
                short.append(share - kept_share(made, theta * expected_tokens(depth, a), tokens, slack))
            below = sum(lack > 0.01 for lack in short)
            row = {"grace_tokens": grace, "share": share, "cases": len(short), "below": below}
            rows.append(row | {"worst_kept": share - max(short)})
    return rows


def timings() -> list[dict[str, Any]]:
    """CPU time of a choice, depth up to 10: what else runs on the machine does not count."""
    rows = []
    for count in (1, 2, 3, 4):
        tiers = [TierLoad(TPOT_S / 2 * (1 + index), 0.7, 16, 10_000) for index in range(count)]
        for kv_bound in (False, True):
            times_s = []
            for _ in range(TIMED_CALLS):
                begun = time.thread_time()
                choose_depths(PAPER, tiers, max_batch_tokens=BATCH_TOKENS, kv_bound=kv_bound)
                times_s.append(time.thread_time() - begun)
            p50, p99 = np.percentile(times_s, (50, 99)) * 1e3
            rows.append({"tiers": count, "kv_bound": kv_bound, "p50_ms": float(p50), "p99_ms": float(p99)})
    return rows


def measure(seed: int) -> dict[str, Any]:
    """All figures."""
    published = []
    for depth, paced, rate in PUBLISHED_RATES:
        ours = paced_rate(depth, 0.7, 1.0) if paced else STEADY.requests_per_s(depth, 0.7)
        published.append({"depth": depth, "paced": paced, "published": rate, "requests_per_s": ours})
    return {
        "rates": published,
        "regimes": [row for a in ACCEPTANCES for row in regimes(a)],
        "full_speed": [
            {"acceptance": a, "depth": s, "requests_per_s": STEADY.requests_per_s(s, a)}
            for a in ACCEPTANCES
            for s in range(1, MAX_DEPTH + 1)
        ],
        "walks": [
            {"depth": depth, "theta": theta, "published": share, "kept": walk(depth, theta, seed)}
            for depth, theta, share in PUBLISHED_WALKS
        ],
        "thetas": thetas(seed),
        "forgiven": forgiven(seed),
        "calls": timings(),
        "steered": [steered(depth, seed) for depth in (2, 4, 8)],
    }


def show(title: str, rows: list[dict[str, Any]], console: Console) -> None:
    """A list of figures as a table."""
    table = Table(*rows[0], title=title, title_justify="left")
    for row in rows:
        table.add_row(*[f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()])
    console.print(table)


def bench_speculation(
    seed: Annotated[int, typer.Option(help="Seed of the walks.")] = 1,
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = Path("out/bench/speculation.json"),
) -> None:
    """Depths of both regimes, request rates they hold, and the walk of accepted tokens."""
    results = measure(seed)
    console = Console()
    for name, title in (
        ("rates", "ChatBot, acceptance 0.7: requests per second"),
        ("regimes", "What each regime takes"),
        ("walks", "Share of requests kept without feedback, 266 tokens, acceptance 0.7"),
        ("thetas", f"theta for {SHARE:.0%} kept, by slack"),
        ("steered", "theta chosen anew for each batch, no slack at first"),
        ("forgiven", "Slack that the score is worth: cases that keep less than asked for"),
        ("calls", "CPU time of one choice"),
    ):
        show(title, results[name], console)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results | {"provenance": provenance(seed)}, indent=2) + "\n", encoding="utf-8")
    console.print(f"written to {out}")


if __name__ == "__main__":
    typer.run(bench_speculation)
