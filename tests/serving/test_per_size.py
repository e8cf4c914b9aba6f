"""What is made for each size: once, without keeping other sizes waiting, and not for ever."""

from __future__ import annotations

import threading
from collections import Counter

import pytest

from pqcad_qat.serving.per_size import KEPT, PerSize


def test_each_size_is_made_once_and_the_oldest_goes_but_never_the_own_one() -> None:
    made: Counter[tuple[int, int]] = Counter()
    sizes = PerSize(lambda size: made.update([size]) or size, own=(8, 8))
    for side in (8, *range(10, 10 + KEPT + 1)):
        assert sizes.at((side, 8)) == (side, 8)
        assert sizes.at((side, 8)) == (side, 8)
    assert set(made.values()) == {1}
    sizes.at((8, 8))
    sizes.at((10 + KEPT, 8))
    assert set(made.values()) == {1}
    sizes.at((10, 8))  # was dropped
    assert made[10, 8] == 2


def test_a_size_that_is_there_does_not_wait_for_one_that_is_made() -> None:
    begun, end = threading.Event(), threading.Event()

    def make(size: tuple[int, int]) -> int:
        if size == (2, 2):
            begun.set()
            assert end.wait(30)
        return size[0]

    sizes = PerSize(make)
    sizes.at((1, 1))
    slow = threading.Thread(target=sizes.at, args=((2, 2),))
    slow.start()
    assert begun.wait(30)
    assert sizes.at((1, 1)) == 1  # while the other one is being made
    end.set()
    slow.join(30)
    assert not slow.is_alive()


def test_a_failure_is_told_and_tried_again() -> None:
    tried: list[int] = []

    def make(size: tuple[int, int]) -> str:
        tried.append(size[0])
        if len(tried) == 1:
            raise ValueError("no")
        return "made"

    sizes = PerSize(make)
    with pytest.raises(ValueError, match="no"):
        sizes.at((1, 1))
    assert (sizes.at((1, 1)), tried) == ("made", [1, 1])
