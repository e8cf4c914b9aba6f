"""Our flow matching against diffusers' FlowMatchEulerDiscreteScheduler, its closed forms, and distillation on it."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from pqcad_qat.data.calibration import CalibrationRecipe, CalibrationSet, record
from pqcad_qat.errors import ModelError
from pqcad_qat.models.denoiser import DiffusionModel
from pqcad_qat.models.own_model import OwnModel
from pqcad_qat.sampling.flow import FlowSchedule, euler_inverse, euler_step, flow_schedule, settled
from pqcad_qat.sampling.trajectory import check_sampler, noise_schedule, trajectory
from pqcad_qat.training.distillation import distillation_set

NAMED = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
FLUX = {
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}
SHAPE = (2, 4, 4)


class Velocity(nn.Module):
    """A small smooth function of x_t and t."""

    def __init__(self, bias: float = 0.0) -> None:
        super().__init__()
        self.mix, self.bias = nn.Conv2d(2, 2, 3, padding=1), bias
        nn.init.constant_(self.mix.weight, 0.05)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        found: Tensor = torch.tanh(self.mix(x) + t.view(-1, 1, 1, 1) / 500 + self.bias)
        return found


def flow_model(**config: Any) -> DiffusionModel:
    torch.manual_seed(0)
    denoiser, scheduler = Velocity(), {**NAMED, **config}
    return DiffusionModel(
        denoiser, scheduler, "velocity", "digest", OwnModel("velocity", lambda: denoiser, SHAPE, scheduler)
    )


def recorded(
    model: DiffusionModel, steps: int = 8, also: tuple[int, ...] = (4,), refinement: int = 1
) -> CalibrationSet:
    return record(model, CalibrationRecipe("", "euler", steps, 6, 0, refinement, also=also), 4)


def calculate_shift(tokens: int) -> float:
    """mu, as FluxPipeline has it, whose module cannot be imported without the library transformers."""
    slope = (1.15 - 0.5) / (4096 - 256)
    return tokens * slope + 0.5 - slope * 256


def ends(schedule: FlowSchedule, steps: int) -> np.ndarray:
    """Sigmas of all states, the image included."""
    walk = schedule.walk(steps)
    return np.array([walk[0][0], *(s for _, s in walk)]) / schedule.train_timesteps


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 4, 28])
def test_sigmas_and_times_equal_diffusers(shift: float, steps: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    schedule = flow_schedule(scheduler.config)
    np.testing.assert_allclose(ends(schedule, steps), scheduler.sigmas.numpy(), atol=2e-7)
    np.testing.assert_allclose([t for t, _ in schedule.walk(steps)], scheduler.timesteps.numpy(), atol=2e-4)


@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize("tokens", [64, 1024, 4096])
def test_of_a_fixed_image_size_flux_s_dynamic_shift_is_a_fixed_one(kind: str, tokens: int) -> None:
    theirs = FlowMatchEulerDiscreteScheduler(shift=3.0, time_shift_type=kind, **FLUX)  # type: ignore[arg-type]
    theirs.set_timesteps(sigmas=np.linspace(1.0, 1 / 12, 12), mu=calculate_shift(tokens))  # as FluxPipeline does
    config = settled(dict(theirs.config), tokens)
    np.testing.assert_allclose(ends(flow_schedule(config), 12), theirs.sigmas.numpy(), atol=2e-7)
    ours = FlowMatchEulerDiscreteScheduler.from_config(config)
    ours.set_timesteps(sigmas=np.linspace(1.0, 1 / 12, 12), mu=calculate_shift(tokens))
    torch.testing.assert_close(ours.sigmas, theirs.sigmas)


@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
def test_a_whole_trajectory_equals_diffusers_step_by_step(spacing: str) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(9, sigmas=list(np.linspace(1.0, 1 / 9, 9)) if spacing == "trailing" else None)
    schedule = noise_schedule({**scheduler.config, **NAMED, "timestep_spacing": spacing})
    x = theirs = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    for t, step in zip(
        scheduler.timesteps, trajectory(lambda x, t: torch.tanh(x + t / 1000), x, schedule, 9), strict=True
    ):
        assert step.t == pytest.approx(float(t), abs=2e-4)
        theirs = scheduler.step(torch.tanh(theirs + t / 1000), t, theirs).prev_sample
        torch.testing.assert_close(step.x_s, theirs, rtol=1e-5, atol=1e-5)


def test_the_velocity_leads_from_noise_to_the_image() -> None:
    x_0, eps = np.random.default_rng(0).normal(size=(2, 3, *SHAPE))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(7)
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas[:-1].double().numpy(), strict=True):
        x_t = (1 - sigma) * x_0 + sigma * eps
        noised = scheduler.scale_noise(torch.from_numpy(x_0), t[None], torch.from_numpy(eps))
        np.testing.assert_allclose(noised.numpy(), x_t, atol=1e-6)
        np.testing.assert_allclose(euler_step(eps - x_0, x_t, sigma, 0.0), x_0, atol=1e-12)


@pytest.mark.parametrize(("sigma_t", "sigma_s"), [(1.0, 0.9), (0.6, 0.05), (0.009, 0.0)])
def test_the_inverse_undoes_a_step(sigma_t: float, sigma_s: float) -> None:
    x_t, velocity = np.random.default_rng(0).normal(size=(2, 3, *SHAPE))
    x_s = euler_step(velocity, x_t, sigma_t, sigma_s)
    np.testing.assert_allclose(euler_inverse(x_t, x_s, sigma_t, sigma_s), velocity, rtol=1e-9)


@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
def test_a_walk_passes_by_the_times_of_several_samplers_and_divides_evenly(spacing: Any) -> None:
    schedule = FlowSchedule(3.0, spacing, 1000)
    walk = schedule.passing(20, (10, 5))
    times = [t for t, _ in walk]
    assert len(times) == (20 if spacing == "trailing" else 20 + 8 + 3)  # the ends of linspace are every sampler's
    assert all(t in times for count in (20, 10, 5) for t, _ in schedule.walk(count))
    assert [s for _, s in walk] == [*times[1:], 0.0]
    for (t, s), inner in zip(walk, schedule.finer(walk, 3), strict=True):
        assert (inner[0][0], inner[-1][1], len(inner)) == (t, s, 3)
        parts = np.diff([schedule.unshifted(u / 1000) for u in (t, *(end for _, end in inner))])
        np.testing.assert_allclose(parts, parts.mean(), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_karras_sigmas": True}, "use_karras_sigmas: got true; allowed null or false"),
        ({"shift_terminal": 0.1}, "shift_terminal: got 0.1"),
        ({"use_dynamic_shifting": True}, "use_dynamic_shifting: got true"),
        ({"timestep_spacing": "leading"}, "timestep_spacing: got 'leading'; allowed linspace, trailing"),
    ],
)
def test_a_config_that_cannot_be_honoured_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        noise_schedule({**NAMED, **config})


def test_a_sampler_that_does_not_fit_the_schedule_is_refused() -> None:
    flow, other = noise_schedule(NAMED), noise_schedule({"_class_name": "DDIMScheduler"})
    for name, schedule in ((None, flow), ("euler", flow), (None, other), ("ddim", other)):
        check_sampler(name, schedule, "model")
    with pytest.raises(
        ModelError, match=r"sampler\.name: got 'ddim'; model predicts the velocities of flow matching; allowed euler"
    ):
        check_sampler("ddim", flow, "model")
    with pytest.raises(ModelError, match=r"sampler\.name: got 'euler'; model predicts epsilon.*; allowed ddim"):
        check_sampler("euler", other, "model")


def test_a_set_holds_the_states_of_the_sampler_and_of_its_student() -> None:
    model = flow_model(shift=3.0)
    schedule, found = noise_schedule(model.scheduler_config), recorded(model)
    assert set(found.timesteps) == {t for count in (8, 4) for t, _ in schedule.walk(count)}
    assert found.states.shape == (6, len(found.timesteps) + 1, *SHAPE)
    with torch.no_grad():
        for column, (t, s) in enumerate(pairwise([*found.timesteps, 0.0])):
            prediction = model.denoiser(found.states[:, column], torch.full((6,), t))
            torch.testing.assert_close(found.predictions[:, column], prediction)
            torch.testing.assert_close(
                found.states[:, column + 1], schedule.step(prediction, found.states[:, column], t, s)
            )
    assert next(found.inputs(4, 4))[1].dtype == torch.float32


def test_finer_steps_come_nearer_to_the_flow() -> None:
    model = flow_model(shift=3.0)
    exact = recorded(model, refinement=64).images
    errors = [float((recorded(model, refinement=factor).images - exact).square().mean()) for factor in (1, 4)]
    assert errors[1] < errors[0] / 8  # of first order


def test_both_targets_of_distillation_land_where_they_say() -> None:
    model, teacher = flow_model(shift=3.0), Velocity(0.3)
    schedule, calibration = noise_schedule(model.scheduler_config), recorded(model, refinement=2)
    data = distillation_set(teacher, calibration, schedule, 8, student_steps=4, batch_size=4)
    walk = schedule.walk(4)
    np.testing.assert_allclose(data.timesteps.numpy(), [t for t, _ in walk], rtol=1e-7)
    for column, ((t, s), inner) in enumerate(zip(walk, schedule.finer(walk, 2), strict=True)):
        x = data.states[:, column]
        at = calibration.timesteps.index(s) if s else -1
        torch.testing.assert_close(
            schedule.step(data.calibration[:, column], x, t, s), calibration.states[:, at], rtol=1e-4, atol=1e-5
        )
        landed = x
        with torch.no_grad():
            for a, b in inner:  # two steps of the teacher in one of the student
                landed = schedule.step(teacher(landed, torch.full((6,), a)), landed, a, b)
        torch.testing.assert_close(schedule.step(data.teacher[:, column], x, t, s), landed, rtol=1e-4, atol=1e-5)


def test_a_set_without_the_students_times_is_refused() -> None:
    model = flow_model(shift=3.0)
    with pytest.raises(
        ModelError, match=r"student_steps: got 4; the calibration set has no states at its time steps \[8"
    ):
        distillation_set(
            Velocity(),
            recorded(model, also=()),
            noise_schedule(model.scheduler_config),
            8,
            student_steps=4,
            batch_size=4,
        )
