"""Our DDIM against diffusers' scheduler, and the closed forms of its inverse.

Not here: the noise schedule and its timesteps (test_ddpm_schedule.py).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from pqcad_qat.sampling.ddim import add_noise, ddim_inverse, ddim_step, join_prediction, split_prediction
from pqcad_qat.sampling.ddpm_schedule import ddpm_schedule, next_timestep, timesteps

PREDICTIONS = ("epsilon", "v_prediction", "sample")


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("alpha_to_one", [False, True])
def test_a_whole_ddim_trajectory_equals_diffusers(
    prediction_type: Any, clip: bool, spacing: str, alpha_to_one: bool
) -> None:
    scheduler = DDIMScheduler(
        prediction_type=prediction_type, clip_sample=clip, timestep_spacing=spacing, set_alpha_to_one=alpha_to_one
    )
    schedule = ddpm_schedule(scheduler.config)
    scheduler.set_timesteps(12)
    ours = theirs = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    for t in timesteps(schedule, 12):
        prediction = torch.tanh(ours)
        alphas = schedule.alpha_bar_at(t), schedule.alpha_bar_at(next_timestep(schedule, t, 12))
        ours = ddim_step(
            prediction, ours, *alphas, prediction_type=prediction_type, clip_sample_range=schedule.clip_sample_range
        )
        theirs = scheduler.step(torch.tanh(theirs), t, theirs).prev_sample
    torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize(("alpha_bar_t", "alpha_bar_s"), [(0.05, 0.3), (0.4, 0.9), (0.7, 1.0), (2e-3, 0.1)])
def test_the_inverse_undoes_a_step(prediction_type: Any, alpha_bar_t: float, alpha_bar_s: float) -> None:
    rng = np.random.default_rng(0)
    x_t, prediction = rng.normal(size=(2, 3, 1, 4, 4))
    x_s = ddim_step(prediction, x_t, alpha_bar_t, alpha_bar_s, prediction_type=prediction_type)
    np.testing.assert_allclose(
        ddim_inverse(x_t, x_s, alpha_bar_t, alpha_bar_s, prediction_type=prediction_type), prediction, rtol=1e-9
    )


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_split_and_join_are_inverse_and_agree_with_the_forward_process(prediction_type: Any) -> None:
    x_0, eps = np.random.default_rng(1).normal(size=(2, 3, 1, 4, 4))
    x_t = add_noise(x_0, eps, 0.37)
    prediction = join_prediction(x_0, eps, 0.37, prediction_type)
    for got, wanted in zip(split_prediction(prediction, x_t, 0.37, prediction_type), (x_0, eps), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-10)


def test_numpy_and_torch_give_the_same_step() -> None:
    x, p = np.random.default_rng(2).normal(size=(2, 2, 1, 4, 4)).astype(np.float32)
    by_numpy = ddim_step(p, x, 0.2, 0.5, prediction_type="v_prediction", clip_sample_range=1.0)
    by_torch = ddim_step(
        torch.from_numpy(p), torch.from_numpy(x), 0.2, 0.5, prediction_type="v_prediction", clip_sample_range=1.0
    )
    np.testing.assert_allclose(by_numpy, by_torch.numpy(), rtol=1e-6, atol=1e-7)
