"""The solvers in numpy beside diffusers' schedulers, step by step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler

from pqcad_qat.errors import ModelError
from pqcad_qat.sampling.flow import flow_schedule
from pqcad_qat.sampling.solvers import SOLVERS, solver_of
from pqcad_qat.sampling.trajectory import noise_schedule

OF_DIFFUSERS: dict[str, Any] = {
    "euler": EulerDiscreteScheduler,
    "dpm++2m": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
}

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
CONFIG = {"_class_name": "DDIMScheduler", **BETAS, "timestep_spacing": "trailing", "clip_sample": False}


def predicted(x: np.ndarray, t: float) -> np.ndarray:
    """What a network might predict: some curved function of the state and the time."""
    return np.tanh(x * (0.5 + t / 1000)) + 0.3 * np.sin(3 * x + t / 100)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20])
@pytest.mark.parametrize("name", list(SOLVERS))
def test_every_state_is_that_of_diffusers(name: str, steps: int, kind: str) -> None:
    config = {**CONFIG, "prediction_type": kind}
    theirs = OF_DIFFUSERS[name].from_config({key: value for key, value in config.items() if key != "_class_name"})
    schedule = noise_schedule(config)
    theirs.alphas_cumprod = torch.from_numpy(schedule.alpha_bar)  # theirs is rounded to float32
    theirs.set_timesteps(steps)
    walk = schedule.walk(steps)
    assert [int(t) for t in theirs.timesteps] == [t for t, _ in walk]
    solver = solver_of(name, schedule, walk)
    noise = np.random.default_rng(0).standard_normal((2, 3, 4, 4))
    x, other = solver.begun(noise), torch.from_numpy(noise) * theirs.init_noise_sigma
    for (t, _), time in zip(walk, theirs.timesteps, strict=True):
        read = theirs.scale_model_input(other, time)
        np.testing.assert_allclose(x, read.numpy(), rtol=2e-4, atol=2e-4)
        other = theirs.step(torch.from_numpy(predicted(read.numpy(), t)), time, other).prev_sample
        x = solver.step(predicted(x, t), x, t)
    np.testing.assert_allclose(x, other.numpy(), rtol=2e-4, atol=2e-4)
    assert np.abs(x - noise).mean() > 0.1


def test_more_steps_come_nearer_and_second_order_faster_than_first() -> None:
    config = {**CONFIG, "prediction_type": "v_prediction"}
    schedule = noise_schedule(config)
    noise = np.random.default_rng(1).standard_normal((1, 3, 4, 4))

    def end(name: str, steps: int) -> np.ndarray:
        walk = schedule.walk(steps)
        solver, x = solver_of(name, schedule, walk), noise
        for t, _ in walk:
            x = solver.step(np.tanh(x) * 0.3, x, t)
        return x

    exact = end("dpm++2m", 500)
    off = {name: np.abs(end(name, 20) - exact).mean() for name in SOLVERS}
    assert max(off["dpm++2m"], off["unipc"]) < off["euler"] / 2


def test_what_no_solver_can_do_is_refused() -> None:
    schedule = noise_schedule({**CONFIG, "prediction_type": "epsilon"})
    with pytest.raises(ModelError, match=r"solver: got 'heun'; allowed euler, dpm\+\+2m, unipc, or none"):
        solver_of("heun", schedule, schedule.walk(4))
    clipped = noise_schedule({**CONFIG, "prediction_type": "epsilon", "clip_sample": True})
    with pytest.raises(ModelError, match="solver: got 'euler' for a model that clips its images; allowed none"):
        solver_of("euler", clipped, clipped.walk(4))
    flow = flow_schedule({"num_train_timesteps": 1000})
    with pytest.raises(ModelError, match="for a model that matches flows"):
        solver_of("euler", flow, flow.walk(4))
