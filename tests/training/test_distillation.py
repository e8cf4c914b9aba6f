"""The distillation targets: closed forms, the fixed point, and both ablations."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from pqcad_qat.data.calibration import CalibrationSet
from pqcad_qat.errors import ModelError
from pqcad_qat.models.denoiser import predict
from pqcad_qat.models.guidance import guided_call, rows_of
from pqcad_qat.sampling.ddim import ddim_step
from pqcad_qat.sampling.ddpm_schedule import DDPMSchedule, ddpm_schedule, next_timestep, timesteps
from pqcad_qat.sampling.trajectory import trajectory
from pqcad_qat.training.batches import batch_dice, mixed_states
from pqcad_qat.training.callback import TrainState, condition_of
from pqcad_qat.training.distillation import (
    CalibrationAssistedDistillation,
    distillation_batches,
    distillation_set,
)
from pqcad_qat.training.quantization_aware import FullPrecisionMatching, calibration_batches
from pqcad_qat.training.trainer import LoopSettings, fit, new_state

PREDICTIONS = ("epsilon", "v_prediction", "sample")


class Denoiser(nn.Module):
    """A small smooth function of x_t and t with diffusers' signature."""

    def __init__(self, shift: float = 0.0) -> None:
        super().__init__()
        self.mix = nn.Conv2d(1, 1, 3, padding=1)
        with torch.no_grad():
            self.mix.weight.fill_(0.05)
            self.mix.bias.fill_(shift)  # type: ignore[union-attr]

    def forward(self, x: Tensor, t: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        return (torch.tanh(self.mix(x) + t.view(-1, 1, 1, 1) / 2000),)


def schedule(prediction: str, spacing: str = "trailing") -> DDPMSchedule:
    config = {
        "prediction_type": prediction,
        "timestep_spacing": spacing,
        "clip_sample": False,
        "beta_schedule": "squaredcos_cap_v2",
    }
    return ddpm_schedule(config)


def recorded(denoiser: nn.Module, noise: DDPMSchedule, steps: int = 8) -> CalibrationSet:
    x = torch.randn(6, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        walk = list(trajectory(lambda x_t, t: denoiser(x_t, torch.full((len(x_t),), t))[0], x, noise, steps))
    states = torch.stack([*(step.x_t for step in walk), walk[-1].x_s], dim=1)
    return CalibrationSet(states, torch.stack([step.prediction for step in walk], dim=1), timesteps(noise, steps))


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_the_calibration_target_lands_on_the_full_precision_state(prediction: Any, spacing: str) -> None:
    noise = schedule(prediction, spacing)
    calibration = recorded(Denoiser(), noise)
    data = distillation_set(Denoiser(0.3), calibration, noise, 8, student_steps=4, batch_size=3)
    for column, t in enumerate(data.timesteps.tolist()):
        s = next_timestep(noise, t, 4)
        a_t, a_s = noise.alpha_bar_at(t), noise.alpha_bar_at(s)
        landed = ddim_step(
            data.calibration[:, column].double(), data.states[:, column].double(), a_t, a_s, prediction_type=prediction
        )
        index = calibration.timesteps.index(s) if s in calibration.timesteps else len(calibration.timesteps)
        if a_t > 1e-6:
            torch.testing.assert_close(landed.float(), calibration.states[:, index], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_full_precision_teacher_has_the_calibration_targets(prediction: str) -> None:
    noise = schedule(prediction)
    data = distillation_set(Denoiser(), recorded(Denoiser(), noise), noise, 8, student_steps=4, batch_size=4)
    torch.testing.assert_close(data.teacher, data.calibration, rtol=1e-3, atol=1e-4)


def test_a_student_of_as_many_steps_as_the_teacher_is_asked_for_the_teachers_own_prediction() -> None:
    noise = schedule("v_prediction")
    calibration = recorded(Denoiser(), noise)
    data = distillation_set(Denoiser(), calibration, noise, 8, student_steps=8, batch_size=4)
    torch.testing.assert_close(data.teacher, calibration.predictions, rtol=1e-3, atol=1e-4)


def test_a_student_teaches_the_next_rounds_in_its_own_steps() -> None:
    noise = schedule("v_prediction")
    student = Denoiser(0.3)
    calibration = recorded(Denoiser(), noise)
    data = distillation_set(student, calibration, noise, 4, student_steps=2, batch_size=4)
    assert data.timesteps.tolist() == list(timesteps(noise, 2))
    for column, start in enumerate(data.timesteps.tolist()):
        x_t = calibration.states[:, calibration.timesteps.index(start)]
        assert torch.equal(data.states[:, column], x_t)
        for t in (start, next_timestep(noise, start, 4)):  # two of the student's four steps
            last = next_timestep(noise, t, 4)
            x_t = ddim_step(
                student(x_t, torch.full((6,), t))[0],
                x_t,
                noise.alpha_bar_at(t),
                noise.alpha_bar_at(last),
                prediction_type="v_prediction",
            )
        ends = noise.alpha_bar_at(start), noise.alpha_bar_at(last)
        landed = ddim_step(
            data.teacher[:, column].double(), data.states[:, column].double(), *ends, prediction_type="v_prediction"
        )
        torch.testing.assert_close(landed.float(), x_t, rtol=1e-3, atol=1e-3)


def test_steps_that_full_precision_computes_are_not_distilled() -> None:
    noise = schedule("epsilon")
    recording = recorded(Denoiser(), noise)
    data = distillation_set(
        Denoiser(),
        recording.below(999),
        noise,
        8,
        student_steps=4,
        batch_size=4,
        start=999,
        weights=lambda times: {t: t / 1000 for t in times},
    )
    assert data.timesteps.tolist() == [749, 499, 249]
    assert data.weights.tolist() == pytest.approx([0.749, 0.499, 0.249])
    whole = distillation_set(Denoiser(), recording, noise, 8, student_steps=4, batch_size=4)
    assert whole.timesteps.tolist() == [999, 749, 499, 249]
    assert torch.equal(whole.calibration[:, 1:], data.calibration)


def test_a_set_without_states_at_the_students_times_is_refused() -> None:
    noise = schedule("v_prediction", "linspace")
    with pytest.raises(
        ModelError, match=r"student_steps: got 4; the calibration set has no states at its time steps \[666, 333\]"
    ):
        distillation_set(Denoiser(), recorded(Denoiser(), noise), noise, 8, student_steps=4, batch_size=4)


def test_every_batch_mixes_time_steps_and_repeats_bit_for_bit() -> None:
    noise = schedule("v_prediction")
    data = distillation_set(Denoiser(), recorded(Denoiser(), noise), noise, 8, student_steps=4, batch_size=4)
    source = distillation_batches(data, 16, seed=3)
    one, again, other = source(5), source(5), source(6)
    assert sorted(set(one["t"].tolist())) == sorted(data.timesteps.tolist())
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["x_t"], other["x_t"])


def test_stratified_time_steps_are_uniform() -> None:
    columns = torch.cat([mixed_states(4, 20, 32, batch_dice(0, step))[1] for step in range(400)])
    shares = torch.bincount(columns, minlength=20) / len(columns)
    torch.testing.assert_close(shares, torch.full((20,), 0.05), rtol=0.05, atol=0)


@pytest.mark.parametrize(("teacher", "calibration"), [(1.0, 1.0), (1.0, 0.0), (0.0, 1.0)])
def test_distillation_and_both_its_ablations_train(teacher: float, calibration: float) -> None:
    noise = schedule("v_prediction")
    data = distillation_set(Denoiser(0.3), recorded(Denoiser(), noise), noise, 8, student_steps=4, batch_size=4)
    settings = LoopSettings(steps=30, learning_rate=0.02)
    accelerator = Accelerator(cpu=True)
    state: TrainState = new_state(Denoiser(0.3), settings, accelerator)
    source = distillation_batches(data, 8, seed=0)
    callback = CalibrationAssistedDistillation(teacher, calibration)
    before = {name: float(value.detach()) for name, value in callback.loss_terms(state, source(999)).items()}
    assert set(before) == {name for name, weight in (("teacher", teacher), ("calibration", calibration)) if weight}
    fit(state, [callback], source, settings, accelerator=accelerator)
    after = sum(float(value.detach()) for value in callback.loss_terms(state, source(999)).values())
    assert after < sum(before.values())


def test_calibration_batches_hold_the_full_precision_prediction_of_their_states() -> None:
    noise = schedule("v_prediction")
    calibration = recorded(Denoiser(), noise)
    batch = calibration_batches(calibration, 8, seed=0)(2)
    with torch.no_grad():
        torch.testing.assert_close(Denoiser()(batch["x_t"], batch["t"])[0], batch["target"])


class Conditional(nn.Module):
    """A small smooth function of x_t, t and a label: (x, t, label (B,)) -> prediction."""

    def __init__(self, shift: float = 0.0) -> None:
        super().__init__()
        self.mix = Denoiser(shift)
        self.label = nn.Parameter(torch.tensor([0.1, -0.2, 0.3]))

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return self.mix(x, t)[0] + self.label[label].view(-1, 1, 1, 1)


NULL = {"label": torch.tensor([2])}
"""What stands for no label."""


def recorded_guided(denoiser: nn.Module, noise: DDPMSchedule, scale: float) -> CalibrationSet:
    labels = {"label": torch.tensor([0, 1, 0, 1, 1, 0])}
    follow = guided_call(partial(predict, denoiser), labels, NULL, scale)
    x = torch.randn(6, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        walk = list(trajectory(follow, x, noise, 8))
        both = [
            torch.stack(
                [predict(denoiser, step.x_t, step.t, rows_of(given, 6) if given is NULL else given) for step in walk],
                dim=1,
            )
            for given in (labels, NULL)
        ]
    states = torch.stack([*(step.x_t for step in walk), walk[-1].x_s], dim=1)
    return CalibrationSet(states, both[0], timesteps(noise, 8), labels, NULL, both[1])


def state_of(network: nn.Module) -> TrainState:
    return new_state(network, LoopSettings(1, 1e-3), Accelerator(cpu=True))


def test_half_of_a_batch_of_guided_states_is_of_the_unconditional_pass_each_with_its_own_target() -> None:
    denoiser, noise = Conditional(), schedule("v_prediction")
    source = calibration_batches(recorded_guided(denoiser, noise, 3.0), 8, seed=0)
    for step in (0, 1):
        batch = source(step)
        labels = condition_of(batch)["label"]
        assert [label == 2 for label in labels.tolist()] == [(position + step) % 2 == 1 for position in range(8)]
        with torch.no_grad():
            found = FullPrecisionMatching().loss_terms(state_of(denoiser), batch)
        assert float(found["full_precision"]) < 1e-12


def test_a_teacher_under_guidance_lands_where_its_guided_steps_do() -> None:
    """With the full-precision model as its own teacher in its own steps, both targets are the same."""
    denoiser, noise = Conditional(), schedule("v_prediction")
    guided_set = recorded_guided(denoiser, noise, 3.0)
    data = distillation_set(denoiser, guided_set, noise, 8, student_steps=4, batch_size=4, guidance_scale=3.0)
    torch.testing.assert_close(data.teacher, data.calibration, rtol=1e-4, atol=1e-4)
    once = distillation_set(denoiser, guided_set, noise, 8, student_steps=4, batch_size=4)
    assert (once.teacher - data.calibration).abs().max() > 0.05


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_student_is_judged_by_the_prediction_that_it_samples_with(scale: float) -> None:
    """Of two passes if it keeps them, of the conditional one alone if guidance is distilled into it."""
    student, noise = Conditional(0.2), schedule("v_prediction")
    guided_set = recorded_guided(Conditional(), noise, 3.0)
    data = distillation_set(Conditional(), guided_set, noise, 8, student_steps=4, batch_size=4, guidance_scale=3.0)
    batch = distillation_batches(data, 8, 0, guided_set.condition)(0)
    callback = CalibrationAssistedDistillation(0.0, 1.0, scale, NULL)
    with torch.no_grad():
        found = float(callback.loss_terms(state_of(student), batch)["calibration"])
        follow = guided_call(partial(predict, student), condition_of(batch), NULL, scale)
        error = (follow(batch["x_t"], batch["t"]) - batch["calibration"]).square().mean(dim=(1, 2, 3))
    assert found == pytest.approx(float((error * batch["weight"]).mean()), rel=1e-5)


def test_guidance_that_is_distilled_needs_one_pass_and_both_losses_fall() -> None:
    noise = schedule("v_prediction")
    guided_set = recorded_guided(Conditional(), noise, 3.0)
    data = distillation_set(Conditional(0.05), guided_set, noise, 8, student_steps=4, batch_size=4, guidance_scale=3.0)
    for scale in (1.0, 3.0):
        student, accelerator = Conditional(0.05), Accelerator(cpu=True)
        settings = LoopSettings(steps=60, learning_rate=0.02)
        state, source = (
            new_state(student, settings, accelerator),
            distillation_batches(data, 16, 0, guided_set.condition),
        )
        callback = CalibrationAssistedDistillation(0.25, 1.0, scale, NULL)
        before = sum(float(value.detach()) for value in callback.loss_terms(state, source(999)).values())
        fit(state, [callback], source, settings, accelerator=accelerator)
        assert sum(float(value.detach()) for value in callback.loss_terms(state, source(999)).values()) < 0.5 * before
