"""The solvers in numpy beside diffusers' schedulers, step by step."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler, LCMScheduler, UniPCMultistepScheduler
from diffusers.schedulers import scheduling_lcm

from pqcad_qat.errors import ModelError
from pqcad_qat.sampling.flow import flow_schedule
from pqcad_qat.sampling.solvers import SOLVERS, Solver, solver_of, solver_walk
from pqcad_qat.sampling.trajectory import initial_noise, later_noise, noise_schedule

OF_DIFFUSERS: dict[str, Any] = {
    "euler": EulerDiscreteScheduler,
    "dpm++2m": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
    "lcm": LCMScheduler,
}

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
CONFIG = {"_class_name": "DDIMScheduler", **BETAS, "timestep_spacing": "trailing", "clip_sample": False}


def predicted(x: np.ndarray, t: float) -> np.ndarray:
    """What a network might predict: some curved function of the state and the time."""
    return np.tanh(x * (0.5 + t / 1000)) + 0.3 * np.sin(3 * x + t / 100)


def fresh(step: int, count: int = 2) -> np.ndarray:
    return later_noise(0, step, count, (3, 4, 4)).astype(float)


def solver(name: str, schedule: Any, steps: int) -> tuple[Solver, Any]:
    walk = solver_walk(name, schedule, steps)
    return solver_of(name, schedule, walk, fresh), walk


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20])
@pytest.mark.parametrize("name", list(SOLVERS))
def test_every_state_is_that_of_diffusers(name: str, steps: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {**CONFIG, "prediction_type": kind}
    theirs = OF_DIFFUSERS[name].from_config({key: value for key, value in config.items() if key != "_class_name"})
    added = itertools.count(1)
    monkeypatch.setattr(scheduling_lcm, "randn_tensor", lambda *_, **__: torch.from_numpy(fresh(next(added))))
    schedule = noise_schedule(config)
    theirs.alphas_cumprod = torch.from_numpy(schedule.alpha_bar)  # theirs is rounded to float32
    theirs.set_timesteps(steps)
    ours, walk = solver(name, schedule, steps)
    assert [int(t) for t in theirs.timesteps] == [t for t, _ in walk]
    noise = np.random.default_rng(0).standard_normal((2, 3, 4, 4))
    x, other = ours.begun(noise), torch.from_numpy(noise) * theirs.init_noise_sigma
    for (t, _), time in zip(walk, theirs.timesteps, strict=True):
        read = theirs.scale_model_input(other, time)
        np.testing.assert_allclose(x, read.numpy(), rtol=2e-4, atol=2e-4)
        other = theirs.step(torch.from_numpy(predicted(read.numpy(), t)), time, other).prev_sample
        x = ours.step(predicted(x, t), x, t)
    np.testing.assert_allclose(x, other.numpy(), rtol=2e-4, atol=2e-4)
    assert np.abs(x - noise).mean() > 0.1


def test_lcm_visits_the_times_of_diffusers_for_any_number_of_steps() -> None:
    schedule = noise_schedule({**CONFIG, "prediction_type": "epsilon"})
    theirs = LCMScheduler.from_config({key: value for key, value in CONFIG.items() if key != "_class_name"})
    for steps in range(1, 51):
        theirs.set_timesteps(steps)
        assert [t for t, _ in solver_walk("lcm", schedule, steps)] == theirs.timesteps.tolist(), steps


def test_more_steps_come_nearer_and_second_order_faster_than_first() -> None:
    config = {**CONFIG, "prediction_type": "v_prediction"}
    schedule = noise_schedule(config)
    noise = np.random.default_rng(1).standard_normal((1, 3, 4, 4))

    def end(name: str, steps: int) -> np.ndarray:
        (ours, walk), x = solver(name, schedule, steps), noise
        for t, _ in walk:
            x = ours.step(np.tanh(x) * 0.3, x, t)
        return x

    exact = end("dpm++2m", 500)
    off = {name: np.abs(end(name, 20) - exact).mean() for name in ("euler", "dpm++2m", "unipc")}
    assert max(off["dpm++2m"], off["unipc"]) < off["euler"] / 2


def test_the_noise_that_lcm_adds_is_none_that_sampling_begins_with_and_each_steps_own() -> None:
    rows = [initial_noise(0, 0, 3, (3, 4, 4)), *(later_noise(0, step, 3, (3, 4, 4)) for step in range(1, 4))]
    assert len({row.tobytes() for noise in rows for row in noise}) == 12
    np.testing.assert_array_equal(later_noise(0, 2, 1, (3, 4, 4))[0], rows[2][0])  # whatever else is in the batch


def test_what_no_solver_can_do_is_refused() -> None:
    schedule = noise_schedule({**CONFIG, "prediction_type": "epsilon"})
    with pytest.raises(ModelError, match=r"solver: got 'heun'; allowed euler, dpm\+\+2m, unipc, lcm, or none"):
        solver("heun", schedule, 4)
    with pytest.raises(ModelError, match="steps: got 51 with the solver lcm; allowed 1 to 50, the times it was"):
        solver("lcm", schedule, 51)
    clipped = noise_schedule({**CONFIG, "prediction_type": "epsilon", "clip_sample": True})
    flow = flow_schedule({"num_train_timesteps": 1000})
    for name in ("euler", "lcm"):
        with pytest.raises(ModelError, match=f"solver: got '{name}' for a model that clips its images; allowed none"):
            solver(name, clipped, 4)
        with pytest.raises(ModelError, match="for a model that matches flows"):
            solver(name, flow, 4)
