"""A quantized model -> a folder that OpenVINO runs in INT8: conversion, names, packed weights, manifest, all moved into place at once.

Not here: the torch modules that are traced (modules.py), loading (runtime.py) and proof (verification.py).
"""

from __future__ import annotations

import gzip
import json
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import openvino as ov
import torch
from torch import nn

from pqcad_qat.deployment.modules import (
    IntegerConv2d,
    IntegerLinear,
    TracedDenoiser,
    effective_weights,
    needs_vnni,
    swapped,
    timestep_tables,
)
from pqcad_qat.deployment.runtime import (
    GRAPH,
    MANIFEST,
    PACKED_GRAPH,
    SCHEDULER_CONFIG,
    SCHEMA_VERSION,
    UNET_CONFIG,
    WeightFormat,
    pack_int4,
    sha256,
)
from pqcad_qat.diffusion.architectures import ConditionInput
from pqcad_qat.errors import ExportError

if TYPE_CHECKING:
    from pqcad_qat.quantization.quantizers import IntegerLayer

MATRIX_OPS = ("Convolution", "GroupConvolution", "MatMul")
WEIGHTS_NOTE: Mapping[str, str] = {
    "int8": "Every quantized weight is an int8 constant: plain OpenVINO (read_model, compile_model) executes the planned layers in INT8.",
    "int4": "The smallest file: weights that fit are packed to 4 bits and the graph's text is compressed. pqcad_qat.deployment.runtime "
    "unpacks both at load to the graph of the int8 form, bit for bit. For plain OpenVINO export int8 weights: it does not read the "
    "compressed text, and runs convolutions with 4-bit constants in floating point.",
}


@dataclass(frozen=True)
class ExportedFolder:
    """What export_model left.

    Attributes:
        path: the folder.
        manifest: the content of its manifest.json.
        graph_bytes: size of the graph and its weights on disk.
    """

    path: Path
    manifest: Mapping[str, Any]
    graph_bytes: int


def export_model(
    model: nn.Module,
    scheduler_config: Mapping[str, Any],
    layers: Mapping[str, IntegerLayer],
    sample_shape: tuple[int, int, int],
    batch_size: int,
    weights: WeightFormat,
    folder: Path,
    provenance: Mapping[str, Any],
    conditions: Sequence[ConditionInput] = (),
) -> ExportedFolder:
    """Write the deployed form of a quantized model. The model itself is left as it was.

    Args:
        model: quantized denoiser, called by `predict`.
        scheduler_config: diffusers scheduler config the model is sampled with; num_train_timesteps bounds its time steps.
        layers: every planned layer by module path, as integers.
        sample_shape: (C, H, W).
        batch_size: fixed batch of the graph.
        weights: int8 runs anywhere; int4 is packed on disk and needs our runtime.
        folder: where to; an older deployed folder there is replaced, anything else refused.
        provenance: policy, model source and digest, for the manifest.
        conditions: what the denoiser takes beside x_t and t, every size known.

    Raises:
        ExportError: a layer that cannot be expressed or found in the graph, or a folder that holds something else.
    """
    _check_target(folder)
    graph = convert(model, layers, sample_shape, batch_size, _train_timesteps(scheduler_config), conditions)
    packed = _pack(graph, layers) if weights == "int4" else ()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        staging = Path(temporary) / "new"
        written = _write_graph(graph, staging, compress=weights == "int4")
        _write_json(staging / UNET_CONFIG, _config(model))
        _write_json(staging / SCHEDULER_CONFIG, dict(scheduler_config))
        _write_json(staging / "model_index.json", _model_index(scheduler_config))
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "provenance": dict(provenance),
            "graph": written,
            "weights": {"format": weights, "note": WEIGHTS_NOTE[weights]},
            "sample_shape": list(sample_shape),
            "batch_size": batch_size,
            "train_timesteps": _train_timesteps(scheduler_config),
            "conditions": [asdict(condition) for condition in conditions],
            "layers": {name: _layer_entry(layer, name in packed) for name, layer in layers.items()},
            "versions": {name: version(name) for name in ("openvino", "nncf", "torch", "diffusers")},
            "files": _files(staging),
        }
        _write_json(staging / MANIFEST, manifest)
        if folder.exists():
            folder.rename(Path(temporary) / "old")
        staging.rename(folder)
    graph_bytes = sum(path.stat().st_size for path in (folder / GRAPH).parent.glob("openvino_model.*"))
    return ExportedFolder(folder, manifest, graph_bytes)


