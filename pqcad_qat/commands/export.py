"""The command `export`: deploy a variant that a run has trained or calibrated, in another format, batch or size; from
the run, or from the PyTorch folder that it has left. Nothing is trained again.

Not here: how a folder is written and proven (stages/deploy.py), and the folder that `run` leaves (run.py).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from torch import nn

from pqcad_qat.commands.finished_run import finished_run
from pqcad_qat.data.calibration import CalibrationSet, record
from pqcad_qat.errors import ModelError, UsageError
from pqcad_qat.export.execution import INT8
from pqcad_qat.machine.progress import counting, working
from pqcad_qat.models.own_model import OwnModel
from pqcad_qat.policy.evaluation import NO_FEATURES
from pqcad_qat.policy.loading import load_policy
from pqcad_qat.policy.origins import located
from pqcad_qat.policy.schema import Policy
from pqcad_qat.policy.value_types import Sides
from pqcad_qat.policy.variants import DEPLOYED, FLOAT_STEPS, VARIANTS, WIDTHS, stages_of
from pqcad_qat.quantization.conversion import quantize_model
from pqcad_qat.quantization.plan import LayerPlan
from pqcad_qat.quantization.student_folder import (
    POLICY,
    is_quantized_folder,
    load_full_precision,
    load_quantized,
)
from pqcad_qat.sampling.precision_by_time import StepsInFloat
from pqcad_qat.serving.deployed_folder import check_replaceable
from pqcad_qat.serving.packing import WeightFormat
from pqcad_qat.stages.chosen_widths import with_chosen_widths
from pqcad_qat.stages.deploy import write_proven
from pqcad_qat.stages.prepared import SHARED, Prepared, calibration_recipe, prepare, with_own_model
from pqcad_qat.stages.quantized_models import QuantizedModels
from pqcad_qat.stages.recipe import Recipes
from pqcad_qat.stages.stage_records import ExportRecord, FloatStepsRecord
from pqcad_qat.stages.train import calibrate
from pqcad_qat.stages.trained_models import TrainedModels
from pqcad_qat.timing.latency import size_bytes

TRAJECTORIES = 4
"""Number of trajectories that are recorded at a size other than the run's: for the ranges of attention, and for the
proofs.
"""


SIZE_KEY = "model.sample_size"
"""The key of a policy in whose place `--size` stands."""


@dataclass(frozen=True)
class FolderAsked:
    """What is asked for; None keeps what the run's policy says.

    Attributes:
        variant: a key of variants.DEPLOYED.
        weights: format on disk.
        batch_size: fixed batch of the graph.
        size: height and width of x_t.
    """

    variant: str | None = None
    weights: WeightFormat | None = None
    batch_size: int | None = None
    size: Sides | None = None


@dataclass(frozen=True)
class Exported:
    """What was deployed, and what was proven of its folder.

    Attributes:
        variant: a key of variants.DEPLOYED.
        sample_shape: shape (C, H, W) of one sample.
        batch_size: fixed batch of the graph.
        bytes: size of the denoiser's files.
        proofs: the proofs, as a run records them.
    """

    variant: str
    sample_shape: tuple[int, int, int]
    batch_size: int
    bytes: int
    proofs: ExportRecord

    def facts(self) -> Iterator[str]:
        """Lines for a terminal."""
        precisions, parity = self.proofs.precisions.values(), self.proofs.parity
        shape = "x".join(map(str, self.sample_shape))
        yield f"{self.variant}: samples of {shape}, batch {self.batch_size}, {self.bytes / 1e6:.2f} MB"
        yield f"executed in INT8: {sum(each in INT8 for each in precisions)} of {len(precisions)} planned layers"
        if (free := self.proofs.any_size_int8) is not None:
            yield f"executed in INT8 for any batch and size, as OpenVINO GenAI compiles it: {free} of {len(precisions)}"
        yield f"equal to PyTorch in every integer: {parity.layers_exact} of {parity.layers_checked} layers"
        yield f"whole network against PyTorch: {self.proofs.end_to_end_psnr:.1f} dB"


def export(path: Path, asked: FolderAsked, *, out: Path, console: Console, own: OwnModel | None = None) -> Exported:
    """Write and prove a deployed folder of a run's variant at `out`; nothing in `path` changes.

    Args:
        path: folder of a run, or a PyTorch folder that a run has left (`student/`), wherever it lies now.
        asked: what is asked for.
        out: folder to write.
        console: where progress is shown.
        own: module of the user's own that the run was made with.

    Raises:
        UsageError: the folder does not hold the variant, or `out` is inside it.
        CheckpointError: the run has not finished the stages that the variant needs.
        ModelError: the model cannot be loaded, or has no such size.
        ExportError: the folder holds something else, or a proof fails.
    """
    check_replaceable(out)
    if out.resolve().is_relative_to(path.resolve()):
        raise UsageError(f"--out: got {str(out)!r}, in the run's own folder; allowed another, as `run` writes there")
    if is_quantized_folder(path):
        return _exported_again(path, asked, out=out, console=console, own=own)

    def needed(policy: Policy, table: Recipes) -> list[str]:
        weights_from = VARIANTS[_variant(policy, asked)].weights_from
        return [stage for stage in table if stage in ("calibration", FLOAT_STEPS, WIDTHS, weights_from)]

    with finished_run(path, needed, own) as (policy, planned, run):
        variant = _variant(policy, asked)
        prepared = with_chosen_widths(policy, planned, run)
        floats = run.read_always(FLOAT_STEPS, FloatStepsRecord)
        recorded = calibrate(policy, prepared, run, console)
        calibration = recorded.below(floats.time)
        models = TrainedModels(run, QuantizedModels(policy, prepared, recorded))
        with working(console, f"export {variant}: its weights"):
            model = models.of(variant)
        wanted = as_asked(policy, asked)
        if asked.size is not None:
            prepared = with_chosen_widths(policy, _prepared(wanted, path.parent / SHARED, own), run)
            model = _resized(model, models.plan_of(variant), prepared, asked.size)
            calibration = _states(wanted, prepared, console).below(floats.time)
        made = _Made(variant, model, floats.of(variant), calibration)
        return _written(wanted, prepared, made, out=out, console=console)


def _exported_again(path: Path, asked: FolderAsked, *, out: Path, console: Console, own: OwnModel | None) -> Exported:
    """As `export`, from a PyTorch folder: states for the proofs are recorded anew, with its policy's model."""
    if not (path / POLICY).is_file():
        raise ModelError(
            f"{path / POLICY}: got no such file, as in folders before 2026-11-29; allowed the folder of the run"
        )
    policy = load_policy(path / POLICY)
    (variant,) = policy.deployed
    if asked.variant not in (None, variant):
        raise UsageError(f"--variant: got {asked.variant!r}; allowed {variant}, which {path} holds")
    with working(console, f"export {variant}: its weights"):
        shell, plan, _ = load_quantized(path, own)
        held = load_full_precision(path, own)
    wanted = as_asked(with_own_model(policy, own), asked)
    with located(policy):
        prepared = replace(_prepared(wanted, None, own), plan=plan)
    in_float, model = StepsInFloat() if held is None else held[1], shell.denoiser
    if asked.size is not None:
        model = _resized(model, plan, prepared, asked.size)
    made = _Made(variant, model, in_float, _states(wanted, prepared, console).below(in_float.start))
    return _written(wanted, prepared, made, out=out, console=console)


