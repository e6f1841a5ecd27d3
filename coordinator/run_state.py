"""What a running cluster leaves on disk, so that `down` and `status` find it from another terminal."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

import msgspec

from coordinator.process_tree import ProcessId, is_alive
from engine.errors import ConfigError
from engine.models import cache_directory

STATE_FILE = "state.json"
# Labels of processes; endpoints are endpoint-0, endpoint-1, ...
COORDINATOR = "coordinator"
ENDPOINT = "endpoint-"
KEEPER = "keeper"
RAY = "ray"


@dataclass(frozen=True, slots=True)
class RunState:
    """One run. `run_id` marks its processes; `owner` is the foreground `up`, None for a detached cluster.

    `processes`: those started, by label, first to last. `ray_folder`: temporary folder of a Ray of our own.
    """

    name: str
    run_id: str
    owner: ProcessId | None = None
    processes: dict[str, ProcessId] = field(default_factory=dict)
    urls: list[str] = field(default_factory=list)
    ports: list[int] = field(default_factory=list)
    ray_address: str | None = None
    ray_folder: str | None = None

    @property
    def running(self) -> bool:
        """Whether anything of it is still alive."""
        everyone = [*self.processes.values(), *([self.owner] if self.owner else [])]
        return any(is_alive(process) for process in everyone)

    def write(self, run_dir: Path) -> None:
        """Replace the state file in one step: a reader sees the old one or the new one."""
        draft = run_dir / f"{STATE_FILE}.new"
        draft.write_bytes(msgspec.json.format(msgspec.json.encode(asdict(self)), indent=1))
        draft.replace(run_dir / STATE_FILE)


def run_root() -> Path:
    """Where runs are kept: SLOSSERVE_RUN_DIR, or `run` in the cache directory."""
    named = os.environ.get("SLOSSERVE_RUN_DIR")
    return Path(named).expanduser() if named else cache_directory() / "run"


def run_directory(name: str) -> Path:
    """The folder of the cluster called `name`: resolved configuration, state and logs."""
    return run_root() / name


def read_state(run_dir: Path) -> RunState | None:
    """The state in a run directory, None if there is none. Raises ConfigError if it cannot be read."""
    path = run_dir / STATE_FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=RunState)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(
            f"{path}: not a state file of this version ({error}). End its processes by hand and remove it."
        ) from None


def known_runs() -> list[RunState]:
    """Every run that left a state file, by name."""
    states = (read_state(path.parent) for path in sorted(run_root().glob(f"*/{STATE_FILE}")))
    return [state for state in states if state is not None]


def find_run(name: str | None) -> RunState:
    """The run called `name`, or the only one that is alive. Raises ConfigError saying what there is."""
    runs = known_runs()
    found = [run for run in runs if run.name == name] if name else [run for run in runs if run.running]
    if len(found) == 1:
        return found[0]
    if found:
        raise ConfigError(
            f"several clusters run here: {', '.join(run.name for run in found)}. Choose one with --name."
        )
    wanted = f"no cluster named {name!r}" if name else "no cluster runs"
    raise ConfigError(f"{wanted} on this machine (looked in {run_root()}). Start one with `slosserve up`.")
