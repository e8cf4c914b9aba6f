"""The decision of progressive quantization, without a model: its pace and its deadline.

Not here: the callback that applies it (test_bit_schedule.py).
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from pqcad_qat.training.transition_decision import (
    BitScheduleSettings,
    even_distance,
    next_pace,
    paced_distance,
)

SETTINGS = BitScheduleSettings(momentum=0.9, perturbation=0.01, deadline=120)


def test_the_pace_grows_to_its_bound_along_its_closed_form() -> None:
    pace = 0.0
    for step in range(1, 60):
        pace = next_pace(pace, SETTINGS)
        assert pace == pytest.approx(0.01 * (1 - 0.9**step))


def test_without_momentum_the_pace_is_its_bound_at_once() -> None:
    assert next_pace(0.0, replace(SETTINGS, momentum=0.0)) == 0.01


def test_a_layer_moves_so_far_that_its_weights_change_by_the_pace() -> None:
    for perturbation in (0.02, 0.1, 0.4):
        assert paced_distance(0.01, perturbation, SETTINGS) * perturbation == pytest.approx(0.01)


def test_a_rung_that_changes_less_than_the_pace_is_passed_in_one_step() -> None:
    assert paced_distance(0.01, 0.004, SETTINGS) == 1.0
    assert paced_distance(0.0, 0.0, SETTINGS) == 1.0


def test_a_fixed_schedule_has_no_pace() -> None:
    assert paced_distance(0.01, 0.004, replace(SETTINGS, fixed=True)) == 0.0


@pytest.mark.parametrize("deadline", [0, 1, 2, 7, 40])
@pytest.mark.parametrize("rungs", [1, 2, 5])
def test_even_distances_add_up_to_all_rungs_by_the_deadline(deadline: int, rungs: int) -> None:
    settings, left, moved = replace(SETTINGS, deadline=deadline), float(rungs), []
    for step in range(max(1, deadline)):
        moved.append(even_distance(left, step, settings))
        left -= moved[-1]
    assert left == pytest.approx(0.0, abs=1e-9)
    assert max(moved) == pytest.approx(min(moved))


def test_after_the_deadline_everything_that_is_left_is_moved_at_once() -> None:
    assert even_distance(2.5, SETTINGS.deadline + 9, SETTINGS) == 2.5
