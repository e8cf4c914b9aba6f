"""Which network computes a sampling step, by its time.

Not here: how many steps full precision computes (stages/test_float_steps.py).
"""

from __future__ import annotations

import numpy as np
import pytest

from pqcad_qat.sampling.precision_by_time import NO_FLOAT_STEPS, by_time, float_from, float_steps

WALK = ((900.0, 600.0), (600.0, 300.0), (300.0, -1.0))


@pytest.mark.parametrize("count", range(4))
def test_as_many_steps_are_in_float_as_the_time_was_made_for(count: int) -> None:
    assert float_steps(WALK, float_from(WALK, count)) == count


def test_no_float_step_is_no_time() -> None:
    assert float_from(WALK, 0) == NO_FLOAT_STEPS


@pytest.mark.parametrize(("count", "students"), [(0, 0), (1, 1), (2, 1), (3, 2)])
def test_a_student_that_visits_every_second_time_takes_half_of_the_float_steps(count: int, students: int) -> None:
    teacher = tuple((float(t), float(t - 100)) for t in range(900, 0, -100))
    assert float_steps(teacher[::2], float_from(teacher, count)) == students


def test_the_time_decides_which_network_is_called() -> None:
    call = by_time(lambda x, t, condition: x + condition["y"], lambda x, t, condition: -x, 600.0)
    x = np.ones(2)
    found = [call(x, t, {"y": 1})[0] for t in (900.0, 600.0, 599.0, 300.0)]
    assert found == [2.0, 2.0, -1.0, -1.0]
