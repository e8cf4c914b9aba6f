"""Calibration-assisted distillation: the student's targets, their batches, and the two loss terms.

Not here: the loop (trainer.py). The student runs half the teacher's steps (progressive distillation, Salimans and Ho 2022); the calibration
term is our reading of PQCAD-DM (arXiv 2506.16776), whose equations are not public.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from pqcad_qat.diffusion.calibration import CalibrationSet
from pqcad_qat.diffusion.conditions import guided_call, rows_of
from pqcad_qat.diffusion.denoiser import Condition, predict
from pqcad_qat.diffusion.sampling import NoiseSchedule, PredictionType, ddim_inverse, ddim_step, guided, next_timestep, timesteps
from pqcad_qat.errors import ModelError
from pqcad_qat.training.callback import Batch, BatchSource, Callback, TrainState, condition_of, with_condition
from pqcad_qat.training.quantization_aware import mixed_states

LOW_SIGNAL = 1e-3
"""alpha_bar under which epsilon says nothing about x_0: an epsilon-predicting student is not distilled there."""


@dataclass(frozen=True)
class DistillationSet:
    """What the student learns from, at the S states of a trajectory that it visits.

    Attributes:
        states: (K, S, C, H, W), x_t of the calibration set.
        teacher: (K, S, C, H, W), the prediction that carries x_t in one student step to where the quantized teacher's steps land.
        calibration: (K, S, C, H, W), the prediction that carries x_t in one student step to the set's full-precision x_s.
        timesteps: (S,) of the states.
        weights: (S,), truncated-SNR weight of a squared error in the model's own parameterisation.
    """

    states: Tensor
    teacher: Tensor
    calibration: Tensor
    timesteps: Tensor
    weights: Tensor


@torch.no_grad()
def distillation_set(
    teacher: nn.Module,
    calibration: CalibrationSet,
    schedule: NoiseSchedule,
    teacher_steps: int,
    student_steps: int,
    batch_size: int,
    advance: Callable[[int], None] = lambda _: None,
    guidance_scale: float = 1.0,
) -> DistillationSet:
    """Run the frozen teacher once from every state that the student visits: its targets never change, so they are kept.

    Args:
        teacher: quantized denoiser, in evaluation mode.
        calibration: trajectories of the full-precision model, with its states at every time step of the student.
        teacher_steps: T, of its own sampler; fewer than the calibration set's where the teacher is the student of an earlier round.
        student_steps: S; every time step of the student must be one of the teacher's, and of the calibration set's.
        advance: told of the states done.
        guidance_scale: that the teacher samples with; 1 where it needs one pass.

    Raises:
        ModelError: the spacing gives the student time steps that the teacher does not visit.
    """
    walks = _walks(schedule, teacher_steps, calibration.timesteps, student_steps)
    if schedule.prediction_type == "epsilon":
        walks = [walk for walk in walks if schedule.alpha_bar_at(walk[0]) >= LOW_SIGNAL]
    starts = [walk[0] for walk in walks]
    ends = [next_timestep(schedule, t, student_steps) for t in starts]
    recorded = [calibration.timesteps.index(t) for t in starts]
    states = calibration.states[:, recorded]
    full = calibration.states[:, [*recorded[1:], -1]]  # the last step ends in the image
    columns = []
    for index, walk in enumerate(walks):
        landed = []
        for rows in torch.split(torch.arange(len(states)), batch_size):
            condition = {name: value[rows] for name, value in calibration.condition.items()}
            follow = guided_call(partial(predict, teacher), condition, calibration.unconditional, guidance_scale)
            landed.append(_walk(follow, states[rows, index], walk, schedule, teacher_steps, advance))
        columns.append(torch.cat(landed))
    a_t, a_s = (torch.tensor([schedule.alpha_bar_at(t) for t in at], dtype=torch.float64) for at in (starts, ends))

    def carrying(target: Tensor) -> Tensor:
        t, s = (a.view(1, -1, 1, 1, 1) for a in (a_t, a_s))
        return ddim_inverse(states.double(), target.double(), t, s, schedule.prediction_type).float()

    return DistillationSet(
        states=states,
        teacher=carrying(torch.stack(columns, dim=1)),
        calibration=carrying(full),
        timesteps=torch.tensor(starts),
        weights=torch.tensor([truncated_snr_weight(float(a), schedule.prediction_type) for a in a_t]),
    )


def _walks(schedule: NoiseSchedule, teacher_steps: int, recorded: Collection[int], student_steps: int) -> list[tuple[int, ...]]:
    """The time steps of the teacher in every step of the student."""
    visited, teacher = timesteps(schedule, student_steps), timesteps(schedule, teacher_steps)
    missing = [t for t in visited if t not in teacher or t not in recorded]
    if missing:
        raise ModelError(
            f"distillation.student_steps: got {student_steps}, whose time steps {missing[:5]} the {teacher_steps}-step teacher does "
            f"not visit with {schedule.timestep_spacing} spacing; allowed a divisor of sampler.steps with leading or trailing spacing"
        )
    firsts = [teacher.index(t) for t in visited]
    return [teacher[first:last] for first, last in pairwise([*firsts, len(teacher)])]


def _walk(
    follow: Callable[[Tensor, int], Tensor],
    x_t: Tensor,
    steps: tuple[int, ...],
    schedule: NoiseSchedule,
    total: int,
    advance: Callable[[int], None],
) -> Tensor:
    """Where the steps of the teacher that `follow` calls land."""
    for t in steps:
        alpha_bars = schedule.alpha_bar_at(t), schedule.alpha_bar_at(next_timestep(schedule, t, total))
        x_t = ddim_step(follow(x_t, t), x_t, *alpha_bars, schedule.prediction_type, schedule.clip_sample_range)
        advance(len(x_t))
    return x_t


def truncated_snr_weight(alpha_bar: float, prediction_type: PredictionType) -> float:
    """Weight that turns a squared error of a prediction into max(SNR, 1) times the squared error of x_0 (Salimans and Ho 2022, section 4).

    With SNR = a / (1 - a), an error of x_0 is sqrt((1 - a) / a) times one of epsilon, and sqrt(1 - a) times one of v.
    """
    in_x_0 = {"epsilon": (1 - alpha_bar) / alpha_bar, "v_prediction": 1 - alpha_bar, "sample": 1.0}[prediction_type]
    snr = alpha_bar / (1 - alpha_bar)
    return in_x_0 * max(snr, 1.0)


def distillation_batches(data: DistillationSet, batch_size: int, seed: int, condition: Condition | None = None) -> BatchSource:
    """Step -> {x_t, t, teacher, calibration, weight, condition} of a batch that mixes time steps: a pure function of seed and step.

    `condition` (K, ...) is what each trajectory is conditioned on.
    """

    def batch(step: int) -> Batch:
        rows, columns = mixed_states(len(data.states), len(data.timesteps), batch_size, seed, step)
        states = {
            "x_t": data.states[rows, columns],
            "t": data.timesteps[columns],
            "teacher": data.teacher[rows, columns],
            "calibration": data.calibration[rows, columns],
            "weight": data.weights[columns],
        }
        return with_condition(states, {name: value[rows] for name, value in (condition or {}).items()})

    return batch


@dataclass
class CalibrationAssistedDistillation(Callback):
    """The two terms: w_T ||student - teacher||^2 + w_C ||student - full precision||^2, both in truncated-SNR weight.

    Attributes:
        teacher_weight: w_T; 0 leaves the term out.
        calibration_weight: w_C; 0 is plain distillation from the quantized teacher, the ablation.
        guidance_scale: of a student that keeps both passes of classifier-free guidance; 1 where it needs one.
        unconditional: name -> (1, ...), of the other pass.
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
        return {name: weight * self._error(prediction, batch[name], batch["weight"]) for name, weight in weighted.items() if weight}

    def _prediction(self, network: nn.Module, batch: Batch) -> Tensor:
        """What the student samples with; both passes are one call, as processes that share the work want it."""
        x_t, t, condition = batch["x_t"], batch["t"], condition_of(batch)
        if self.guidance_scale == 1.0:
            return predict(network, x_t, t, condition)
        other = {name: value.to(x_t.device) for name, value in rows_of(self.unconditional, len(x_t)).items()}
        doubled = {name: torch.cat([value, other[name]]) for name, value in condition.items()}
        conditional, unconditional = predict(network, torch.cat([x_t, x_t]), torch.cat([t, t]), doubled).chunk(2)
        return guided(conditional, unconditional, self.guidance_scale)

    @staticmethod
    def _error(prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        """Weighted mean squared error of (B, C, H, W) under weights (B,)."""
        return ((prediction - target).square().flatten(1).mean(dim=1) * weight).mean()
