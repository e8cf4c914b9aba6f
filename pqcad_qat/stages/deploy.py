"""The stages `export-NAME` and `benchmark`: OpenVINO folders with their proofs, and their timing beside that of the
baselines (baselines.py).

Not here: how a folder is written and verified (export/), and how it is timed (timing/).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from torch import nn

from pqcad_qat.data.calibration import CalibrationSet
from pqcad_qat.export.export_model import ExportRequest, export_model
from pqcad_qat.export.int8_attention import AttentionRange, attention_ranges
from pqcad_qat.export.layer_inputs import recorded_inputs
from pqcad_qat.export.part_export import PartsToDeploy
from pqcad_qat.export.part_psnr import part_parity
from pqcad_qat.export.proof import layer_parity
from pqcad_qat.export.traceable_modules import needs_vnni
from pqcad_qat.machine.files import room_for, write_file
from pqcad_qat.machine.progress import working
from pqcad_qat.models.families.family import ConditionInput
from pqcad_qat.policy.loading import dump_policy
from pqcad_qat.policy.schema import Policy
from pqcad_qat.policy.variants import DEPLOYED, FLOAT_STEPS, OPENVINO, REFERENCE, VARIANTS, exporting
from pqcad_qat.quantization.conversion import frozen_weights
from pqcad_qat.quantization.plan_facts import expected_bytes
from pqcad_qat.quantization.student_folder import POLICY as OWN_POLICY
from pqcad_qat.quantization.student_folder import save_quantized
from pqcad_qat.sampling.precision_by_time import NO_FLOAT_STEPS, StepsInFloat
from pqcad_qat.serving.deployed_folder import copy_folder
from pqcad_qat.stages.baselines import example_of, openvino_files
from pqcad_qat.stages.export_request import denoiser_request, scheduler_of
from pqcad_qat.stages.prepared import RANGE_INPUTS, Prepared
from pqcad_qat.stages.proofs import at_any_size, integer_parity, whole_proofs
from pqcad_qat.stages.run_folder import RunFolder
from pqcad_qat.stages.stage_records import BenchmarkRecord, ExportRecord, FloatStepsRecord
from pqcad_qat.stages.trained_models import TrainedModels
from pqcad_qat.timing.hardware import hardware
from pqcad_qat.timing.latency import size_bytes, time_denoisers
from pqcad_qat.timing.node_profile import node_profile

PROFILED = tuple(spec.name for spec in VARIANTS.values() if spec.runtime == OPENVINO and spec.sampled)
"""Sampled variants that OpenVINO runs, all of them in integers; the benchmark profiles the nodes of their graphs."""


def export(
    policy: Policy,
    prepared: Prepared,
    run: RunFolder,
    console: Console,
    *,
    name: str,
    calibration: CalibrationSet,
    models: TrainedModels,
) -> None:
    """Stage `export-NAME`: write a variant's model as a PyTorch folder and as an OpenVINO folder, and prove the latter
    on the shipped file.

    Raises:
        ExportError: a planned layer did not execute in INT8, and the policy does not list it as an exception.
    """
    with run.stage(exporting(name)) as stage:
        if not stage.new:
            return
        model, in_float = models.of(name), run.read_always(FLOAT_STEPS, FloatStepsRecord).of(name)
        shipped = run.path / policy.folder_of(name)
        take_folder(run, name, shipped.name)
        _save_in_pytorch(policy, prepared, run, name, models=models, in_float=in_float)
        record = write_proven(
            policy,
            prepared,
            console,
            name=name,
            model=model,
            in_float=in_float,
            calibration=calibration,
            folder=shipped,
        )
        packed = run.path / "baselines" / shipped.name.replace("openvino", "packed")
        with room_for(packed, expected_bytes(prepared.split, prepared.plan, packed=True)):
            copy_folder(shipped, packed, "packed", pipeline_parts=False)
        stage.done(replace(record, packed_bytes=size_bytes(packed)))


def take_folder(run: RunFolder, name: str, folder: str) -> None:
    """Forget the export of another variant to this folder, under an earlier policy: its folder is replaced now."""
    for stage in (exporting(other) for other in DEPLOYED if other != name):
        begun = run.begun(stage)
        if begun is not None and begun["values"].get("folder") == folder:
            run.forget(stage)


def write_proven(
    policy: Policy,
    prepared: Prepared,
    console: Console,
    *,
    name: str,
    model: nn.Module,
    in_float: StepsInFloat,
    calibration: CalibrationSet,
    folder: Path,
) -> ExportRecord:
    """Write the OpenVINO folder of a variant's model, and prove it.

    The proofs read the folder, not the model in memory. The execution graph must show the planned layers in INT8,
    except those that the policy lists. Then the predictions are compared with PyTorch's end to end, and each layer's
    integers on equal inputs.

    Args:
        policy, prepared: policy and full-precision model that it was made by.
        console: where progress is shown.
        name: the variant, one of the keys of DEPLOYED.
        model: its quantized model.
        in_float: the steps that full precision computes.
        calibration: states on which attention has its ranges, and on which the proofs are made.
        folder: where it is written; an older deployed folder there is replaced.

    Raises:
        ExportError: a layer has no INT8 form or did not execute in it, or the folder holds something else.
    """
    request = _export_request(
        policy, prepared, console, name=name, calibration=calibration, model=model, in_float=in_float
    )
    deployed, batch = request.pipeline_parts, policy.export.batch_size
    with working(console, f"export {name}: writing and verifying the OpenVINO folder"):
        with room_for(folder, expected_bytes(prepared.split, prepared.plan, packed=policy.export.weights != "int8")):
            export_model(request, folder, policy.export.weights)
        executed, psnr = whole_proofs(prepared, request, folder, calibration)
        free = at_any_size(prepared, request, folder)
        states = next(calibration.inputs(batch, batch))
        with recorded_inputs(model, states, folder.parent) as inputs:
            parity = layer_parity(folder, request.layers, inputs)
        return ExportRecord(
            precisions=dict(executed.precisions),
            attention=dict(executed.attention),
            inference_precision=executed.inference_precision,
            needs_vnni=tuple(name for name, layer in request.layers.items() if needs_vnni(layer)),
            parity=integer_parity(parity),
            end_to_end_psnr=psnr,
            parts=() if deployed is None else part_parity(deployed, folder),
            any_size_int8=free,
        )


def _save_in_pytorch(
    policy: Policy,
    prepared: Prepared,
    run: RunFolder,
    name: str,
    *,
    models: TrainedModels,
    in_float: StepsInFloat,
) -> None:
    """Write a variant's model as a PyTorch folder with its exact quantizers, beside its OpenVINO folder."""
    folder = run.path / policy.folder_of(name).replace("openvino", "student")
    with room_for(folder, 3 * expected_bytes(prepared.split, (), packed=False)):
        save_quantized(
            folder,
            models.of(name),
            models.plan_of(name),
            policy.quantization.split_shortcuts,
            scheduler_config=scheduler_of(policy, prepared, name),
            steps=policy.sampling_steps(name),
            full=None if in_float.start == NO_FLOAT_STEPS else prepared.model.denoiser,
            in_float=in_float,
        )
        evaluation = policy.evaluation.model_copy(update={"variants": None})
        alone = policy.model_copy(update={"deploy": (name,), "evaluation": evaluation, "targets": {}})
        write_file(folder / OWN_POLICY, dump_policy(alone))


