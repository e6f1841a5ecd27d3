"""What all tests share."""

from __future__ import annotations

from hypothesis import settings

# Speed is shown in benchmarks: on a busy machine a slow example is no failure.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
