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


def main() -> int:
    """The worse of the two exit codes."""
    with tempfile.TemporaryFile() as said:
        rest = subprocess.Popen(
            REST, stdout=said, stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=_step_back
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


def _step_back() -> None:
    """Of two sessions Linux gives each its half, unless one is told otherwise."""
    os.nice(19)
    with contextlib.suppress(OSError):
        Path("/proc/self/autogroup").write_text("19", encoding="ascii")


if __name__ == "__main__":
    sys.exit(main())
