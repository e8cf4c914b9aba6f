"""A short training before a measurement: of widths, of learning rates, or of the time of a step.

Nothing of it is kept or logged. Not here: the training of a stage (training_stage.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from time import monotonic

from torch import nn

from pqcad_qat.errors import DivergedError
from pqcad_qat.models.denoiser import recomputed_activations
from pqcad_qat.policy.training_sections import TrainingPolicy
from pqcad_qat.quantization.trained_part import TrainedPart
from pqcad_qat.training.callback import BatchSource, Callback, StepReport, TrainState
from pqcad_qat.training.trainer import LoopSettings, fit, new_accelerator, new_state, released


def train_shortly(
    model: nn.Module,
    losses: Sequence[Callback],
    batches: BatchSource,
    *,
    loop: LoopSettings,
    training: TrainingPolicy,
) -> TrainState:
    """Train the model in place at its present widths, and return the state after the last step.

    What is trained, accumulation and the largest gradient norm are those of the policy's training, whatever the loop
    says. The state's model is released from Accelerate, in float32, and stays on the device where it was trained. What
    was frozen stays so until `end_training`.

    Raises:
        DivergedError: as of `fit`.
        InterruptedByUserError: Ctrl-C.
    """
    accelerator = new_accelerator(training.precision)
    loop = replace(
        loop,
        accumulation=training.gradient_accumulation,
        max_grad_norm=training.max_grad_norm,
        part=TrainedPart.asked(training),
    )
    state = new_state(model, loop, accelerator)
    try:
        with recomputed_activations(model, training.activation_checkpointing):
            fit(state, losses, batches, loop, accelerator=accelerator)
    finally:
        state.network = released(state, accelerator)
    return state


def step_seconds(
    model: nn.Module, losses: Sequence[Callback], batches: BatchSource, rate: float, *, training: TrainingPolicy
) -> float | None:
    """Wall time of a training step, of two that change the model; None where it diverges at once.

    The first step may compile kernels, the second tells.

    Raises:
        InterruptedByUserError: Ctrl-C.
    """
    clock, loop = _StepTimes(), LoopSettings(2, rate, shape="constant", ema=training.ema)
    with suppress(DivergedError):
        train_shortly(model, [*losses, clock], batches, loop=loop, training=training)
    return min(clock.seconds, default=None)


class _StepTimes(Callback):
    """Notes the wall time of every training step."""

    name = "clock"

    def __init__(self) -> None:
        self.seconds, self._begun = list[float](), 0.0

    def before_step(self, state: TrainState) -> None:
        self._begun = monotonic()

    def after_step(self, state: TrainState, report: StepReport) -> None:
        self.seconds.append(monotonic() - self._begun)
