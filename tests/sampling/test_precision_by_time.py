"""Which network computes a sampling step, by its time.

Not here: how many steps full precision computes (stages/test_float_steps.py).
"""

from __future__ import annotations

import numpy as np
import pytest
from tiny_runs import SCHEDULER

from pqcad_qat.sampling.precision_by_time import NO_FLOAT_STEPS, StepsInFloat, by_time, float_from, float_steps
from pqcad_qat.sampling.trajectory import landing, noise_schedule

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
    schedule = noise_schedule(SCHEDULER)
    call = by_time(
        lambda x, t, condition: x + condition["y"], lambda x, t, condition: -x, schedule, StepsInFloat(600.0)
    )
    x = np.ones(2)
    found = [call(x, t, {"y": 1})[0] for t in (900.0, 600.0, 599.0, 300.0)]
    assert found == [2.0, 2.0, -1.0, -1.0]


def test_full_precisions_steps_along_a_walk_are_counted_by_their_parts() -> None:
    in_float = StepsInFloat(600.0, ((900.0, 800.0, 700.0, 600.0),))
    assert in_float.walk(WALK) == ((900.0, 800.0), (800.0, 700.0), (700.0, 600.0), (600.0, 300.0))
    assert StepsInFloat().walk(WALK) == ()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("clips", [False, True])
def test_one_step_of_the_sampler_lands_where_the_parts_of_a_step_land(prediction: str, clips: bool) -> None:
    """Where a net asks for a picture beyond the bounds, a clipped step turns back, and the plain inverse fails."""
    schedule = noise_schedule(
        {**SCHEDULER, "beta_schedule": "linear", "prediction_type": prediction, "clip_sample": clips}
    )
    walk, parts = schedule.walk(10), schedule.walk(20)
    x_t = np.random.default_rng(0).standard_normal((2, 1, 8, 8))
    steps = StepsInFloat(walk[0][0], ((walk[0][0], parts[1][0], walk[0][1]),))

    def full(x: np.ndarray, t: float, _: object) -> np.ndarray:
        return np.tanh(x) * (1.5 if t > parts[1][0] else 0.4)

    call = by_time(full, lambda x, t, _: x, schedule, steps)
    found = schedule.step(call(x_t, walk[0][0], {}), x_t, *walk[0])
    expected = landing(parts[:2], lambda x, t: full(x, t, None), x_t, schedule)
    np.testing.assert_allclose(found, expected, atol=1e-9)
    one_step = schedule.step(full(x_t, walk[0][0], None), x_t, *walk[0])
    assert np.abs(one_step - expected).max() > 1e-3
