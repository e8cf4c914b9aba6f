"""Load time of a deployed folder until it can predict, by format of its weights on disk.

Not here: the time of a prediction (latency.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import openvino as ov

from pqcad_qat.report.benchmark_record import LoadTime
from pqcad_qat.serving.compiled_graph import compile_graph
from pqcad_qat.serving.denoiser_graphs import read_graph
from pqcad_qat.serving.deployed_folder import copy_folder, read_manifest
from pqcad_qat.serving.packing import WeightFormat
from pqcad_qat.timing.latency import size_bytes
from pqcad_qat.timing.turns import timing

Result = TypeVar("Result")
"""Result of a timed call."""

FORMATS: tuple[WeightFormat, ...] = ("int8", "packed")
"""Formats of the weights that are compared."""


def load_times(folder: Path, temporary: Path, runs: int) -> tuple[LoadTime, ...]:
    """Time loading with plain int8 and with packed weights, in turns; both folders are first written below `temporary`.

    Raises:
        ModelError: the folder is damaged.
    """
    folders = {name: temporary / name for name in FORMATS}
    for name in FORMATS:
        copy_folder(folder, folders[name], name)
    seconds: dict[WeightFormat, list[tuple[float, float, float]]] = {name: [] for name in FORMATS}
    for turn in range(runs):
        for name in FORMATS if turn % 2 else FORMATS[::-1]:
            seconds[name].append(_load(folders[name]))
    times = []
    for name, rows in seconds.items():
        verify, read, compiling = (timing(column) for column in zip(*rows, strict=True))
        times.append(LoadTime(name, size_bytes(folders[name]), verify, read, compiling))
    return tuple(times)


def _load(folder: Path) -> tuple[float, float, float]:
    """Seconds of verifying, reading and compiling, as our runtime does them."""
    core = ov.Core()
    verify, _ = _timed(lambda: read_manifest(folder))
    read, graph = _timed(lambda: read_graph(folder, core))
    compiling, _ = _timed(lambda: compile_graph(graph, core))
    return verify, read, compiling


def _timed(call: Callable[[], Result]) -> tuple[float, Result]:
    """Seconds of a call, and its result."""
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result