def convert(
    model: nn.Module,
    layers: Mapping[str, IntegerLayer],
    sample_shape: tuple[int, int, int],
    batch_size: int,
    train_timesteps: int,
    conditions: Sequence[ConditionInput] = (),
) -> ov.Model:
    """The quantized model as an OpenVINO graph in which every planned layer bears its module path as name.

    Inputs `sample` (B, C, H, W) float32, `timestep` (B,) int64, and the conditions by name; output `out_sample` (B, C, H, W) float32.

    Raises:
        ExportError: as export_model.
    """
    modules = dict(model.named_modules())
    if unknown := [name for name in layers if name not in modules]:
        raise ExportError(f"the model has no layer {', '.join(unknown)}")
    replacements: dict[str, nn.Module] = {name: _integer_module(layer) for name, layer in layers.items()}
    replacements |= timestep_tables(model, train_timesteps, layers)
    names = [condition.name for condition in conditions]
    given = [torch.zeros(batch_size, *_sizes(condition), dtype=getattr(torch, condition.dtype)) for condition in conditions]
    example = (torch.zeros(batch_size, *sample_shape), torch.zeros(batch_size, dtype=torch.int64), *given)
    training = model.training
    with swapped(model, replacements), torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Converting a tensor")  # sizes become constants: the graph's are fixed on purpose
        warnings.filterwarnings("ignore", "`torch.jit.trace", DeprecationWarning)  # what OpenVINO's converter traces with too
        denoiser = TracedDenoiser(model, names).eval()
        traced = torch.jit.trace(denoiser, example, check_trace=False, strict=False)  # type: ignore[no-untyped-call]
        graph: ov.Model = ov.convert_model(traced, example_input=example)
    model.train(training)
    graph.reshape({index: list(tensor.shape) for index, tensor in enumerate(example)})
    for port, name in zip(graph.inputs, ("sample", "timestep", *names), strict=True):
        port.get_tensor().set_names({name})
    graph.output(0).get_tensor().set_names({"out_sample"})
    _name_layers(graph, layers)
    _check_groups(graph, layers)
    return graph


def _sizes(condition: ConditionInput) -> list[int]:
    sizes = [size for size in condition.shape if size is not None]
    if len(sizes) < len(condition.shape):
        raise ExportError(f"{condition}: every size of an exported input must be known")
    return sizes


def _integer_module(layer: IntegerLayer) -> nn.Module:
    if layer.kind == "Conv2d":
        return IntegerConv2d(layer)
    if layer.kind == "Linear":
        return IntegerLinear(layer)
    raise ExportError(f"{layer.name}: kind must be Conv2d or Linear, got {layer.kind!r}")


def _name_layers(graph: ov.Model, layers: Mapping[str, IntegerLayer]) -> None:
    """Give each planned layer's convolution or matrix product the layer's module path as its friendly name."""
    found: dict[str, list[ov.Node]] = {name: [] for name in layers}
    for node in graph.get_ordered_ops():
        scope = node.get_friendly_name().partition("/")[0].removeprefix("__module.denoiser.")
        if node.get_type_name() in MATRIX_OPS and scope in found:
            found[scope].append(node)
    wrong = {name: len(nodes) for name, nodes in found.items() if len(nodes) != 1}
    if wrong:
        raise ExportError(f"each planned layer must appear once in the converted graph; times found: {wrong}")
    for name, (node,) in found.items():
        node.set_friendly_name(name)


def _check_groups(graph: ov.Model, layers: Mapping[str, IntegerLayer]) -> None:
    """Layers that share an input quantizer must read one FakeQuantize."""
    sources: dict[str, set[str]] = {}
    for node in graph.get_ordered_ops():
        if (layer := layers.get(node.get_friendly_name())) is not None:
            sources.setdefault(layer.input_group, set()).add(node.input_value(0).get_node().get_friendly_name())
    split = [group for group, names in sources.items() if len(names) > 1]
    if split:
        raise ExportError(f"layers of one input group must read one quantized tensor; these groups read several: {split}")