def _export_request(
    policy: Policy,
    prepared: Prepared,
    console: Console,
    *,
    name: str,
    calibration: CalibrationSet,
    model: nn.Module,
    in_float: StepsInFloat,
) -> ExportRequest:
    """Everything that an OpenVINO folder of a variant's model is made from."""
    request = denoiser_request(policy, prepared, name=name, model=model, calibration=calibration)
    return replace(
        request,
        attention=_attention(policy, console, calibration, model),
        pipeline_parts=_parts_to_deploy(prepared, calibration, request.conditions),
        full=None if in_float.start == NO_FLOAT_STEPS else prepared.model.denoiser,
        in_float=in_float,
    )


def _parts_to_deploy(
    prepared: Prepared, calibration: CalibrationSet, conditions: Sequence[ConditionInput]
) -> PartsToDeploy | None:
    """Pipeline parts that the deployed folder holds beside the denoiser; None if it holds the denoiser alone."""
    pipeline, formats = prepared.pipeline, prepared.part_formats
    if pipeline is None or not formats:
        return None
    return PartsToDeploy(pipeline, formats, calibration.images, conditions)


def _attention(
    policy: Policy, console: Console, calibration: CalibrationSet, model: nn.Module
) -> dict[str, AttentionRange]:
    """Ranges that the matrix products of attention read on states of the calibration set; empty unless attention runs
    in INT8.
    """
    if policy.quantization.attention == "float":
        return {}
    with working(console, "export: ranges of attention"), frozen_weights(model.eval()):
        return attention_ranges(model, calibration.inputs(RANGE_INPUTS, policy.training.batch_size))


def benchmark(policy: Policy, prepared: Prepared, run: RunFolder, console: Console) -> None:
    """Stage `benchmark`: time every candidate in one run, in turns, from the files that ship."""
    with run.stage("benchmark") as stage:
        if not stage.new:
            return
        runs, files = policy.export.latency_runs, openvino_files(policy, run)
        inputs = example_of(policy, prepared)
        with working(console, f"benchmark: every candidate in turns, {runs} runs each"):
            timings = time_denoisers(prepared.model.denoiser, files, inputs, runs)
            profiles = {name: node_profile(files[name], {}, inputs) for name in PROFILED if name in files}
        sizes = {name: size_bytes(file.parent if file.suffix else file) for name, file in files.items()}
        stage.done(
            BenchmarkRecord(
                timings={name: timing for name, timing in timings.items() if name != FLOAT_STEPS},
                float_step=timings.get(FLOAT_STEPS),
                profiles=profiles,
                sizes={REFERENCE: 4 * sum(p.numel() for p in prepared.model.denoiser.parameters()), **sizes},
                hardware=hardware(),
            )
        )
