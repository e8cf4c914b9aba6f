"""Calibration-assisted distillation: the student's targets, its batches, and the two loss terms.

The student takes fewer sampling steps than the teacher. Each of its steps replaces several of the teacher's, which
makes it a progressive distillation (Salimans and Ho 2022). A second, calibration term pulls the student to where the
full-precision model lands. That term is our reading of PQCAD-DM (arXiv 2506.16776), whose equations are not public.

A target is the prediction that carries a state x_t in one student step to the wanted state x_s. It is found by
inverting the sampling step.

Not here: the loop (trainer.py), and targets where the sampler clips x_0 (clipped_targets.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from pqcad_qat.data.calibration import CalibrationSet
from pqcad_qat.errors import ModelError
from pqcad_qat.machine.tensor_files import gathered
from pqcad_qat.models.denoiser import Condition, predict
from pqcad_qat.models.guidance import guided_call, rows_of
from pqcad_qat.sampling.ddpm_schedule import DDPMSchedule, Walk
from pqcad_qat.sampling.precision_by_time import NO_FLOAT_STEPS
from pqcad_qat.sampling.trajectory import NoiseSchedule, guided, landing
from pqcad_qat.training.batches import batch_dice, mixed_states
from pqcad_qat.training.callback import Batch, BatchSource, Callback, TrainState, condition_of, with_condition
from pqcad_qat.training.clipped_targets import fold, nearest_target


@dataclass(frozen=True)
class DistillationSet:
    """The student's training data: K trajectories at the S states that the student visits.

    Attributes:
        states: (K, S, C, H, W), x_t from the calibration set.
        teacher: (K, S, C, H, W), the prediction that carries x_t in one student step to where the quantized teacher's
            steps land.
        calibration: (K, S, C, H, W), the prediction that carries x_t in one student step to the calibration set's
            full-precision x_s.
        timesteps: (S,), time steps of the states.
        weights: (S,), weights of squared errors in the model's own parameterisation, with a mean of 1.
        folds: (S, 3), centre, reach and slopes of each step (clipped_targets.py); None where the sampler does not clip.
    """

    states: Tensor
    teacher: Tensor
    calibration: Tensor
    timesteps: Tensor
    weights: Tensor
    folds: Tensor | None = None

    def of(self, rows: slice) -> DistillationSet:
        """The set of these trajectories alone."""
        return replace(self, states=self.states[rows], teacher=self.teacher[rows], calibration=self.calibration[rows])


def equal_weights(times: Sequence[float]) -> dict[float, float]:
    """The weight 1 for every time."""
    return dict.fromkeys(times, 1.0)


@torch.no_grad()
def distillation_set(
    teacher: nn.Module,
    calibration: CalibrationSet,
    schedule: NoiseSchedule,
    teacher_steps: int,
    *,
    student_steps: int,
    weights: Callable[[Sequence[float]], Mapping[float, float]] = equal_weights,
    batch_size: int,
    advance: Callable[[int], None] = lambda _: None,
    guidance_scale: float = 1.0,
    start: float = NO_FLOAT_STEPS,
    parts_folder: Path | None = None,
    stage: str = "teacher",
    together: bool = False,
) -> DistillationSet:
    """Compute all targets of the student, by running the frozen teacher once from every state that the student visits.

    The teacher does not change, so its targets are computed once and kept.

    Args:
        teacher: quantized denoiser in evaluation mode.
        calibration: trajectories of the full-precision model, with states at every time step of the student.
        schedule: noise schedule that the teacher samples by.
        teacher_steps: T, the teacher's sampling steps.
        student_steps: S, the student's sampling steps; each of its time steps must be one of the calibration set's.
        weights: function that gives the times of the student's steps their weights in the loss.
        batch_size: trajectories per call of the teacher.
        advance: function that receives the number of states done.
        guidance_scale: guidance scale of the teacher; 1 where it needs one pass.
        start: time from which on full precision computes the student's steps, which leaves them out of the set.
        parts_folder: folder for finished batches of trajectories, from which a later process can go on.
        stage: name of the stage, for the message of an interruption.
        together: whether all processes of a run call this; each makes some of the batches.

    Raises:
        InterruptedByUserError: Ctrl-C, with `parts_folder`.
        ModelError: the student has time steps at which the set has no states.
    """
    schedule = schedule.student(teacher_steps, student_steps)
    student = schedule.walk(student_steps)
    walks = schedule.finer(student, teacher_steps // student_steps)
    # Pairs of a student step and the teacher's steps that it replaces. Left out are steps that full precision computes,
    # and steps that do not move x_t.
    pairs = [
        (step, walk) for step, walk in zip(student, walks, strict=True) if step[0] < start and schedule.moves(*step)
    ]
    steps = tuple(step for step, _ in pairs)
    recorded = _columns(calibration, steps, student_steps)
    states = calibration.states[:, recorded]
    # Where each student step should land: on the state at which the next one starts, the last one in the image.
    full = calibration.states[:, [*recorded[1:], -1]]

    def batch(first: int, count: int) -> dict[str, Tensor]:
        """Where the teacher lands, for some of the trajectories."""
        rows = slice(first, first + count)
        condition = {name: value[rows] for name, value in calibration.condition.items()}
        follow = guided_call(partial(predict, teacher), condition, calibration.unconditional, guidance_scale)
        landed = [
            landing(walk, follow, states[rows, index], schedule, advance=advance)
            for index, (_, walk) in enumerate(pairs)
        ]
        return {"landed": torch.stack(landed, dim=1)}

    landed = gathered(
        parts_folder,
        len(states),
        batch_size,
        batch,
        work=f"{stage}: trajectories",
        advance=lambda rows: advance(rows * sum(len(walk) for _, walk in pairs)),
        together=together,
    )["landed"]
    return DistillationSet(
        states=states,
        teacher=_carrying(states, landed, steps, schedule),
        calibration=_carrying(states, full, steps, schedule),
        timesteps=torch.tensor([t for t, _ in steps]),
        weights=torch.tensor(list(weights([t for t, _ in steps]).values())),
        folds=_folds(schedule, steps),
    )


def _columns(calibration: CalibrationSet, steps: Walk, student_steps: int) -> list[int]:
    """Indices of the calibration set's states at which these student steps start.

    Raises:
        ModelError: the set has no state at one of them.
    """
    if missing := [t for t, _ in steps if t not in calibration.timesteps]:
        raise ModelError(
            f"distillation.student_steps: got {student_steps}; the calibration set has no states at its "
            f"time steps {missing[:5]}; allowed a divisor of sampler.steps"
        )
    return [calibration.timesteps.index(t) for t, _ in steps]


def _carrying(states: Tensor, targets: Tensor, steps: Walk, schedule: NoiseSchedule) -> Tensor:
    """(K, S, C, H, W), the predictions that carry the states to these targets, each in one student step.

    They are computed in float64.
    """
    columns = [schedule.inverse(states[:, i].double(), targets[:, i].double(), *step) for i, step in enumerate(steps)]
    return torch.stack(columns, dim=1).float()


def _folds(schedule: NoiseSchedule, steps: Walk) -> Tensor | None:
    """(S, 3), centre, reach and slopes of each step, or None where the sampler does not clip x_0."""
    if not isinstance(schedule, DDPMSchedule) or schedule.clip_sample_range is None:
        return None
    signals = [(schedule.alpha_bar_at(t), schedule.alpha_bar_at(s)) for t, s in steps]
    return torch.tensor([fold(*pair, schedule.prediction_type, schedule.clip_sample_range) for pair in signals])


def distillation_batches(
    data: DistillationSet, batch_size: int, seed: int, condition: Condition | None = None
) -> BatchSource:
    """A batch source that mixes time steps, pure in seed and step.

    A batch holds x_t, t, teacher, calibration, weight, fold where the sampler clips, and its condition. `condition`
    (K, ...) is what each trajectory is conditioned on.
    """

    def batch(step: int) -> Batch:
        rows, columns = mixed_states(len(data.states), len(data.timesteps), batch_size, batch_dice(seed, step))
        return distillation_states(data, rows, columns, condition)

    return batch


def distillation_states(
    data: DistillationSet, rows: Tensor, columns: Tensor, condition: Condition | None = None
) -> Batch:
    """The batch of these states (trajectory, time index), as `distillation_batches` makes it."""
    states = {
        "x_t": data.states[rows, columns],
        "t": data.timesteps[columns],
        "teacher": data.teacher[rows, columns],
        "calibration": data.calibration[rows, columns],
        "weight": data.weights[columns],
    }
    if data.folds is not None:
        states["fold"] = data.folds[columns]
    return with_condition(states, {name: value[rows] for name, value in (condition or {}).items()})


@dataclass
class CalibrationAssistedDistillation(Callback):
    """The two loss terms: w_T ||student - teacher||^2 + w_C ||student - full precision||^2.

    Each state's errors are weighted by what an error at its time costs in the image. Where sampling steps are clipped,
    the batch holds their `fold` (B, 3). The target is then the nearest prediction that lands on the wanted state.

    Attributes:
        teacher_weight: w_T; 0 leaves the term out.
        calibration_weight: w_C; 0 gives plain distillation from the quantized teacher, the ablation.
        guidance_scale: guidance scale of a student that keeps both passes of classifier-free guidance; 1 where it
            needs one pass.
        unconditional: conditions of the unconditional pass by name, each (1, ...).
    """

    teacher_weight: float
    calibration_weight: float
    guidance_scale: float = 1.0
    unconditional: Condition = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.name = "distillation"

    def loss_terms(self, state: TrainState, batch: Batch) -> Mapping[str, Tensor]:
        prediction = self._prediction(state.network, batch).float()
        weighted = {"teacher": self.teacher_weight, "calibration": self.calibration_weight}
        return {name: weight * self._error(prediction, name, batch) for name, weight in weighted.items() if weight}

    def _prediction(self, network: nn.Module, batch: Batch) -> Tensor:
        """The prediction that the student samples with, guided where it keeps both passes.

        Both passes are one denoiser call, because processes that share the work expect one call of the network per
        backward pass.
        """
        x_t, t, condition = batch["x_t"], batch["t"], condition_of(batch)
        if self.guidance_scale == 1.0:
            return predict(network, x_t, t, condition)
        null = {name: value.to(x_t.device) for name, value in rows_of(self.unconditional, len(x_t)).items()}
        doubled = {name: torch.cat([value, null[name]]) for name, value in condition.items()}
        conditional, unconditional = predict(network, torch.cat([x_t, x_t]), torch.cat([t, t]), doubled).chunk(2)
        return guided(conditional, unconditional, self.guidance_scale)

    @staticmethod
    def _error(prediction: Tensor, name: str, batch: Batch) -> Tensor:
        """Mean squared error of a prediction (B, C, H, W) to the target of this name.

        Each state's error is weighted by the batch's weight (B,).
        """
        target = batch[name]
        if "fold" in batch:
            folding = batch["fold"].T.reshape(3, -1, 1, 1, 1).unbind()
            target = nearest_target(prediction.detach(), target, batch["x_t"], folding)
        return ((prediction - target).square().flatten(1).mean(dim=1) * batch["weight"]).mean()
