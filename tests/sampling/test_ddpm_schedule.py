"""The noise schedule of DDPM's kin and its timesteps, against diffusers' scheduler.

Not here: the DDIM step (test_ddim.py), and the configs of other scheduler classes (test_schedulers.py).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from diffusers import DDIMScheduler

from pqcad_qat.errors import ModelError
from pqcad_qat.sampling.ddpm_schedule import ddpm_schedule, timesteps


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_alpha_bar_equals_diffusers(beta_schedule: str, zero_snr: bool) -> None:
    scheduler = DDIMScheduler(beta_schedule=beta_schedule, rescale_betas_zero_snr=zero_snr)
    ours = ddpm_schedule(scheduler.config).alpha_bar
    # diffusers accumulates 1000 float32 products
    np.testing.assert_allclose(ours, scheduler.alphas_cumprod.double().numpy(), rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 7, 10, 20, 50])
def test_timesteps_equal_diffusers(spacing: str, steps: int) -> None:
    scheduler = DDIMScheduler(timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    assert timesteps(ddpm_schedule(scheduler.config), steps) == tuple(scheduler.timesteps.tolist())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"thresholding": True}, "thresholding: got true"),
        ({"prediction_type": "flow"}, "prediction_type: got 'flow'; allowed epsilon"),
        (
            {"beta_schedule": "sigmoid"},
            "beta_schedule: got 'sigmoid'; allowed linear, scaled_linear, squaredcos_cap_v2$",
        ),
        ({"timestep_spacing": "odd"}, "timestep_spacing: got 'odd'"),
    ],
)
def test_a_config_that_cannot_be_honoured_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        ddpm_schedule(config)


@pytest.mark.parametrize("steps", [0, 1001])
def test_a_wrong_number_of_steps_is_refused(steps: int) -> None:
    with pytest.raises(ModelError, match=f"got {steps}; allowed 1 to 1000"):
        timesteps(ddpm_schedule({}), steps)
