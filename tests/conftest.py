"""What all tests share."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from xdist.scheduler import LoadScopeScheduling

# Speed is shown in benchmarks: on a busy machine a slow example is no failure.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

OWN_CLUSTERS = ("test_hosts", "test_start", "test_virtual")  # of the end-to-end tests


class ByWhatIsShared(LoadScopeScheduling):  # type: ignore[misc]
    """Tests that share an engine or a cluster run in one process, one after another."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::")[0]
        alone = any(f"/{name}." in file for name in OWN_CLUSTERS)
        return "the cluster" if "/e2e/" in file and not alone else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Of tests that start engines (--dist loadfile)."""
    return ByWhatIsShared(config, log) if config.getvalue("dist") == "loadfile" else None
