"""Throughput of denoisers, measured in bursts of calls: OpenVINO runs several at a time, PyTorch one after another.

The candidates take turns, burst by burst.

Not here: the latency of one call (latency.py).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import openvino as ov
from torch import nn

from pqcad_qat.report.record import Throughput
from pqcad_qat.timing.baseline_trials import Inputs
from pqcad_qat.timing.latency import compile_source, inputs_of, torch_candidate
from pqcad_qat.timing.turns import REST_S, turn_order

ROUNDS = 5
"""Number of timed bursts of each candidate."""

FILLS = 4
"""Smallest number of times that a burst fills the queue.

With enough of them the start and the end of a burst, where threads are idle, weigh little.
"""


@dataclass(frozen=True)
class Load:
    """A candidate for throughput.

    Attributes:
        burst: function that makes the given number of calls and returns when all are done.
        in_flight: number of calls that run at a time.
    """

    burst: Callable[[int], None]
    in_flight: int


def openvino_load(source: Path, config: Mapping[str, object], inputs: Inputs) -> Load:
    """A model from disk at the inputs' batch, compiled for throughput.

    OpenVINO chooses the number of streams and of simultaneous calls.

    Raises:
        ModelError: as `graph_sources.read_source`.
    """
    compiled = compile_source(source, {"PERFORMANCE_HINT": "THROUGHPUT", **config}, len(inputs["sample"]))
    queue = ov.AsyncInferQueue(compiled)
    named = inputs_of(compiled, inputs)

    def burst(calls: int) -> None:
        for _ in range(calls):
            queue.start_async(named, share_inputs=True)
        queue.wait_all()

    return Load(burst, len(queue))


def torch_load(model: nn.Module, inputs: Inputs) -> Load:
    """PyTorch's eager execution on every core, one call after another."""
    call = torch_candidate(model, inputs)

    def burst(calls: int) -> None:
        for _ in range(calls):
            call()

    return Load(burst, 1)


def throughput_in_turns(
    loads: Mapping[str, Load], batch: int, calls: int, rounds: int = ROUNDS
) -> dict[str, Throughput]:
    """Images that pass through the network in a second, with all candidates in turns.

    Args:
        loads: candidates by name.
        batch: number of images in a call.
        calls: smallest number of calls in a burst. A burst fills the queue a whole number of times, and at least FILLS
            times.
        rounds: number of timed bursts of each candidate, each after a rest and an untimed fill of the queue.
    """
    sizes = {name: load.in_flight * max(FILLS, math.ceil(calls / load.in_flight)) for name, load in loads.items()}
    rates: dict[str, list[float]] = {name: [] for name in loads}
    for turn in range(rounds):
        for name in turn_order(tuple(loads), turn):
            time.sleep(REST_S)
            loads[name].burst(loads[name].in_flight)
            start = time.perf_counter()
            loads[name].burst(sizes[name])
            rates[name].append(batch * sizes[name] / (time.perf_counter() - start))
    return {name: _throughput(values, sizes[name], loads[name].in_flight) for name, values in rates.items()}


def _throughput(rates: list[float], calls: int, in_flight: int) -> Throughput:
    lower, median, upper = (float(rate) for rate in np.percentile(rates, (25, 50, 75)))
    return Throughput(median, max(rates), lower, upper, len(rates), calls, in_flight)