def _pack(graph: ov.Model, layers: Mapping[str, IntegerLayer]) -> tuple[str, ...]:
    """Store the weights that fit [-8, 7] as int4 constants; returns the names of their layers."""
    packed = []
    for node in graph.get_ordered_ops():
        layer = layers.get(node.get_friendly_name())
        if layer is None or not -8 <= effective_weights(layer).min() <= effective_weights(layer).max() <= 7:
            continue
        constant = _weight_constant(node)
        values = np.array(constant.data, np.int8)
        tensor = ov.Tensor(pack_int4(values), ov.Shape(list(values.shape)), ov.Type.i4)
        replacement = ov.op.Constant(tensor, shared_memory=False)
        replacement.set_friendly_name(constant.get_friendly_name())
        for consumer in constant.output(0).get_target_inputs():
            consumer.replace_source_output(replacement.output(0))
        packed.append(layer.name)
    return tuple(packed)


def _weight_constant(node: ov.Node) -> ov.Node:
    """The integer constant at the root of a layer's weight input."""
    source = node.input_value(1).get_node()
    while source.get_type_name() != "Constant":
        source = source.input_value(0).get_node()
    if source.get_element_type() not in (ov.Type.i8, ov.Type.u8):
        raise ExportError(f"{node.get_friendly_name()}: weights must be int8 in the graph, got {source.get_element_type()}")
    return source


def _train_timesteps(scheduler_config: Mapping[str, Any]) -> int:
    steps = scheduler_config.get("num_train_timesteps")
    if not isinstance(steps, int) or steps < 1:
        raise ExportError(f"the scheduler config must give num_train_timesteps, a whole number above 0, got {steps!r}")
    return steps


def _check_target(folder: Path) -> None:
    if folder.exists() and not (folder / MANIFEST).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise ExportError(f"{folder}: exists and is not a deployed folder; it must be absent, empty, or hold a {MANIFEST}")


def _write_graph(graph: ov.Model, folder: Path, compress: bool) -> str:
    """Write the graph's text and weights; returns the path of the text inside the folder."""
    path = folder / GRAPH
    path.parent.mkdir(parents=True)
    ov.save_model(graph, path, compress_to_fp16=False)
    if not compress:
        return GRAPH
    (folder / PACKED_GRAPH).write_bytes(gzip.compress(path.read_bytes(), mtime=0))
    path.unlink()
    return PACKED_GRAPH


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _config(model: nn.Module) -> dict[str, Any]:
    """The denoiser's diffusers config, less what only its folder of origin knew, and the learned variance that the graph does not give."""
    config = dict(getattr(model, "config", {}))
    if config.get("out_channels") == 2 * config.get("in_channels", 0):
        config["out_channels"] = config["in_channels"]
    return {"_class_name": type(model).__name__} | {key: value for key, value in config.items() if not key.startswith("_")}


def _model_index(scheduler_config: Mapping[str, Any]) -> dict[str, Any]:
    """A model index whose unet the caller brings, since diffusers builds none but its own classes from one."""
    scheduler = str(scheduler_config.get("_class_name", "DDIMScheduler"))
    return {
        "_class_name": scheduler.replace("Scheduler", "Pipeline"),
        "_diffusers_version": version("diffusers"),
        "scheduler": ["diffusers", scheduler],
        "unet": [None, None],
        "_unet_class": "pqcad_qat.deployment.runtime.OVUNet2DModel",
    }


def _layer_entry(layer: IntegerLayer, packed: bool) -> dict[str, Any]:
    return {
        "kind": layer.kind,
        "weight_bits": layer.weight_bits,
        "stored_bits": 4 if packed else 8,
        "input_bits": layer.input_bits,
        "input_group": layer.input_group,
        "needs_vnni": needs_vnni(layer),
    }


def _files(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and digest of every file, by path inside the folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in paths}
