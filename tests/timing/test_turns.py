"""Timing in turns, with a clock that only the candidates move; nothing here asserts a speed."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest

from pqcad_qat.timing.turns import time_interleaved, timing, turn_order


class Clock:
    """A clock that only the candidates move."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def rest(self, seconds: float) -> None:
        assert seconds >= 0.01, "threads of the candidate before must fall asleep"
        self.calls.append("rest")

    def candidate(self, name: str, *durations: float) -> Callable[[], None]:
        remaining = list(durations)

        def call() -> None:
            self.calls.append(name)
            self.now += remaining.pop(0) if len(remaining) > 1 else remaining[0]

        return call


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("pqcad_qat.timing.turns.time.perf_counter", lambda: made.now)
    monkeypatch.setattr("pqcad_qat.timing.turns.time.sleep", made.rest)
    return made


def test_every_candidate_is_warmed_then_timed_after_a_rest_and_an_untimed_call_of_its_own(clock: Clock) -> None:
    time_interleaved({name: clock.candidate(name, 0.001) for name in "abc"}, runs=4, warmup=3)
    assert clock.calls[:9] == [*"aaabbbccc"]
    turns = clock.calls[9:]
    assert Counter(turns) == {"rest": 12, "a": 8, "b": 8, "c": 8}
    assert set(turns[::3]) == {"rest"}
    assert turns[1::3] == turns[2::3]


def test_only_the_second_call_of_a_turn_counts(clock: Clock) -> None:
    # calls: settle 9, timed 1, settle 9, timed 2, ...
    found = time_interleaved(
        {"a": clock.candidate("a", 9, 0.001, 9, 0.002, 9, 0.003, 9, 0.004, 9, 0.1)}, runs=5, warmup=0
    )["a"]
    assert found.runs == 5
    assert (found.minimum_ms, found.lower_quartile_ms, found.median_ms, found.upper_quartile_ms) == pytest.approx(
        (1, 2, 3, 4)
    )


def test_orders_rotate_so_that_each_is_first_equally_often_and_follows_each_other() -> None:
    names = ("a", "b", "c", "d")
    orders = [turn_order(names, turn) for turn in range(8)]
    assert all(sorted(order) == list(names) for order in orders)
    assert Counter(order[0] for order in orders) == dict.fromkeys(names, 2)
    followers = {pair for order in orders for pair in pairwise(order)}
    assert {("a", "b"), ("b", "a"), ("c", "d"), ("d", "c")} <= followers


def test_timing_is_numpys_percentiles_in_milliseconds() -> None:
    seconds = np.random.default_rng(0).lognormal(-6, 0.3, 37)
    found = timing(list(seconds))
    expected = np.percentile(seconds, (0, 25, 50, 75)) * 1e3
    assert (found.minimum_ms, found.lower_quartile_ms, found.median_ms, found.upper_quartile_ms) == pytest.approx(
        tuple(expected)
    )


def test_garbage_collection_is_off_while_timing_and_on_afterwards_even_on_failure() -> None:
    states = []

    def fail() -> None:
        states.append(gc.isenabled())
        raise RuntimeError

    with pytest.raises(RuntimeError):
        time_interleaved({"a": fail}, runs=1, warmup=0)
    assert states == [False]
    assert gc.isenabled()


@pytest.mark.parametrize(("runs", "warmup"), [(0, 0), (1, -1)])
def test_senseless_counts_are_refused(runs: int, warmup: int) -> None:
    with pytest.raises(ValueError, match=f"got {runs} and {warmup}"):
        time_interleaved({"a": lambda: None}, runs, warmup)
