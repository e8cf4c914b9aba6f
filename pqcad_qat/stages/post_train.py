"""The stage `ptq`: post-training quantization, whose model is deployed as it is or trained further.

Not here: the methods (quantization/gptq_rounding.py, learned_rounding.py), and training (train.py).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from torch import nn

from pqcad_qat.data.calibration import CalibrationSet
from pqcad_qat.machine.accelerators import on_accelerator
from pqcad_qat.machine.content_store import parts_folder
from pqcad_qat.machine.processes import agreed
from pqcad_qat.machine.progress import counting
from pqcad_qat.machine.tensor_files import save_tensors
from pqcad_qat.policy.schema import Policy
from pqcad_qat.policy.variants import PTQ
from pqcad_qat.quantization.gptq_rounding import round_weights, rounded_layers
from pqcad_qat.quantization.learned_rounding import learn_rounding
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
            with agreed() as first:
                if first:
                    save_tensors(changing_state(model, ()), folder / WEIGHTS.format(PTQ))
            rounded.append(model)

        make_in(run, PTQ, make, shared=shares_training)
        stage.done()
        if rounded:  # not where another run has rounded it
            models.keep(PTQ, rounded[0])


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
