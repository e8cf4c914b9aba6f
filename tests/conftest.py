"""How the tests are divided among processes, and what every process that runs tests does with its memory and fixtures.

Not here: any test, or the fixtures themselves (support/shared_fixtures.py).
"""

from __future__ import annotations

import gc
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadFileScheduling

REPOSITORY = Path(__file__).resolve().parents[1]

SHARED = (r"\btiny_run: ", r"\bfloat_pipeline\(", r"\bshipped_run\(", r"\bdeployed_unet\(")
"""What makes a test file use things that are made once in a process, for several files."""


def pytest_configure(config: pytest.Config) -> None:
    """Load the fixtures that all tests share, but not in a process that only divides tests among others: they import
    everything.
    """
    if hasattr(config, "workerinput") or config.getoption("dist", "no") == "no":
        config.pluginmanager.import_plugin("shared_fixtures")


class _FilesThatShare(LoadFileScheduling):
    """Scheduling of xdist that leaves a file to one process, and all files that share something to the same."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return _shared(REPOSITORY / file) or file


@cache
def _shared(file: Path) -> str:
    """Return which of `SHARED` a file matches; the empty string for none."""
    text = file.read_text(encoding="utf-8")
    return next((pattern for pattern in SHARED if re.search(pattern, text)), "")


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    return _FilesThatShare(config, log) if config.getoption("dist") == "loadfile" else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Among several processes, begin with what takes longest, so that all end at the same time: files that share
    something, and whole runs.
    """
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: (not _shared(item.path), item.path.parent.name != "whole_runs"))


def pytest_collection_finish() -> None:
    """Leave what is imported by now out of every garbage collection: a tenth of the tests' time went into walks over
    the modules of torch and diffusers.
    """
    gc.freeze()


def pytest_unconfigure() -> None:
    """Let the interpreter's end collect everything: triton would tell of leaks otherwise."""
    gc.unfreeze()
