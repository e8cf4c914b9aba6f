"""A student visits its teacher's times, the first included, and the sampler that is deployed lays exactly them: against
diffusers' DDIM.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from pqcad_qat.errors import ModelError
from pqcad_qat.sampling.ddpm_schedule import DDPMSchedule, Walk, ddpm_schedule
from pqcad_qat.sampling.trajectory import trajectory


def schedule(spacing: str, **keys: Any) -> DDPMSchedule:
    return ddpm_schedule({"timestep_spacing": spacing, "clip_sample": False, **keys})


def times(walk: Walk) -> list[float]:
    return [t for t, _ in walk]


def laid_by_diffusers(student: DDPMSchedule, steps: int) -> tuple[Any, list[int]]:
    scheduler: Any = DDIMScheduler.from_config(json.loads(json.dumps(student.config)))
    scheduler.set_timesteps(steps)
    return scheduler, scheduler.timesteps.tolist()


COUNTS = [(20, 10), (20, 5), (24, 8), (24, 12), (50, 25), (7, 7), (9, 3), (10, 1), (30, 6), (48, 16), (996, 332)]


@pytest.mark.parametrize(("steps", "fewer"), COUNTS)
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("total", [1000, 4000, 997])
def test_with_leading_spacing_it_visits_every_so_many_th_time_of_its_teacher(
    steps: int, fewer: int, offset: int, total: int
) -> None:
    teacher = schedule("leading", steps_offset=offset, num_train_timesteps=total, beta_end=0.005)
    student = teacher.student(steps, fewer)
    whole, part = teacher.walk(steps), student.walk(fewer)
    assert times(part) == times(whole)[:: steps // fewer]
    scheduler, laid = laid_by_diffusers(student, fewer)
    assert laid == times(part)
    for t, s in part:  # the noise of every time, and where its step lands
        for u in (t, s):
            theirs = float(scheduler.alphas_cumprod[int(u)] if u >= 0 else scheduler.final_alpha_cumprod)
            assert theirs == pytest.approx(teacher.alpha_bar_at(u), rel=3e-4)
    assert [end for _, end in part][:-1] == times(part)[1:]
    assert part[-1][1] == whole[-1][1]


@pytest.mark.parametrize(("steps", "fewer"), [(steps, fewer) for steps, fewer in COUNTS if (steps, fewer) != (10, 1)])
@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
def test_with_other_spacings_it_begins_where_its_teacher_does_and_is_diffusers_own(
    steps: int, fewer: int, spacing: str
) -> None:
    teacher = schedule(spacing)
    student = teacher.student(steps, fewer)
    assert student is teacher
    part = student.walk(fewer)
    assert times(part)[0] == times(teacher.walk(steps))[0] == 999
    assert laid_by_diffusers(student, fewer)[1] == times(part)
    if spacing == "trailing" and 1000 % fewer == 0 == 1000 % steps:
        assert times(part) == times(teacher.walk(steps))[:: steps // fewer]


@pytest.mark.parametrize(("steps", "fewer"), COUNTS[:6])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_states_are_recorded_at_all_of_its_times(spacing: str, steps: int, fewer: int) -> None:
    teacher = schedule(spacing)
    walk = teacher.passing(steps, (fewer,))
    wanted = {*times(teacher.walk(steps)), *times(teacher.student(steps, fewer).walk(fewer))}
    assert times(walk) == sorted(wanted, reverse=True)
    if spacing == "leading":
        assert walk == teacher.walk(steps)


def test_each_step_is_divided_evenly_up_to_the_next_time() -> None:
    trailing = schedule("trailing")
    assert trailing.finer(trailing.walk(2), 2) == (((999, 749), (749, 499)), ((499, 249), (249, -1)))
    leading = schedule("leading", steps_offset=1)
    assert leading.finer(leading.walk(2), 3) == (((501, 334), (334, 168), (168, 1)), ((1, -499),))
    odd = schedule("linspace", num_train_timesteps=4)
    assert odd.finer(odd.walk(4), 2) == (((3, 2),), ((2, 1),), ((1, 0),), ((0, -1),))


@pytest.mark.parametrize("steps", [1, 3, 8, 24])
@pytest.mark.parametrize("factor", [2, 3, 5])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_finer_steps_follow_each_other_from_first_to_last(spacing: str, steps: int, factor: int) -> None:
    noise = schedule(spacing)
    walk = noise.walk(steps)
    fine = [step for inner in noise.finer(walk, factor) for step in inner]
    assert [s for _, s in fine][:-1] == times(tuple(fine))[1:]
    assert fine[-1][1] == walk[-1][1]
    assert set(times(walk)) <= set(times(tuple(fine)))
    assert np.all(np.diff(times(tuple(fine))) < 0)


def test_a_number_of_steps_that_no_walk_has_is_told() -> None:
    with pytest.raises(
        ModelError,
        match=r"^sampler\.steps: got 50; with the scheduler's steps_offset of 1 they begin at time step 50 of 50",
    ):
        schedule("leading", num_train_timesteps=50, steps_offset=1).walk(50, "sampler.steps")
    with pytest.raises(ModelError, match="sampling steps: got 61; diffusers' trailing spacing makes 62"):
        schedule("trailing").walk(61)
    with pytest.raises(
        ModelError, match=r"distillation\.student_steps: got 1; with linspace spacing one step begins at time step 0"
    ):
        schedule("linspace").student(4, 1)


def test_a_deployed_schedule_that_is_cut_short_gives_the_same_picture_in_diffusers() -> None:
    teacher = schedule("leading", steps_offset=1, set_alpha_to_one=False)
    student = teacher.student(24, 8)
    assert student.train_timesteps < 1000
    scheduler, laid = laid_by_diffusers(student, 8)
    x = theirs = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))

    def predict(x_t: Tensor, t: float) -> Tensor:
        return torch.tanh(x_t + t / 1000)

    for t in laid:
        theirs = scheduler.step(predict(theirs, t), t, theirs).prev_sample
    *_, last = trajectory(predict, x, student, 8)
    torch.testing.assert_close(last.x_s, theirs, rtol=2e-3, atol=2e-3)
