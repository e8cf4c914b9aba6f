"""The decision of progressive quantization, without a model: its moving averages, its pace and its deadline.

Not here: the callback that applies it (test_bit_schedule.py).
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from pqcad_qat.training.transition_decision import (
    BitScheduleSettings,
    LossMomentum,
    Momentum,
    even_distance,
    next_pace,
    paced_distance,
)

SETTINGS = BitScheduleSettings(momentum=0.9, perturbation=0.01, loss_rise=0.05, deadline=120)


def test_momentum_is_adams_bias_corrected_average() -> None:
    momentum = Momentum(0.9)
    assert momentum.value is None
    values = [3.0, -1.0, 2.0]
    for value in values:
        momentum = momentum.updated(value)
    weights = [0.1 * 0.9 ** (2 - i) for i in range(3)]
    assert momentum.value == pytest.approx(sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights))


def test_loss_momentum_of_a_geometric_loss_tends_to_its_rate() -> None:
    momentum = LossMomentum.fresh(0.9)
    for n in range(400):
        momentum = momentum.updated(0.97**n)
    assert momentum.improvement.value == pytest.approx(0.03, rel=1e-3)


def test_loss_momentum_of_a_constant_loss_is_zero() -> None:
    momentum = LossMomentum.fresh(0.9)
    for _ in range(5):
        momentum = momentum.updated(2.0)
    assert momentum.improvement.value == pytest.approx(0.0, abs=1e-12)


def test_the_pace_grows_to_its_bound_along_its_closed_form() -> None:
    pace = 0.0
    for step in range(1, 60):
        pace = next_pace(pace, None, SETTINGS)
        assert pace == pytest.approx(0.01 * (1 - 0.9**step))


@pytest.mark.parametrize(
    ("loss_momentum", "after"),
    [(None, 0.0055), (0.2, 0.0055), (-0.04, 0.0055), (-0.06, 0.0045)],
    ids=["no loss yet", "falling", "rising slowly", "rising fast"],
)
def test_the_pace_falls_while_the_loss_rises_faster_than_its_bound(loss_momentum: float | None, after: float) -> None:
    assert next_pace(0.005, loss_momentum, SETTINGS) == pytest.approx(after)


def test_without_momentum_the_pace_is_its_bound_or_nothing_at_once() -> None:
    settings = replace(SETTINGS, momentum=0.0)
    assert next_pace(0.0, 0.1, settings) == 0.01
    assert next_pace(0.01, -0.1, settings) == 0.0


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
