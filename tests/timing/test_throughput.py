"""Bursts in turns: how many calls, in which order, and what is made of their times; nothing here asserts a speed.

Not here: the latency of one call (test_latency.py).
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from small_networks import unet_config
from tiny_runs import fixed_batch_graph

from pqcad_qat.models.untrained import random_denoiser
from pqcad_qat.timing.float_graph import convert_float, example_inputs
from pqcad_qat.timing.graph_sources import FixedBatchError
from pqcad_qat.timing.latency import F32
from pqcad_qat.timing.throughput import FILLS, Load, openvino_load, throughput_in_turns, torch_load


class Clock:
    """A clock that only bursts move; each call takes a candidate's own time, and calls in flight share it."""

    def __init__(self) -> None:
        self.now = 0.0
        self.bursts: list[tuple[str, int]] = []

    def load(self, name: str, seconds: float, in_flight: int = 1) -> Load:
        def burst(calls: int) -> None:
            self.bursts.append((name, calls))
            self.now += seconds * calls / in_flight

        return Load(burst, in_flight)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("pqcad_qat.timing.throughput.time.perf_counter", lambda: made.now)
    monkeypatch.setattr("pqcad_qat.timing.throughput.time.sleep", lambda _: made.bursts.append(("rest", 0)))
    return made


def test_images_a_second_are_those_of_the_calls_in_flight_together(clock: Clock) -> None:
    found = throughput_in_turns(
        {"a": clock.load("a", 0.5), "b": clock.load("b", 0.5, in_flight=4)}, batch=8, calls=10, rounds=3
    )
    assert (found["a"].median, found["a"].maximum, found["a"].rounds) == (pytest.approx(16), pytest.approx(16), 3)
    assert found["b"].lower_quartile == found["b"].upper_quartile == pytest.approx(64)


def test_a_burst_fills_the_queue_a_whole_number_of_times(clock: Clock) -> None:
    loads = {name: clock.load(name, 1, in_flight) for name, in_flight in (("alone", 1), ("three", 3), ("many", 8))}
    found = throughput_in_turns(loads, batch=1, calls=10, rounds=1)
    assert {name: rate.calls for name, rate in found.items()} == {"alone": 10, "three": 3 * FILLS, "many": 8 * FILLS}


def test_every_timed_burst_comes_after_a_rest_and_an_untimed_fill_and_all_take_turns(clock: Clock) -> None:
    throughput_in_turns({"a": clock.load("a", 1, 2), "b": clock.load("b", 1)}, batch=1, calls=4, rounds=4)
    assert clock.bursts[::3] == [("rest", 0)] * 8
    assert [name for name, _ in clock.bursts[1::3]] == [name for name, _ in clock.bursts[2::3]]
    assert set(clock.bursts[1::3]) == {("a", 2), ("b", 1)}
    assert Counter(name for name, _ in clock.bursts[2::6]) == {"a": 2, "b": 2}  # first of a round equally often


def test_pytorch_makes_as_many_calls_as_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pqcad_qat.timing.latency.usable_cores", lambda: 1)
    denoiser, calls = random_denoiser(unet_config(), "config"), []
    denoiser.register_forward_hook(lambda *_: calls.append(1))
    load = torch_load(denoiser, example_inputs((1, 8, 8), 2))
    load.burst(3)
    assert (len(calls), load.in_flight) == (3, 1)


def test_openvino_has_as_many_calls_in_flight_as_its_throughput_mode_asks_for_and_a_fixed_batch_is_refused(
    tmp_path: Path,
) -> None:
    convert_float(random_denoiser(unet_config(), "config"), (1, 8, 8), 1, tmp_path)
    xml = tmp_path / "openvino_model.xml"
    load = openvino_load(xml, F32, example_inputs((1, 8, 8), 1))
    load.burst(2 * load.in_flight)
    compiled = ov.Core().compile_model(xml, "CPU", {"PERFORMANCE_HINT": "THROUGHPUT", **F32})
    assert load.in_flight == compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")
    with pytest.raises(FixedBatchError, match="got a batch of 3; allowed 1, which is fixed in its graph"):
        openvino_load(fixed_batch_graph(1, (1, 8, 8), tmp_path / "fixed"), F32, example_inputs((1, 8, 8), 3))


def test_quartiles_are_of_the_bursts() -> None:
    durations = iter([1.0, 2.0, 4.0, 5.0, 8.0])
    now = [0.0]

    def burst(calls: int) -> None:
        if calls > 1:
            now[0] += next(durations)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pqcad_qat.timing.throughput.time.perf_counter", lambda: now[0])
        found = throughput_in_turns({"a": Load(burst, 1)}, batch=2, calls=10, rounds=5)["a"]
    expected = np.percentile([20, 10, 5, 4, 2.5], (25, 50, 75, 100))
    assert (found.lower_quartile, found.median, found.upper_quartile, found.maximum) == pytest.approx(tuple(expected))
