"""Every test, in half the time: `python -m tests`.

Those that start engines and clusters come one after another, and are shown as they come: much of their time is
waiting. Those that only compute run beside them on what the cores have left, and are shown at the end.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

PYTEST = [sys.executable, "-m", "pytest", "-q"]
ENGINES = [*PYTEST, "-m", "engines"]
REST = [*PYTEST, "-m", "not engines", "--numprocesses", "auto", "--maxprocesses", "8"]
# Compiles once what every process would compile for itself, where nobody has yet.
NICENESS = 10  # a tenth of a core is left to it where the others want all: some of its tests wait for answers
SIMULATE = ["simulate", "--scenario", "chatbot", "--rate", "2", "--replicas", "2", "--duration-s", "10"]
COMPILE = [sys.executable, "-c", "from coordinator.cli import main; main()", *SIMULATE]


def main() -> int:
    """The worse of the two exit codes."""
    with tempfile.TemporaryFile() as said:
        rest = subprocess.Popen(
            [sys.executable, "-c", "import tests.__main__ as tests; tests.run_rest()"],
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            print(f"{' '.join(REST[1:])}: beside the tests below, shown after them", flush=True)
            print(" ".join(ENGINES[1:]), flush=True)
            engines = subprocess.run(ENGINES, check=False).returncode
            rest.wait()
        except BaseException:
            os.killpg(rest.pid, signal.SIGTERM)
            raise
        said.seek(0)
        print(" ".join(REST[1:]), flush=True)
        sys.stdout.buffer.write(said.read())
    return max(engines, rest.returncode, key=abs)


def run_rest() -> None:
    """Become the run of those that only compute, which gives way to everything else."""
    os.nice(NICENESS)
    with contextlib.suppress(
        OSError
    ):  # of two sessions Linux gives each its half, unless one is told otherwise
        Path("/proc/self/autogroup").write_text(str(NICENESS), encoding="ascii")
    subprocess.run(COMPILE, stdout=subprocess.DEVNULL, check=False)
    os.execv(REST[0], REST)


if __name__ == "__main__":
    sys.exit(main())
