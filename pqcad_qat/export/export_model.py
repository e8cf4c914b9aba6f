"""Export of a quantized model to a folder that OpenVINO runs in INT8: conversion, node names, configs and manifest.

Not here: the torch modules that are traced (traceable_modules.py), the files (deployed_folder.py), loading (runtime.py)
and proof (proof.py).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import openvino as ov
import torch
from torch import nn

from pqcad_qat import __version__
from pqcad_qat.errors import ExportError, PqcadError
from pqcad_qat.export.graph_rewrites import rewrite
from pqcad_qat.export.int8_attention import AttentionRange, name_products, quantized_attention
from pqcad_qat.export.node_marks import Marked, name_layers
from pqcad_qat.export.part_export import PartsToDeploy, pipeline_index, write_parts
from pqcad_qat.export.time_path import keep_time_in_float32
from pqcad_qat.export.time_tables import Times, known_times, timestep_tables
from pqcad_qat.export.traceable_modules import (
    IntegerConv2d,
    IntegerLinear,
    TracedDenoiser,
    TracedSequence,
    fixed_rotations,
    needs_vnni,
    swapped,
    traced_path,
)
from pqcad_qat.models.families.family import PIPELINE_ROOT, TEXT, ConditionInput
from pqcad_qat.models.families.latent_rows import THOUSANDTHS
from pqcad_qat.models.families.own_module import OWN_MODULE
from pqcad_qat.models.families.table import family_of
from pqcad_qat.models.families.unet import UNCONDITIONAL
from pqcad_qat.models.own_modules import one_line
from pqcad_qat.sampling.trajectory import noise_schedule, written_out
from pqcad_qat.serving.deployed_folder import (
    MODEL_INDEX,
    OPENVINO_CONFIG,
    check_replaceable,
    nothing_further,
    write_folder,
)
from pqcad_qat.serving.graph_inputs import SAMPLE, TIME, port_values, ports_of
from pqcad_qat.serving.manifest import CONFIG, SCHEDULER_CONFIG, SCHEMA_VERSION
from pqcad_qat.serving.packing import WeightFormat

if TYPE_CHECKING:
    from pqcad_qat.quantization.integer_layer import IntegerLayer


@dataclass(frozen=True)
class ExportedFolder:
    """Result of export_model.

    Attributes:
        path: the deployed folder.
        manifest: content of its manifest.json.
        graph_bytes: size of the graph and its weights on disk, in bytes.
    """

    path: Path
    manifest: Mapping[str, Any]
    graph_bytes: int


@dataclass(frozen=True)
class ExportRequest:
    """A quantized model, with everything that its deployed form needs.

    Attributes:
        model: quantized denoiser, called by `predict`.
        scheduler_config: diffusers' config of the scheduler that the model is sampled with. It is written as the config
            of our sampler, with every key.
        layers: every planned layer as integers, by module path.
        sample_shape: shape (C, H, W) of one sample.
        batch_size: fixed batch of the graph.
        provenance: policy, model source and digest, for the manifest.
        conditions: inputs of the denoiser besides x_t and t, with every size known.
        visited: times that a graph of continuous time must know exactly.
        attention: modules whose attention is computed in INT8, and the ranges of what their products read.
        pipeline_parts: pipeline parts written beside the denoiser; None for a denoiser alone.
    """

    model: nn.Module
    scheduler_config: Mapping[str, Any]
    layers: Mapping[str, IntegerLayer]
    sample_shape: tuple[int, int, int]
    batch_size: int
    provenance: Mapping[str, Any] = field(default_factory=dict)
    conditions: Sequence[ConditionInput] = ()
    visited: Sequence[float] = ()
    attention: Mapping[str, AttentionRange] = field(default_factory=dict)
    pipeline_parts: PartsToDeploy | None = None


def export_model(request: ExportRequest, folder: Path, weights: WeightFormat = "int8") -> ExportedFolder:
    """Write the deployed form of a quantized model; the model itself is left unchanged.

    Args:
        request: the model and what its deployed form needs.
        folder: where the deployed folder is written. An older deployed folder there is replaced; anything else is
            refused.
        weights: int8 runs with plain OpenVINO; packed takes fewer bits on disk and needs our runtime.

    Raises:
        ExportError: a layer cannot be expressed or is not found in the graph, or the folder holds something else.
        ModelError: a pipeline part cannot be loaded.
    """
    check_replaceable(folder)
    model, layers, scheduler_config = request.model, request.layers, request.scheduler_config
    conditions, pipeline_parts = request.conditions, request.pipeline_parts
    schedule = noise_schedule(scheduler_config)
    scheduler = written_out(scheduler_config, schedule)
    graph = convert(request, known_times(schedule, request.visited))
    part = family_of(model).part
    texts = {
        f"{part}/{CONFIG}": _config(model),
        SCHEDULER_CONFIG: scheduler,
        MODEL_INDEX: _model_index(model, scheduler, bool(conditions), pipeline_parts),
        OPENVINO_CONFIG: _openvino_config(),
    }
    entries = {name: _layer_entry(layer) for name, layer in layers.items()}
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "provenance": dict(request.provenance),
        "graph": "",
        "weights": {},
        "sample_shape": list(request.sample_shape),
        "batch_size": request.batch_size,
        "train_timesteps": schedule.train_timesteps,
        "timestep_dtype": schedule.timestep_dtype,
        "conditions": [asdict(condition) for condition in conditions],
        "cpu": _cpu(entries),
        "layers": entries,
        "attention": {path: asdict(ranges) for path, ranges in request.attention.items()},
        "versions": {"pqcad-qat": __version__}
        | {name: version(name) for name in ("openvino", "nncf", "torch", "diffusers")},
    }
    further = nothing_further if pipeline_parts is None else partial(write_parts, pipeline_parts)
    written = write_folder(graph, weights, texts, manifest, folder=folder, part=part, further=further)
    graph_bytes = sum(path.stat().st_size for path in (folder / part).glob("openvino_model.*"))
    return ExportedFolder(folder, written, graph_bytes)


def convert(request: ExportRequest, times: Times) -> ov.Model:
    """Convert the quantized model to an OpenVINO graph whose planned layers are named by module path (node_marks.py).

    Method: modules that OpenVINO cannot read, such as Brevitas's layers, are swapped for plain ones while the model is
    traced. The traced module is converted, the layers are named by their marks, and the faster subgraphs are put in
    (graph_rewrites.py).

    The inputs are `sample` (`hidden_states` for a transformer), (B, C, H, W) float32; `timestep`, (B,) int64, or
    float32 for continuous time; and the conditions by name. The output is `out_sample`, (B, C, H, W) float32. For Flux,
    states and output are rows of patches, and the positions of the patches are inputs too (graph_inputs.py).

    Raises:
        ExportError: as export_model.
    """
    model, layers, conditions, attention = request.model, request.layers, request.conditions, request.attention
    sample_shape, batch_size = request.sample_shape, request.batch_size
    modules = dict(model.named_modules())
    if unknown := [name for name in layers if name not in modules]:
        raise ExportError(f"layers: got {', '.join(unknown)}; allowed paths of the model's own modules")
    replacements: dict[str, nn.Module] = {
        name: Marked(_integer_module(layer), k) for k, (name, layer) in enumerate(layers.items())
    }
    family = family_of(model)
    replacements |= timestep_tables(model, times, layers, THOUSANDTHS if family.takes_rows else 1)
    texts = [condition.shape[0] for condition in conditions if condition.name == TEXT]
    replacements |= fixed_rotations(model, sample_shape, texts[0] if texts else None)
    names = [condition.name for condition in conditions]
    zeros = {condition.name: np.zeros((batch_size, *_sizes(condition)), condition.dtype) for condition in conditions}
    time = np.zeros(batch_size, np.float32 if isinstance(times, torch.Tensor) else np.int64)
    ports = ports_of(family, names)
    inputs = port_values(
        [{name} for name in ports], {SAMPLE: np.zeros((batch_size, *sample_shape), np.float32), TIME: time, **zeros}
    )
    example = tuple(torch.from_numpy(value) for value in inputs.values())
    training = model.training
    with swapped(model, replacements), torch.no_grad(), warnings.catch_warnings():
        # the tracer warns that sizes become constants, which is intended: the graph has fixed sizes
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        # OpenVINO's converter uses torch.jit.trace as well
        warnings.filterwarnings("ignore", "`torch.jit.trace", DeprecationWarning)
        denoiser = (TracedSequence if family.takes_rows else TracedDenoiser)(model, names).eval()
        with quantized_attention(model, attention):
            graph = _converted(denoiser, example)
    model.train(training)
    graph.reshape({index: list(tensor.shape) for index, tensor in enumerate(example)})
    name_layers(graph, layers)
    rewrite(graph)
    for port, name in zip(graph.inputs, ports, strict=True):
        port.get_tensor().set_names({name})
    graph.output(0).get_tensor().set_names({"out_sample"})
    name_products(graph, attention)
    if family is OWN_MODULE:
        keep_time_in_float32(graph, graph.input(TIME).get_node())
    return graph


def _converted(denoiser: nn.Module, example: tuple[torch.Tensor, ...]) -> ov.Model:
    """Trace the denoiser and convert the trace.

    Raises:
        ExportError: torch cannot trace it, or OpenVINO has no operation for what was traced.
    """
    try:
        traced: Any = torch.jit.trace(  # type: ignore[no-untyped-call]
            denoiser, example, check_trace=False, strict=False
        )
    except PqcadError:
        raise
    except Exception as error:  # a user's own module may raise anything
        raise ExportError(
            f"tracing the network: got {one_line(error)}; allowed a network that torch.jit.trace can follow"
        ) from error
    try:
        return ov.convert_model(traced, example_input=example)
    except Exception as error:  # OpenVINO raises many classes
        fault = _unconverted(str(error), traced)
        raise ExportError(f"OpenVINO's conversion: got {fault}; allowed operations that OpenVINO has") from error


def _unconverted(explanation: str, traced: Any) -> str:
    """What OpenVINO could not convert in the trace, in one line.

    The line names the operations without a conversion rule and the modules that use them. If OpenVINO's explanation
    names none, its last line is quoted.
    """
    operations = re.findall(
        r"\b\w+::\w+\b", " ".join(line for line in explanation.splitlines() if "No conversion rule" in line)
    )
    if not operations:
        lines = [line.strip() for line in explanation.splitlines() if line.strip()]
        return lines[-1][:300] if lines else "an error without a reason"
    graph = traced.inlined_graph  # kept in a variable: its nodes are valid only while it lives
    places = {
        traced_path(node.scopeName().rpartition("/")[2]) for name in operations for node in graph.findAllNodes(name)
    }
    where = f", in {', '.join(sorted(filter(None, places)))}" if any(places) else ""
    return f"{', '.join(operations)}{where}"


def _sizes(condition: ConditionInput) -> list[int]:
    """The sizes of a condition for one sample.

    Raises:
        ExportError: a size is unknown.
    """
    sizes = [size for size in condition.shape if size is not None]
    if len(sizes) < len(condition.shape):
        raise ExportError(
            f"condition {condition.name}: got the shape {condition.shape}; allowed sizes that are all known"
        )
    return sizes


def _integer_module(layer: IntegerLayer) -> nn.Module:
    """The plain torch module that computes a layer with its integers.

    Raises:
        ExportError: the layer is neither a Conv2d nor a Linear.
    """
    if layer.kind == "Conv2d":
        return IntegerConv2d(layer)
    if layer.kind == "Linear":
        return IntegerLinear(layer)
    raise ExportError(f"{layer.name}: kind: got {layer.kind!r}; allowed Conv2d or Linear")


def _config(model: nn.Module) -> dict[str, Any]:
    """The denoiser's diffusers config, as the deployed folder states it.

    Private keys are left out. Where the model also predicts a variance, which the graph does not return, `out_channels`
    is halved.
    """
    config = dict(getattr(model, "config", {}))
    if config.get("out_channels") == 2 * config.get("in_channels", 0):
        config["out_channels"] = config["in_channels"]
    return {"_class_name": type(model).__name__} | {
        key: value for key, value in config.items() if not key.startswith("_")
    }


def _model_index(
    model: nn.Module, scheduler_config: Mapping[str, Any], conditional: bool, pipeline_parts: PartsToDeploy | None
) -> dict[str, Any]:
    """diffusers' model_index.json of the deployed folder.

    With pipeline parts it names the source's pipeline; an unconditional denoiser alone gets an unconditional pipeline.
    diffusers has no pipeline for a conditional denoiser alone, so that index names the base class of all pipelines.
    """
    scheduler = scheduler_config["_class_name"]
    known = {"_diffusers_version": version("diffusers"), "scheduler": ["diffusers", scheduler]}
    family = family_of(model)
    if pipeline_parts is not None:
        return pipeline_index(pipeline_parts, family.runtime) | known
    pipeline = PIPELINE_ROOT if conditional else UNCONDITIONAL[scheduler]
    return {"_class_name": pipeline, **known, family.part: list(family.runtime)}


def _openvino_config() -> dict[str, Any]:
    """The config that optimum-intel writes beside a quantized model; `manifest.json` says more."""
    return {"dtype": "int8", "input_info": None, "quantization_config": None, "save_onnx_model": False}


def _layer_entry(layer: IntegerLayer) -> dict[str, Any]:
    """The manifest's entry of one layer."""
    return {
        "kind": layer.kind,
        "weight_bits": layer.weight_bits,
        "stored_bits": 8,
        "input_bits": layer.input_bits,
        "input_group": layer.input_group,
        "needs_vnni": needs_vnni(layer),
    }


def _cpu(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The manifest's note on the CPUs where the integer sums are exact."""
    needing = [name for name, entry in entries.items() if entry["needs_vnni"]]
    note = (
        "without VNNI the integer sums of these layers may overflow"
        if needing
        else "the integer sums are exact with AVX2 and better"
    )
    return {"exact_from": "vnni" if needing else "avx2", "layers_that_need_vnni": needing, "note": note}
