"""Cold start: the time from the start of a process to its first image, and the largest memory of that process.

What it reads is in the page cache. Not here: what the process does (first_image.py), and how long a folder takes to
load in each of its formats (load_time.py).
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from pqcad_qat.errors import DiedError
from pqcad_qat.machine.own_process import run_apart
from pqcad_qat.report.benchmark_record import ColdStart, ColdStarts
from pqcad_qat.timing.baseline_trials import Inputs
from pqcad_qat.timing.first_image import INPUTS, RESULT, first_image
from pqcad_qat.timing.turns import timing, turn_order

Graph = tuple[Path, Mapping[str, str], int]
"""What `read_source` reads, the OpenVINO properties that it is compiled with, and how often an image calls it."""


def cold_starts(images: Mapping[str, Sequence[Graph]], inputs: Inputs, runs: int) -> ColdStarts:
    """Start every candidate `runs` times, in turns, each time in a process of its own.

    Args:
        images: candidate -> the graphs that make an image.
        inputs: inputs of every call.
        runs: number of starts of each candidate.
    """
    seconds: dict[str, list[float]] = {name: [] for name in images}
    peaks: dict[str, int] = dict.fromkeys(images, 0)
    died: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        np.savez(folder / INPUTS, **dict(inputs))  # type: ignore[arg-type]
        for turn in range(runs):
            for name in turn_order(tuple(images), turn):
                if name in died:
                    continue
                graphs = [(str(source), dict(properties), count) for source, properties, count in images[name]]
                try:
                    run_apart(first_image, time.time(), str(folder), graphs)
                except DiedError as error:
                    died[name] = str(error)
                    continue
                found = json.loads((folder / RESULT).read_bytes())
                seconds[name].append(found["seconds"])
                peaks[name] = max(peaks[name], found["peak_bytes"])
    kept = [name for name in images if name not in died]
    rows = tuple(ColdStart(name, timing(seconds[name]), peaks[name]) for name in kept)
    return ColdStarts(len(inputs["sample"]), rows, died)
