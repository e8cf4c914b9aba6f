"""A short training before a measurement: of widths, of learning rates, or of the time of a step.

Nothing of it is kept or logged. Not here: the training of a stage (training_stage.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from pqcad_qat.models.denoiser import recomputed_activations
from pqcad_qat.policy.training_sections import TrainingPolicy
from pqcad_qat.training.callback import BatchSource, Callback, TrainState
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

    Accumulation and the largest gradient norm are those of the policy's training, whatever the loop says.
    The state's model is released from Accelerate, in float32, and stays on the device where it was trained.

    Raises:
        DivergedError: as of `fit`.
        InterruptedByUserError: Ctrl-C.
    """
    accelerator = new_accelerator(training.precision)
    loop = replace(loop, accumulation=training.gradient_accumulation, max_grad_norm=training.max_grad_norm)
    state = new_state(model, loop, accelerator)
    try:
        with recomputed_activations(model, training.activation_checkpointing):
            fit(state, losses, batches, loop, accelerator=accelerator)
    finally:
        state.network = released(state, accelerator)
    return state
