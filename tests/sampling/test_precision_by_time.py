"""Which network computes a sampling step, by its time.

Not here: how many steps full precision computes (stages/test_float_steps.py).
"""

from __future__ import annotations

import numpy as np
import pytest
from tiny_runs import SCHEDULER

from pqcad_qat.sampling.ddim import split_prediction
from pqcad_qat.sampling.precision_by_time import (
    NO_FLOAT_STEPS,
    StepsInFloat,
    are_stops,
    by_time,
    float_from,
    float_steps,
)
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


def test_full_precisions_calls_along_a_walk_are_counted_by_the_parts_of_its_steps() -> None:
    in_float = StepsInFloat(600.0, ((900, 800, 700, 600),))
    assert in_float.calls(WALK) == 4
    assert in_float.calls(((900.0, 750.0), (750.0, 600.0), (600.0, -1.0))) == 3  # makes no such step
    assert StepsInFloat().calls(WALK) == 0


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("factor", [2, 4])
def test_one_step_of_the_sampler_lands_where_the_parts_of_a_step_land(
    prediction: str, spacing: str, factor: int
) -> None:
    schedule = noise_schedule(
        {**SCHEDULER, "beta_schedule": "linear", "prediction_type": prediction, "timestep_spacing": spacing}
    )
    step = schedule.walk(5)[0]
    parts = schedule.finer((step,), factor)[0]
    assert len(parts) == factor
    x_t = np.random.default_rng(0).standard_normal((2, 1, 8, 8))
    in_float = StepsInFloat(step[0], (tuple(int(t) for t in (parts[0][0], *(end for _, end in parts))),))

    def full(x: np.ndarray, t: float, _: object) -> np.ndarray:
        return np.tanh(x) * (1.5 if t > parts[0][1] else 0.4)

    call = by_time(full, lambda x, t, _: x, schedule, in_float)
    found = schedule.step(call(x_t, step[0], {}), x_t, *step)
    expected = landing(parts, lambda x, t: full(x, t, None), x_t, schedule)
    np.testing.assert_allclose(found, expected, atol=1e-9)
    one_step = schedule.step(full(x_t, step[0], None), x_t, *step)
    assert np.abs(one_step - expected).max() > 1e-3


@pytest.mark.parametrize("zero_terminal", [False, True])
def test_where_the_sampler_clips_it_lands_near_and_no_prediction_asks_for_more_than_the_bound(
    zero_terminal: bool,
) -> None:
    """A sampler that does not clip then reads the same picture."""
    config = {**SCHEDULER, "prediction_type": "v_prediction", "clip_sample": True, "clip_sample_range": 1.0}
    schedule = noise_schedule({**config, "rescale_betas_zero_snr": zero_terminal})
    step, x_t = schedule.walk(5)[0], np.random.default_rng(0).standard_normal((2, 1, 8, 8))
    x_s = schedule.step(-1.2 * np.tanh(3 * x_t), x_t, *step) + 0.05
    prediction = schedule.prediction_to(x_t, x_s, *step)
    x_0, _ = split_prediction(prediction, x_t, schedule.alpha_bar_at(step[0]), "v_prediction")
    assert np.abs(x_0).max() <= 1 + 1e-9
    off = np.abs(schedule.step(prediction, x_t, *step) - x_s)
    assert off.max() < 0.1
    assert (off < 1e-9).mean() > 0.3


@pytest.mark.parametrize(
    ("value", "valid"),
    [
        ([], True),
        ([[999, 949, 899]], True),
        ([[999, 899]], False),
        ([[]], False),
        ([[899, 949, 999]], False),
        ([[999, 949.5, 899]], False),
        ([["999", "949", "899"]], False),
        ([[999, 949, -1]], False),
        ([[True, False, 0]], False),
        ({"999": 949}, False),
        (None, False),
    ],
)
def test_stops_of_a_file_are_lists_of_falling_whole_times(value: object, valid: bool) -> None:
    assert are_stops(value) is valid
