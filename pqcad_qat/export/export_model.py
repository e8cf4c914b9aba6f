"""Export of a quantized model to a folder that OpenVINO runs in INT8: conversion, node names, and the manifest.

Not here: the torch modules that are traced (traceable_modules.py), the contents of the configs (folder_configs.py), the
files (deployed_folder.py), loading (runtime.py) and proof (proof.py).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import openvino as ov
import torch
from torch import nn

from pqcad_qat import __version__
from pqcad_qat.errors import ExportError, PqcadError
from pqcad_qat.export.float32_paths import keep_in_float32
from pqcad_qat.export.folder_configs import cpu_entry, exported_config, layer_entry, model_index, openvino_config
from pqcad_qat.export.graph_rewrites import rewrite
from pqcad_qat.export.int8_attention import AttentionRange, name_products, quantized_attention
from pqcad_qat.export.model_server import server_graph
from pqcad_qat.export.node_marks import Marked, name_layers
from pqcad_qat.export.part_export import PartsToDeploy, write_parts
from pqcad_qat.export.time_tables import Times, known_times, timestep_tables
from pqcad_qat.export.traceable_modules import (
    IntegerConv2d,
    IntegerLinear,
    TracedDenoiser,
    TracedSequence,
    fixed_rotations,
    swapped,
    traced_path,
)
from pqcad_qat.machine.files import write_file
from pqcad_qat.models.families.family import TEXT, ConditionInput
from pqcad_qat.models.families.latent_rows import PLACES, THOUSANDTHS
from pqcad_qat.models.families.plain_module import OWN_MODULE
from pqcad_qat.models.families.table import family_of
from pqcad_qat.models.module_preparation import one_line
from pqcad_qat.sampling.ddpm_schedule import DDPMSchedule
from pqcad_qat.sampling.precision_by_time import StepsInFloat
from pqcad_qat.sampling.schedulers import SQUARED_COSINE, STEPS
from pqcad_qat.sampling.trajectory import noise_schedule, written_out
from pqcad_qat.serving.deployed_folder import (
    MODEL_INDEX,
    OPENVINO_CONFIG,
    SERVER_GRAPH,
    check_replaceable,
    write_folder,
)
from pqcad_qat.serving.graph_inputs import SAMPLE, TIME, free_shape, port_values, ports_of
from pqcad_qat.serving.manifest import CONFIG, FLOAT_GRAPH, SCHEDULER_CONFIG, SCHEMA_VERSION
from pqcad_qat.serving.packing import WeightFormat, halve_weights, write_graph

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
        batch_size: batch of the graph.
        provenance: policy, model source and digest, for the manifest.
        conditions: inputs of the denoiser besides x_t and t, with every size known.
        visited: times that a graph of continuous time must know exactly.
        attention: modules whose attention is computed in INT8, and the ranges of what their products read.
        pipeline_parts: pipeline parts written beside the denoiser; None for a denoiser alone.
        full: full-precision denoiser that computes the float steps; None where there are none.
        in_float: the steps that it computes.
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
    full: nn.Module | None = None
    in_float: StepsInFloat = field(default_factory=StepsInFloat)

    @property
    def any_size(self) -> bool:
        """Whether the graph takes any batch and size of image, as the pipelines of other runtimes ask for."""
        return self.pipeline_parts is not None and self.pipeline_parts.for_genai


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
    family, pipeline_parts = family_of(model), request.pipeline_parts
    conditions = [
        replace(condition, dtype="float32") if condition.name in family.float_ports else condition
        for condition in request.conditions
    ]
    request = replace(request, conditions=conditions)
    schedule = noise_schedule(scheduler_config)
    scheduler = written_out(scheduler_config, schedule)
    if request.any_size and scheduler.get("beta_schedule") == SQUARED_COSINE and isinstance(schedule, DDPMSchedule):
        # OpenVINO GenAI does not know the curve by name
        scheduler |= schedule.spelled_out
    times = known_times(schedule, request.visited)
    graph = convert(request, times)
    part = family.part
    texts = {
        f"{part}/{CONFIG}": exported_config(model),
        SCHEDULER_CONFIG: scheduler,
        MODEL_INDEX: model_index(model, scheduler, bool(conditions), pipeline_parts),
        OPENVINO_CONFIG: openvino_config(),
    }
    entries = {name: layer_entry(layer) for name, layer in layers.items()}
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "provenance": dict(request.provenance),
        "graph": "",
        "weights": {},
        "sample_shape": list(request.sample_shape),
        "batch_size": request.batch_size,
        "any_size": request.any_size,
        "train_timesteps": schedule.train_timesteps,
        "timestep_dtype": schedule.timestep_dtype,
        "conditions": [asdict(condition) for condition in conditions],
        "cpu": cpu_entry(entries),
        "layers": entries,
        "attention": {path: asdict(ranges) for path, ranges in request.attention.items()},
        "float_start": None if request.full is None else request.in_float.start,
        "float_stops": [list(times) for times in request.in_float.stops],
        "versions": {"pqcad-qat": __version__}
        | {name: version(name) for name in ("openvino", "nncf", "torch", "diffusers")},
    }

    def further(staging: Path) -> Mapping[str, Any]:
        if request.full is not None:
            full = convert(replace(request, model=request.full, layers={}, attention={}), times)
            halve_weights(full)
            write_graph(full, staging / part / FLOAT_GRAPH)
        if pipeline_parts is None:
            return {}
        if request.any_size and weights == "int8":  # programs that read packed weights are ours
            height, width = (side * pipeline_parts.pixels for side in request.sample_shape[1:])
            text = server_graph((height, width), scheduler_config.get(STEPS))
            write_file(staging / SERVER_GRAPH, text)
        return write_parts(pipeline_parts, staging)

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

    A graph of any size takes any B, H and W, and a time for each sample or one for all.

    Raises:
        ExportError: as export_model.
    """
    model, family, attention = request.model, family_of(request.model), request.attention
    free = request.any_size
    names = [condition.name for condition in request.conditions]
    ports = ports_of(family, names)
    stand_ins = _stand_ins(request, times, rotations=not free)
    example = _example(request, times, ports)
    training = model.training
    with swapped(model, stand_ins), torch.no_grad(), warnings.catch_warnings():
        # the tracer warns that sizes become constants, which is intended: the graph has fixed sizes
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        # OpenVINO's converter uses torch.jit.trace as well
        warnings.filterwarnings("ignore", "`torch.jit.trace", DeprecationWarning)
        denoiser = (TracedSequence if family.takes_rows else TracedDenoiser)(model, names).eval()
        with quantized_attention(model, attention):
            graph = _converted(denoiser, example)
    model.train(training)
    shapes = {name: list(tensor.shape) for name, tensor in zip(ports, example, strict=True)}
    graph.reshape({index: shapes[name] for index, name in enumerate(ports)})
    name_layers(graph, request.layers)
    rewrite(graph)
    for port, name in zip(graph.inputs, ports, strict=True):
        port.get_tensor().set_names({name})
    graph.output(0).get_tensor().set_names({"out_sample"})
    name_products(graph, attention)
    computed = {*((TIME,) if family is OWN_MODULE else ()), *family.float_ports, *(PLACES if free else ())}
    keep_in_float32(graph, computed & set(ports))
    if free:
        graph.reshape({port: free_shape(name, shapes[name]) for port, name in zip(graph.inputs, ports, strict=True)})
    return graph


