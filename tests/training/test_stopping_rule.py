"""When a stage of `steps: auto` ends: closed forms of the rule, without any training.

Not here: measuring and the stage itself (test_held_out.py).
"""

from __future__ import annotations

from itertools import accumulate, repeat

import pytest

from pqcad_qat.training.stage_end import Ending
from pqcad_qat.training.stopping_rule import (
    EVERY,
    OBSERVATIONS,
    PLATEAU,
    SHORTEST_DECAY,
    Budget,
    Progress,
    decay_steps,
    ending,
)


def losses_that_fall_by(share: float) -> list[float]:
    return list(accumulate(repeat(1.0 - share, 200), lambda loss, factor: loss * factor, initial=1.0))


def walked(
    losses: list[float], budget: Budget, settled_at: int = 0, *, per_step: float = 0.0, before: float = 0.0
) -> Ending | None:
    """The end that these losses lead to, one measurement at every decision after the first."""
    progress = Progress()
    for index in range(len(losses)):
        step = index * EVERY
        progress = progress.updated(step, losses[index - 1] if index else None, settled=step >= settled_at)
        end = ending(step, progress, budget, before + per_step * step, before=before)
        if end is not None:
            return end
    return None


def test_a_stage_goes_on_while_the_loss_falls_and_ends_once_it_does_not() -> None:
    budget = Budget(10**6)
    assert walked(losses_that_fall_by(2 * PLATEAU), budget) is None
    end = walked(losses_that_fall_by(PLATEAU / 4), budget)
    assert end is not None
    assert (end.decay_from, end.cause) == (OBSERVATIONS * EVERY, "plateau")
    assert end.last == end.decay_from + max(SHORTEST_DECAY, end.decay_from // 2)


def test_one_measurement_by_chance_ends_nothing() -> None:
    falling = losses_that_fall_by(PLATEAU)[:30]
    falling[12] *= 1.1
    assert walked(falling, Budget(10**6)) is None


@pytest.mark.parametrize(("power", "ends"), [(0.2, False), (0.03, True)])
def test_a_slow_loss_is_judged_over_as_many_steps_as_it_takes(power: float, ends: bool) -> None:
    """A loss that falls with a power of the steps improves by the same share from quarter to quarter."""
    slow = [(index + 1) ** -power for index in range(400)]
    assert slow[200] / slow[201] < 1.002
    assert (walked(slow, Budget(10**6)) is not None) == ends


@pytest.mark.parametrize("steps", [1, 25, 37, 100, 2000])
def test_a_cap_in_steps_is_met_with_a_decay_before_it(steps: int) -> None:
    end = walked(losses_that_fall_by(2 * PLATEAU), Budget(steps))
    assert end is not None
    assert (end.last, end.cause) == (steps, "max_steps")
    length = steps - end.decay_from
    assert end.decay_from == 0 or decay_steps(end.decay_from) <= length <= decay_steps(end.decay_from) + 2 * EVERY


@pytest.mark.parametrize("seconds", [30.0, 100.0, 1000.0])
@pytest.mark.parametrize("before", [0.0, 300.0])
def test_a_cap_in_seconds_is_met_by_steps_of_the_speed_so_far(seconds: float, before: float) -> None:
    """Whatever has passed before the first step, such as trials of learning rates, says nothing of a step's length."""
    end = walked(losses_that_fall_by(2 * PLATEAU), Budget(10**6, before + seconds), per_step=0.5, before=before)
    assert end is not None
    assert end.cause == "minutes"
    assert 0.5 * end.last <= seconds
    assert 0.5 * (end.last + 2 * EVERY) > seconds - 0.5 * EVERY


def test_a_stage_without_time_left_makes_the_fewest_steps() -> None:
    end = walked(losses_that_fall_by(2 * PLATEAU), Budget(10**6, 100.0), per_step=0.5, before=120.0)
    assert end == Ending(0, SHORTEST_DECAY, "minutes")


def test_at_least_half_of_the_steps_are_made_at_the_target_widths() -> None:
    flat = losses_that_fall_by(0.0)
    for settled_at in (0, 40, 100, 300):
        end = walked(flat, Budget(10**6), settled_at)
        assert end is not None
        assert end.cause == "plateau"
        assert end.last >= 2 * settled_at


def test_a_walk_that_is_under_way_is_not_cut_off_by_the_clock_and_forgets_its_losses() -> None:
    budget = Budget(10**6, 1.0)
    end = walked(losses_that_fall_by(2 * PLATEAU), budget, settled_at=60, per_step=1.0)
    assert end is not None
    assert (end.decay_from, end.cause) == (60, "minutes")
    progress = Progress().updated(10, 1.0, settled=True).updated(20, 1.0, settled=True)
    assert progress.losses == (1.0, 1.0)
    assert progress.updated(30, 1.0, settled=False) == Progress()
