"""A coordinator or an endpoint that ends on its own is started again.

What lives where the work is outlasts both: a new coordinator asks the nodes, a new endpoint the coordinator. In
the foreground `slosserve up` does this; a detached cluster has a process for it: `python -m coordinator.keeper
RUN_DIR`. Ray is not started again: with it the nodes are gone.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from coordinator.cluster_process import ClusterProcess
from coordinator.run_state import COORDINATOR, ENDPOINT, KEEPER
from engine.errors import EngineError, SlosserveError

LOOK_EVERY_S = 0.5
MOST_RESTARTS, WITHIN_S = 3, 60.0  # of all of them: what ends at once again is not helped by another start


@dataclass(slots=True)
class Keeper:
    """Keeps the processes of a cluster running. `say` is told what was started again."""

    cluster: ClusterProcess
    say: Callable[[str], None]
    _restarts_s: deque[float] = field(default_factory=deque)

    def keep(self) -> None:
        """For ever. Raises EngineError when something ends that is not to be started again, or not any more."""
        while True:
            self.look()
            time.sleep(LOOK_EVERY_S)

    def look(self) -> None:
        """Start again what has ended since."""
        for label, log in self.cluster.ended().items():
            if label == KEEPER:
                continue
            told = f"the {label} process ended on its own. The last lines of its log:\n{log}"
            if label != COORDINATOR and not label.startswith(ENDPOINT):
                raise EngineError(told)
            now_s = time.monotonic()
            while self._restarts_s and now_s - self._restarts_s[0] > WITHIN_S:
                self._restarts_s.popleft()
            if len(self._restarts_s) >= MOST_RESTARTS:
                many = f"{MOST_RESTARTS} were started again within the last {WITHIN_S:.0f} s"
                raise EngineError(f"{told}\nIt is not started again: {many}.")
            self._restarts_s.append(now_s)
            self.say(f"{told}\nIt is started again.")
            self.cluster.restart(label)
            self.say(f"{label} is back.")


def main() -> None:
    """Keep the cluster of a run directory, until it is stopped."""
    try:
        Keeper(_cluster(Path(sys.argv[1])), _print).keep()
    except SlosserveError as error:
        _print(f"{error}\nNothing is started again from now on.")
        sys.exit(1)


def _cluster(run_dir: Path) -> ClusterProcess:
    """The one that this process was started for, once it is written down that it was."""
    until_s = time.monotonic() + 10.0
    while KEEPER not in (cluster := ClusterProcess.of_run(run_dir)).pids and time.monotonic() < until_s:
        time.sleep(LOOK_EVERY_S / 10)
    return cluster


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