def _stand_ins(request: ExportRequest, times: Times, *, rotations: bool) -> dict[str, nn.Module]:
    """The modules that stand in for the model's own while it is traced, by module path; with `rotations` also for
    those that are constant in a graph of one size.

    Raises:
        ExportError: a layer is no module of the model, or cannot be expressed.
    """
    model, layers = request.model, request.layers
    modules = dict(model.named_modules())
    if unknown := [name for name in layers if name not in modules]:
        raise ExportError(f"layers: got {', '.join(unknown)}; allowed paths of the model's own modules")
    texts = [condition.shape[0] for condition in request.conditions if condition.name == TEXT]
    marked = {name: Marked(_integer_module(layer), place) for place, (name, layer) in enumerate(layers.items())}
    return {
        **marked,
        **timestep_tables(model, times, layers, THOUSANDTHS if family_of(model).takes_rows else 1),
        **(fixed_rotations(model, request.sample_shape, texts[0] if texts else None) if rotations else {}),
    }


def _example(request: ExportRequest, times: Times, ports: Sequence[str]) -> tuple[torch.Tensor, ...]:
    """Zeros for every input of the graph, in the order of its ports, with which the model is traced.

    Raises:
        ExportError: a size of a condition is unknown.
    """
    batch = request.batch_size
    zeros = {
        SAMPLE: np.zeros((batch, *request.sample_shape), np.float32),
        TIME: np.zeros(batch, np.float32 if isinstance(times, torch.Tensor) else np.int64),
        **{condition.name: np.zeros((batch, *_sizes(condition)), condition.dtype) for condition in request.conditions},
    }
    inputs = port_values([{name} for name in ports], zeros)
    return tuple(torch.from_numpy(value) for value in inputs.values())


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
