"""Calibration-assisted distillation: the student's targets, their batches, and the two loss terms.

Not here: the loop (trainer.py). The student runs half the teacher's steps (progressive distillation, Salimans and Ho 2022); the calibration
term is our reading of PQCAD-DM (arXiv 2506.16776), whose equations are not public.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pqcad_qat.diffusion.calibration import CalibrationSet
from pqcad_qat.diffusion.denoiser import predict
from pqcad_qat.diffusion.sampling import NoiseSchedule, PredictionType, ddim_inverse, ddim_step, next_timestep, timesteps
from pqcad_qat.errors import ModelError
from pqcad_qat.training.callback import Batch, BatchSource, Callback, TrainState
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
    student_steps: int,
    batch_size: int,
    advance: Callable[[int], None] = lambda _: None,
) -> DistillationSet:
    """Run the frozen teacher once from every state that the student visits: its targets never change, so they are kept.

    Args:
        teacher: quantized denoiser, in evaluation mode.
        calibration: N-step trajectories of the full-precision model.
        student_steps: S; every time step of the student must be one of the teacher's.
        advance: told of the states done.

    Raises:
        ModelError: the spacing gives the student time steps that the teacher does not visit.
    """
    spans = _spans(schedule, calibration.timesteps, student_steps)
    if schedule.prediction_type == "epsilon":
        spans = [span for span in spans if schedule.alpha_bar_at(calibration.timesteps[span[0]]) >= LOW_SIGNAL]
    columns = []
    for first, last in spans:
        landed = [
            _walk(teacher, part, calibration.timesteps[first:last], schedule, len(calibration.timesteps), advance)
            for part in torch.split(calibration.states[:, first], batch_size)
        ]
        columns.append(torch.cat(landed))
    starts = [calibration.timesteps[first] for first, _ in spans]
    ends = [next_timestep(schedule, t, student_steps) for t in starts]
    states = torch.stack([calibration.states[:, first] for first, _ in spans], dim=1)
    full = torch.stack([calibration.states[:, last] for _, last in spans], dim=1)
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


def _spans(schedule: NoiseSchedule, teacher_steps: tuple[int, ...], student_steps: int) -> list[tuple[int, int]]:
    """(first, last) index into the teacher's states of every student step."""
    visited = timesteps(schedule, student_steps)
    missing = [t for t in visited if t not in teacher_steps]
    if missing:
        raise ModelError(
            f"distillation.student_steps: got {student_steps}, whose time steps {missing[:5]} the {len(teacher_steps)}-step teacher does "
            f"not visit with {schedule.timestep_spacing} spacing; allowed a divisor of sampler.steps with leading or trailing spacing"
        )
    firsts = [teacher_steps.index(t) for t in visited]
    return list(zip(firsts, [*firsts[1:], len(teacher_steps)], strict=True))


def _walk(
    teacher: nn.Module, x_t: Tensor, steps: tuple[int, ...], schedule: NoiseSchedule, total: int, advance: Callable[[int], None]
) -> Tensor:
    """Where the teacher's own steps land."""
    for t in steps:
        alpha_bars = schedule.alpha_bar_at(t), schedule.alpha_bar_at(next_timestep(schedule, t, total))
        x_t = ddim_step(predict(teacher, x_t, t), x_t, *alpha_bars, schedule.prediction_type, schedule.clip_sample_range)
        advance(len(x_t))
    return x_t


def truncated_snr_weight(alpha_bar: float, prediction_type: PredictionType) -> float:
    """Weight that turns a squared error of a prediction into max(SNR, 1) times the squared error of x_0 (Salimans and Ho 2022, section 4).

    With SNR = a / (1 - a), an error of x_0 is sqrt((1 - a) / a) times one of epsilon, and sqrt(1 - a) times one of v.
    """
    in_x_0 = {"epsilon": (1 - alpha_bar) / alpha_bar, "v_prediction": 1 - alpha_bar, "sample": 1.0}[prediction_type]
    snr = alpha_bar / (1 - alpha_bar)
    return in_x_0 * max(snr, 1.0)


def distillation_batches(data: DistillationSet, batch_size: int, seed: int) -> BatchSource:
    """Step -> {x_t, t, teacher, calibration, weight} of a batch that mixes time steps: a pure function of seed and step."""

    def batch(step: int) -> Batch:
        rows, columns = mixed_states(len(data.states), len(data.timesteps), batch_size, seed, step)
        return {
            "x_t": data.states[rows, columns],
            "t": data.timesteps[columns],
            "teacher": data.teacher[rows, columns],
            "calibration": data.calibration[rows, columns],
            "weight": data.weights[columns],
        }

    return batch


@dataclass
class CalibrationAssistedDistillation(Callback):
    """The two terms: w_T ||student - teacher||^2 + w_C ||student - full precision||^2, both in truncated-SNR weight.

    Attributes:
        teacher_weight: w_T; 0 leaves the term out.
        calibration_weight: w_C; 0 is plain distillation from the quantized teacher, the ablation.
    """

    teacher_weight: float
    calibration_weight: float

    def __post_init__(self) -> None:
        self.name = "distillation"

    def loss_terms(self, state: TrainState, batch: Batch) -> Mapping[str, Tensor]:
        prediction = predict(state.network, batch["x_t"], batch["t"]).float()
        weighted = {"teacher": self.teacher_weight, "calibration": self.calibration_weight}
        return {name: weight * self._error(prediction, batch[name], batch["weight"]) for name, weight in weighted.items() if weight}

    @staticmethod
    def _error(prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        """Weighted mean squared error of (B, C, H, W) under weights (B,)."""
        return ((prediction - target).square().flatten(1).mean(dim=1) * weight).mean()