@dataclass(frozen=True)
class _Made:
    """A variant to deploy.

    Attributes:
        variant: a key of variants.DEPLOYED.
        model: its quantized model.
        in_float: the steps that full precision computes.
        calibration: states for the ranges of attention and for the proofs.
    """

    variant: str
    model: nn.Module
    in_float: StepsInFloat
    calibration: CalibrationSet


def _written(wanted: Policy, prepared: Prepared, made: _Made, *, out: Path, console: Console) -> Exported:
    """Write and prove the folder."""
    proofs = write_proven(
        wanted,
        prepared,
        console,
        name=made.variant,
        model=made.model,
        in_float=made.in_float,
        calibration=made.calibration,
        folder=out,
    )
    return Exported(made.variant, prepared.model.sample_shape, wanted.export.batch_size, size_bytes(out), proofs)


def _variant(policy: Policy, asked: FolderAsked) -> str:
    """The variant that is asked for, or the first that the run deploys.

    Raises:
        UsageError: the run does not make it, or deploys nothing and none is asked for.
    """
    stages = stages_of(policy.variants)
    allowed = [name for name in DEPLOYED if {VARIANTS[name].weights_from, FLOAT_STEPS} <= {*stages}]
    variant = asked.variant or next(iter(policy.deployed), None)
    if variant not in allowed:
        got, names = "none" if variant is None else repr(variant), ", ".join(allowed) or "another run"
        raise UsageError(f"--variant: got {got}; allowed what this run makes: {names}")
    return variant


def as_asked(policy: Policy, asked: FolderAsked) -> Policy:
    """The run's policy with the format, batch and size that are asked for; no images are compared."""
    export, model = policy.export, policy.model
    folder = {"weights": asked.weights or export.weights, "batch_size": asked.batch_size or export.batch_size}
    return policy.model_copy(
        update={
            "export": export.model_copy(update=folder),
            "model": model.model_copy(update={"sample_size": asked.size or model.sample_size}),
            "evaluation": policy.evaluation.model_copy(
                update={"features": NO_FEATURES, "reference": None, "clip": None}
            ),
        }
    )


def _prepared(wanted: Policy, store: Path | None, own: OwnModel | None) -> Prepared:
    """The full-precision model for the size that is asked for.

    Raises:
        UsageError: it has no such size.
    """
    try:
        return prepare(wanted, store, own)
    except ModelError as error:
        _, key, fault = str(error).partition(f"{SIZE_KEY}: ")
        if not key:
            raise
        raise UsageError(f"--size: {fault}") from error


def _resized(model: nn.Module, plan: Sequence[LayerPlan], prepared: Prepared, size: Sides) -> nn.Module:
    """The same quantized model for another size of x_t, in a network that is built for it.

    Raises:
        ModelError: the network has weights whose shapes depend on the size.
    """
    resized = quantize_model(copy.deepcopy(prepared.split), plan)
    try:
        resized.load_state_dict(model.state_dict(), strict=True)
    except RuntimeError as error:
        shown = "x".join(map(str, size))
        raise ModelError(
            f"--size: got {shown}; allowed the run's own, for the weights of {prepared.model.source} fit no other: "
            f"{' '.join(str(error).split())[:200]}"
        ) from error
    return resized.eval()


def _states(policy: Policy, prepared: Prepared, console: Console) -> CalibrationSet:
    """Trajectories of full precision at the size that is asked for."""
    recipe = replace(calibration_recipe(policy, prepared), trajectories=TRAJECTORIES, refinement=1)
    calls = TRAJECTORIES * len(prepared.schedule.passing(recipe.steps, recipe.also))
    with counting(console, "export: trajectories of this size", calls) as advance:
        return record(prepared.model, recipe, policy.calibration.batch_size, advance, conditions=prepared.conditions)
