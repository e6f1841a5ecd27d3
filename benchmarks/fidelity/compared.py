"""One workload on two sides, a real node and its simulated twin, and how far the two are apart."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.fidelity.real_node import Served
from benchmarks.fidelity.twin import Twin
from benchmarks.open_loop import Sent
from benchmarks.simulator.outcome import Flags, Outcome
from benchmarks.workload import Floats, Workload
from engine.errors import EngineError
from engine.request import Slo
from engine.score import score

TARGET = 0.10  # relative; of attainment absolute
JUDGED = ("ttft_p50_ms", "tpot_p50_ms", "attainment")
ERROR_SAMPLES = 5


@dataclass(frozen=True, slots=True, eq=False)
class Side:
    """How the requests of a run went on one side. Columns [requests]; NaN where nothing came."""

    ttft_s: Floats
    tpot_s: Floats
    met: Flags
    done: Flags

    @classmethod
    def of_client(cls, workload: Workload, slos: Sequence[Slo], sent: Sequence[Sent]) -> Side:
        """As the client saw it, counted from when each request should have been sent."""
        times = [one.token_times_s for one in sent]
        outputs = workload.output_tokens
        done = [
            one.error is None and len(one.token_times_s) == tokens
            for one, tokens in zip(sent, outputs.tolist(), strict=True)
        ]
        met = [score(slo, seen, completed=ok).met for slo, seen, ok in zip(slos, times, done, strict=True)]
        first = np.array([seen[0] if seen else np.nan for seen in times])
        last = np.array([seen[-1] if seen else np.nan for seen in times])
        tpot = np.where(outputs > 1, (last - first) / np.maximum(outputs - 1, 1), np.nan)
        return cls(first, tpot, np.array(met, np.bool_), np.array(done, np.bool_))

    @classmethod
    def of_twin(cls, out: Outcome, latency_s: float) -> Side:
        """As simulated at the node, and seen by a client `latency_s` away."""
        done = np.isfinite(out.world.ended_s) & ~out.world.dropped
        return cls(out.ttft_s + latency_s, out.tpot_s, out.met, done)

    def figures(self, counted: Flags) -> dict[str, float]:
        """Of the counted requests; times are of those that completed. Raises EngineError if none did."""
        chosen = counted & self.done
        if not chosen.any():
            raise EngineError("not one request completed: there is nothing to compare")
        ttft_ms, tpot_ms = self.ttft_s[chosen] * 1e3, self.tpot_s[chosen] * 1e3
        return {
            "ttft_p50_ms": float(np.median(ttft_ms)),
            "ttft_p99_ms": float(np.quantile(ttft_ms, 0.99)),
            "tpot_p50_ms": float(np.nanmedian(tpot_ms)),
            "tpot_p99_ms": float(np.nanquantile(tpot_ms, 0.99)),
            "attainment": float(self.met[counted].mean()),
            "completed": int(chosen.sum()),
        }


def differences(real: Mapping[str, float], virtual: Mapping[str, float]) -> dict[str, float]:
    """Virtual against real: relative for times, absolute for attainment."""
    times = {name: virtual[name] / real[name] - 1 for name in real if name.endswith("_ms")}
    return {**times, "attainment": virtual["attainment"] - real["attainment"]}


def within(difference: Mapping[str, float]) -> bool:
    """Whether the target is met."""
    return all(abs(difference[name]) <= TARGET for name in JUDGED)


@dataclass(frozen=True, slots=True, eq=False)
class Compared:
    """`virtual` has the step times that the node measured at its start, `as_fast` those of the run itself."""

    workload: Workload
    served: Served
    real: Side
    virtual: Side
    as_fast: Side
    counted: Flags
    preempted: int  # of the twin

    @classmethod
    def of(cls, twin: Twin, workload: Workload, served: Served, seed: int) -> Compared:
        """Simulate what was served."""
        real = Side.of_client(workload, twin.promises(workload), served.sent)
        out = twin.serve(workload, seed)
        preempted = int(out.world.rows["preempted"].sum())
        virtual = Side.of_twin(out, twin.latency_s)
        slowdown = served.facts()["step_over_predicted"]  # of whole turns of the node, so with its host time
        at_run_speed = replace(twin, slowdown=slowdown, host_s=0.0).serve(workload, seed)
        as_fast = Side.of_twin(at_run_speed, twin.latency_s)
        return cls(workload, served, real, virtual, as_fast, out.counted, preempted)

    def row(self) -> dict[str, Any]:
        """What the table and the JSON tell."""
        real, virtual, as_fast = (one.figures(self.counted) for one in (self.real, self.virtual, self.as_fast))
        apart, as_fast_apart = differences(real, virtual), differences(real, as_fast)
        late_ms = np.array([one.late_s for one in self.served.sent]) * 1e3
        errors = [one.error for one in self.served.sent if one.error is not None]
        return {
            "rate_per_s": self.workload.rate_per_s,
            "requests": len(self.workload),
            "counted": int(self.counted.sum()),
            "real": real,
            "virtual": virtual,
            "difference": apart,
            "within_target": within(apart),
            "at_run_speed": {
                "virtual": as_fast,
                "difference": as_fast_apart,
                "within_target": within(as_fast_apart),
            },
            "node": self.served.facts(),
            "virtual_preempted": self.preempted,
            "admitted_at_once": sum(one.verdict == "admitted" for one in self.served.sent),
            "errors": len(errors),
            "error_samples": errors[:ERROR_SAMPLES],
            "client_late_ms": {
                "p50": float(np.median(late_ms)),
                "p99": float(np.quantile(late_ms, 0.99)),
                "most": float(late_ms.max()),
            },
        }


def write_series(compared: Sequence[Compared], path: Path) -> None:
    """A row per request with all sides in it, as CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = ("real", "virtual", "as_fast")
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        of_sides = [f"{name}_{what}" for name in names for what in ("ttft_s", "tpot_s", "met")]
        of_requests = ("rate_per_s", "arrival_s", "in_tokens", "out_tokens", "counted", "verdict", "late_s")
        writer.writerow([*of_requests, *of_sides])
        for one in compared:
            work = one.workload
            for i, sent in enumerate(one.served.sent):
                known = [f"{work.rate_per_s:.4f}", f"{work.arrival_s[i]:.6f}", work.prompt_tokens[i]]
                known += [work.output_tokens[i], int(one.counted[i]), sent.verdict, f"{sent.late_s:.6f}"]
                for name in names:
                    side: Side = getattr(one, name)
                    known += [f"{side.ttft_s[i]:.6f}", f"{side.tpot_s[i]:.6f}", int(side.met[i])]
                writer.writerow(known)
