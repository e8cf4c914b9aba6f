"""The stage `ptq`: post-training quantization, whose model is deployed as it is or trained further.

Not here: the methods (quantization/gptq_rounding.py, learned_rounding.py), and training (train.py).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from torch import Tensor, nn

from pqcad_qat.data.calibration import CalibrationSet
from pqcad_qat.machine.accelerators import on_accelerator
from pqcad_qat.machine.content_store import parts_folder
from pqcad_qat.machine.processes import agreed
from pqcad_qat.machine.progress import counting
from pqcad_qat.machine.tensor_files import save_tensors
from pqcad_qat.policy.schema import Policy
from pqcad_qat.policy.variants import PTQ
from pqcad_qat.quantization.gptq_rounding import round_weights, rounded_layers
from pqcad_qat.quantization.layer_state import move_onto_levels, move_within_levels, quantized_weight, weights_for
from pqcad_qat.quantization.learned_rounding import learn_rounding
from pqcad_qat.quantization.plan import LayerPlan
from pqcad_qat.quantization.trained_part import changing_state
from pqcad_qat.stages.run_folder import RunFolder
from pqcad_qat.stages.trained_files import WEIGHTS, make_in
from pqcad_qat.stages.trained_models import TrainedModels


def post_train(
    policy: Policy,
    run: RunFolder,
    console: Console,
    *,
    calibration: CalibrationSet,
    models: TrainedModels,
    shares_training: bool,
) -> None:
    """Stage `ptq`: round the weights of the calibrated model at its target widths, and keep it.

    Its weights lie within the levels that they are rounded to, where full precision has them or as near to it as that
    allows. What they are rounded to is decided, and training that begins here can change it in small steps. From the
    middle of their levels, weights would cross no boundary in hundreds of steps at the low rates that models bear.

    With `shares_training`, a run beside this one with an equal recipe has done it for both.
    """
    with run.stage(PTQ, together=True) as stage:
        if not stage.new:
            return

        rounded: list[nn.Module] = []

        def make(folder: Path) -> None:
            model = models.untrained.at_targets()
            kept = parts_folder(folder) if shares_training else run.unfinished(PTQ)
            with counting(console, "ptq: layers", len(rounded_layers(model))) as advance:
                round_as_asked(
                    policy,
                    model,
                    calibration,
                    full=models.untrained.prepared.split,
                    kept=kept,
                    advance=advance,
                    warn=lambda message: run.warn(message, console),
                )
            if policy.post_training.rounding != "nearest":
                lay_within_levels(model, models.untrained.prepared.split)
            with agreed() as first:
                if first:
                    save_tensors(changing_state(model, ()), folder / WEIGHTS.format(PTQ))
            rounded.append(model)

        make_in(run, PTQ, make, shared=shares_training)
        stage.done()
        if rounded:  # not where another run has rounded it
            models.keep(PTQ, rounded[0])


def to_train(policy: Policy, models: TrainedModels) -> nn.Module:
    """The model of `ptq`, for training; its weights on their levels where not all of them are trained."""
    model = models.of(PTQ)
    if policy.training.trainable == "all" or policy.post_training.rounding == "nearest":
        return model
    model = copy.deepcopy(model)
    for layer in rounded_layers(model).values():
        move_onto_levels(layer)
    return model


def within_levels(policy: Policy, plan: Sequence[LayerPlan], model: nn.Module) -> dict[str, Tensor]:
    """How far the weights of rounded layers that have a way down lie from their levels, by layer; nothing where not all
    weights are trained, for then they lie on them.
    """
    if policy.training.trainable != "all" or policy.post_training.rounding == "nearest":
        return {}
    layers, descending = rounded_layers(model), {layer.name for layer in plan if len(layer.ladder) > 1}
    return {
        name: layer.weight.detach() - quantized_weight(layer) for name, layer in layers.items() if name in descending
    }


def lay_within_levels(model: nn.Module, full: nn.Module) -> None:
    """Move the weights of rounded layers to where full precision has them, as far as they stay rounded as they are."""
    for name, layer in rounded_layers(model).items():
        move_within_levels(layer, weights_for(layer, full.get_parameter(f"{name}.weight").detach()))


def round_as_asked(
    policy: Policy,
    model: nn.Module,
    calibration: CalibrationSet,
    *,
    full: nn.Module,
    kept: Path | None = None,
    advance: Callable[[int], None] = lambda _: None,
    warn: Callable[[str], None] = lambda _: None,
) -> None:
    """Round the weights of a calibrated model, on the CPU, as the policy says.

    Args:
        policy: the policy.
        model: the quantized model.
        calibration: calibration set that shows what its layers read.
        full: the model before it was quantized.
        kept: folder in which long work is kept, for a process that goes on with it.
        advance: called with the number of layers that are done since the last call.
        warn: receives a message for all that is not as the policy says.
    """
    section, layers = policy.post_training, rounded_layers(model)
    if section.rounding == "nearest" or not layers:
        return
    states = list(calibration.inputs(section.states, policy.calibration.batch_size))
    if section.rounding == "gptq":
        with on_accelerator(model):
            round_weights(model, states, section.passes, advance)
    else:
        with on_accelerator(model, full):
            learn_rounding(model, full, layers, states, steps=section.steps, kept=kept, advance=advance, warn=warn)
