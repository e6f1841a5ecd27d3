"""The command line: one small file per group of verbs; each is imported when it is called."""

from coordinator.cli.main import main

__all__ = ["main"]
