"""Timing in turns: the order of candidates, a rest before each timed call, and the spread of what was measured.

Not here: what is timed (latency.py, throughput.py, cold_start.py).
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from pqcad_qat.report.record import Timing

WARM_UP = 3
"""Number of untimed calls of each candidate before the first timed one."""

REST_S = 0.02
"""Rest before each timed call, in seconds.

Why: after a call, torch's OpenMP worker keeps spinning for 4 ms and OpenVINO's TBB worker for 1 ms, measured as
processor time that is spent while the main thread sleeps. That is longer than a whole INT8 sampling step. The workers
count their spins, so a CPU with a slower pause instruction takes about three times as long.
"""


def time_interleaved(candidates: Mapping[str, Callable[[], object]], runs: int, warmup: int) -> dict[str, Timing]:
    """Time every candidate ``runs`` times, in turns, so that a slow minute of the machine affects all of them alike.

    The order rotates from round to round, and runs backwards in every second rotation. Before each timed call come a
    rest of REST_S and an untimed call of the same candidate. During the rest the threads of the previous candidate fall
    asleep. The untimed call fills the caches with the candidate's weights, as they are filled inside a sampler.

    Raises:
        ValueError: runs < 1 or warmup < 0.
    """
    if runs < 1 or warmup < 0:
        raise ValueError(f"runs, warmup: got {runs} and {warmup}; allowed at least 1 and at least 0")
    for call in candidates.values():
        for _ in range(warmup):
            call()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for turn in range(runs):
            for name in turn_order(tuple(candidates), turn):
                seconds[name].append(_time_settled(candidates[name]))
    finally:
        if collecting:
            gc.enable()
    return {name: timing(values) for name, values in seconds.items()}


def turn_order(names: Sequence[str], turn: int) -> tuple[str, ...]:
    """The order of one round: rotated by one in each round.

    After each full rotation the direction is reversed, so that neighbours change sides.
    """
    lap, shift = divmod(turn, max(1, len(names)))
    order = (*names[shift:], *names[:shift])
    return order[::-1] if lap % 2 else order


def timing(seconds: Sequence[float]) -> Timing:
    """Median, minimum and quartiles (linear interpolation) of repeated runs in milliseconds, from their `seconds`."""
    lower, median, upper = (float(q) * 1e3 for q in np.percentile(seconds, (25, 50, 75)))
    return Timing(median, min(seconds) * 1e3, lower, upper, len(seconds))


def _time_settled(call: Callable[[], object]) -> float:
    """Seconds of one call, after a rest and an untimed call."""
    time.sleep(REST_S)
    call()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
