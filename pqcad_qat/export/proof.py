"""Proof that the planned layers of a deployed folder compute the very integers that PyTorch computes.

Not here: what they execute in (execution.py), and the fidelity of images (quality/). Everything is read back from the
files that ship.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import openvino as ov
import torch
import torch.nn.functional as F

from pqcad_qat.errors import ExportError
from pqcad_qat.export.execution import INT8, executed_nodes, layer_precisions
from pqcad_qat.export.node_marks import quantizer_of
from pqcad_qat.export.traceable_modules import effective_weights
from pqcad_qat.serving.compiled_graph import compile_graph, shared_core
from pqcad_qat.serving.deployed_folder import read_graph, read_manifest
from pqcad_qat.serving.packing import MATRIX_OPS, called_layer

if TYPE_CHECKING:
    from pqcad_qat.quantization.quantized_layer import IntegerLayer

PART_VALUES = 2**25
"""Input values of the layers that are compared at a time: some hundred megabytes on either side."""
UPSAMPLED = ([0, 0], [2**31, 2**31], [2, 2], [2, 3])
"""Slice's bounds, steps and axes that take an upsampled image to what it was upsampled from: every second pixel of
every second row.
"""

TIE_BAND = 2.0**-13  # in steps; float32 arithmetic on a grid of 256 steps errs by at most 2^-14 of one
Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class LayerParity:
    """One layer of the shipped file against its integers in PyTorch.

    Attributes:
        integers: accumulators compared.
        different: how many differ.
        worst_error: largest difference of two accumulators.
        resolution: largest distance of a recovered accumulator from a whole number; beside 0.5 the float32 output tells
            them apart.
        ties: input values that lay on a rounding boundary to within float32 error, and were moved to their grid point
            for both sides.
        inputs: input values in all.
        precision: what the layer executed in.
    """

    name: str
    integers: int
    different: int
    worst_error: int
    resolution: float
    ties: int
    inputs: int
    precision: str

    @property
    def exact(self) -> bool:
        return self.different == 0 and self.precision in INT8


@dataclass(frozen=True)
class ParityReport:
    """Every planned layer's LayerParity; the worst is the one with the largest difference of integers."""

    layers: tuple[LayerParity, ...]

    @property
    def layers_checked(self) -> int:
        return len(self.layers)

    @property
    def layers_exact(self) -> int:
        return sum(layer.exact for layer in self.layers)

    @property
    def worst_layer(self) -> str:
        return self._worst.name

    @property
    def worst_error(self) -> int:
        return self._worst.worst_error

    @property
    def _worst(self) -> LayerParity:
        return max(self.layers, key=lambda layer: (not layer.exact, layer.worst_error, layer.different))


def layer_parity(
    folder: Path, layers: Mapping[str, IntegerLayer], inputs: Mapping[str, npt.NDArray[np.float32]]
) -> ParityReport:
    """Feed each planned layer of the shipped file a real input and compare its integer accumulators with exact ones.

    The layers are cut out of the shipped graph from the input of their quantizer to the output of their bias, as many
    in one graph as PART_VALUES allows, and compiled with INFERENCE_PRECISION_HINT f32, so that nothing around the INT8
    arithmetic rounds. The accumulators follow from the output, round((y - bias) / (s_x s_w)), and are compared with q_x
    * q_w computed in float64, where such sums are exact.

    Values within TIE_BAND of a rounding boundary are decided by the last bit of float32 arithmetic (PyTorch divides by
    the scale, OpenVINO multiplies by its inverse); they are moved to their grid point on both sides, and counted.

    Args:
        folder: a deployed folder.
        layers: every planned layer, as exported.
        inputs: the tensor each layer reads before its quantizer, (B, C, H, W) or (..., I), any batch.

    Raises:
        ExportError: a layer has no input, or is not in the shipped graph as planned.
        ModelError: a folder that cannot be loaded.
    """
    read_manifest(folder)
    missing = [name for name in layers if name not in inputs]
    if missing:
        raise ExportError(f"layer_parity needs an input for every planned layer; none was given for {missing}")
    core = shared_core()
    graph = read_graph(folder, core)
    nodes: dict[str, list[ov.Node]] = {}
    # until the last layer is cut out: what only a layer before it needs would go with that one
    held = graph.get_ordered_ops()
    for node in held:
        if node.get_type_name() in MATRIX_OPS and (name := called_layer(node.get_friendly_name(), layers)) is not None:
            nodes.setdefault(name, []).append(node)
    if absent := [name for name in layers if name not in nodes]:
        raise ExportError(f"{', '.join(absent)}: planned, but the shipped graph has no such layer")
    return ParityReport(
        tuple(parity for part in _parts(layers, inputs) for parity in _part_parity(nodes, layers, part, core))
    )


def _parts(
    layers: Mapping[str, IntegerLayer], inputs: Mapping[str, npt.NDArray[np.float32]]
) -> Iterator[dict[str, _QuantizedInput]]:
    """The layers' quantized inputs, in order, as many at a time as PART_VALUES allows, one at least."""
    part: dict[str, _QuantizedInput] = {}
    for name, layer in layers.items():
        part[name] = _quantize(layer, inputs[name])
        if sum(quantized.fed.size for quantized in part.values()) >= PART_VALUES:
            yield part
            part = {}
    if part:
        yield part


def _part_parity(
    nodes: Mapping[str, Sequence[ov.Node]],
    layers: Mapping[str, IntegerLayer],
    part: Mapping[str, _QuantizedInput],
    core: ov.Core,
) -> Iterator[LayerParity]:
    calls = [(name, node) for name in part for node in nodes[name]]
    cut = _cut([(layers[name], node, part[name].fed.shape) for name, node in calls])
    compiled = compile_graph(cut, core, properties={"INFERENCE_PRECISION_HINT": "f32"})
    precisions = layer_precisions(executed_nodes(compiled), part)
    outputs = compiled([part[name].fed for name, _ in calls])
    for name, quantized in part.items():
        of_layer = [outputs[index] for index, (called, _) in enumerate(calls) if called == name]
        yield _compare(layers[name], quantized, of_layer, precisions[name])


@dataclass(frozen=True)
class _QuantizedInput:
    fed: npt.NDArray[np.float32]  # what both sides are given
    integers: Float64  # q_x - zero point
    ties: int


def _quantize(layer: IntegerLayer, x: npt.NDArray[np.float32]) -> _QuantizedInput:
    """An input's integers, and the input itself with the values on a rounding boundary moved to their grid point."""
    steps = x.astype(np.float64) / layer.input_scale
    rounded = np.rint(steps)
    low, high = layer.input_low - layer.input_zero_point, layer.input_high - layer.input_zero_point
    inside = (steps > low - 1) & (steps < high + 1)
    ties = inside & (np.abs(np.abs(steps - rounded) - 0.5) < TIE_BAND)
    integers = np.clip(rounded, low, high)
    fed = np.where(ties, (rounded * layer.input_scale).astype(np.float32), x).astype(np.float32)
    return _QuantizedInput(fed, integers, int(ties.sum()))


def _cut(calls: Sequence[tuple[IntegerLayer, ov.Node, tuple[int, ...]]]) -> ov.Model:
    """These layers alone, each from its own Parameter of a shape to its own Result, in that order; the nodes are the
    shipped graph's.
    """
    parameters, results = [], []
    for layer, node, shape in calls:
        parameter = ov.opset13.parameter(list(shape), np.float32)
        output, upsampled = _with_bias(node, layer)
        source = ov.opset13.slice(parameter, *(np.array(value) for value in UPSAMPLED)) if upsampled else parameter
        quantized = _copy_quantizer(layer.name, node, source)
        if node.get_attributes().get("transpose_a"):  # a transposition that OpenVINO has moved into the product
            *outer, last, features = range(len(shape))
            quantized = ov.opset13.transpose(quantized, np.array([*outer, features, last]))
        node.input(0).replace_source_output(quantized.output(0))
        parameters.append(parameter)
        results.append(ov.opset13.result(output))
    return ov.Model(results, parameters)


def _copy_quantizer(name: str, product: ov.Node, source: ov.Node) -> ov.Node:
    """The shipped Clamp and FakeQuantize over another source; a copy, since layers may share them.

    OpenVINO may move a transposition or a change of shape behind a quantizer: of one scale a tensor, it is the same
    before and after.
    """
    fake_quantize = quantizer_of(product)
    if fake_quantize is None:
        got = product.input_value(0).get_node().get_type_name()
        raise ExportError(f"{name}: its input must come from a FakeQuantize in the shipped graph, got {got}")
    ranges = [value.get_node() for value in fake_quantize.input_values()[1:]]
    in_low, in_high, out_low, out_high = (float(np.asarray(constant.data).item()) for constant in ranges)
    source = _in_its_units(source, in_low, in_high, out_low, out_high=out_high)
    before = fake_quantize.input_value(0).get_node()
    if before.get_type_name() == "Clamp":
        bounds = before.get_attributes()
        source = ov.opset13.clamp(source, bounds["min"], bounds["max"])
    return ov.opset13.fake_quantize(source, *ranges, fake_quantize.get_attributes()["levels"])


def _in_its_units(source: ov.Node, in_low: float, in_high: float, out_low: float, *, out_high: float) -> ov.Node:
    """The source in the units that a FakeQuantize reads: OpenVINO moves a factor before it into its input range."""
    if (in_low, in_high) == (out_low, out_high):
        return source
    shifted = ov.opset13.subtract(source, np.float32(out_low))
    scaled = ov.opset13.multiply(shifted, np.float32((in_high - in_low) / (out_high - out_low)))
    return ov.opset13.add(scaled, np.float32(in_low))


def _with_bias(node: ov.Node, layer: IntegerLayer) -> tuple[ov.Node, bool]:
    """The shipped Add of the bias, or the product itself where the layer has none; and whether it upsamples what it
    reads.

    In that case (upsampling.py) the whole image lies behind its phases.
    """
    if layer.bias is not None:
        node = _reader(layer, node, "Add", "its bias must be one Add")
    phases = {reader.get_node().get_type_name() for reader in node.output(0).get_target_inputs()} == {"DepthToSpace"}
    if phases:
        for kind in ("DepthToSpace", "Slice"):
            node = _reader(layer, node, kind, "its phases must become one image")
    return node, phases


def _reader(layer: IntegerLayer, node: ov.Node, kind: str, rule: str) -> ov.Node:
    readers = [reader.get_node() for reader in node.output(0).get_target_inputs()]
    if len(readers) != 1 or readers[0].get_type_name() != kind:
        raise ExportError(
            f"{layer.name}: {rule} in the shipped graph, got {[reader.get_type_name() for reader in readers]}"
        )
    return readers[0]


def _compare(
    layer: IntegerLayer, quantized: _QuantizedInput, outputs: Sequence[npt.NDArray[np.float32]], precision: str
) -> LayerParity:
    """`outputs`: of every call of the layer, each on the same input."""
    expected = _accumulators(layer, quantized.integers)
    channels = (-1,) + (1,) * (len(layer.stride) if layer.kind == "Conv2d" else 0)
    scale = np.asarray(layer.weight_scale, np.float64).reshape(channels) * layer.input_scale
    bias = 0.0 if layer.bias is None else np.asarray(layer.bias, np.float64).reshape(channels)
    recovered = np.stack([(output.astype(np.float64) - bias) / scale for output in outputs])
    error = np.abs(np.rint(recovered) - expected)
    return LayerParity(
        name=layer.name,
        integers=error.size,
        different=int(np.count_nonzero(error)),
        worst_error=int(error.max()),
        resolution=float(np.abs(recovered - np.rint(recovered)).max()),
        ties=quantized.ties,
        inputs=quantized.fed.size,
        precision=precision,
    )


def _accumulators(layer: IntegerLayer, integers: Float64) -> Float64:
    """Sums of q_x * q_w, exact: below 2^53 float64 holds every whole number."""
    x, weights = torch.from_numpy(integers), torch.from_numpy(effective_weights(layer).astype(np.float64))
    if layer.kind == "Linear":
        return np.asarray(F.linear(x, weights).numpy())
    return np.asarray(F.conv2d(x, weights, None, layer.stride, layer.padding, layer.dilation, layer.groups).numpy())


def end_to_end_psnr(predicted: npt.ArrayLike, reference: npt.ArrayLike) -> float:
    """PSNR in dB of deployed predictions against the quantized PyTorch model's on the same states; the peak is the
    reference's range.

    Infinite where they are equal.
    """
    first, second = np.asarray(predicted, np.float64), np.asarray(reference, np.float64)
    if first.shape != second.shape:
        raise ExportError(f"predictions and reference must have one shape, got {first.shape} and {second.shape}")
    error = float(np.mean((first - second) ** 2))
    return float("inf") if error == 0 else float(10 * np.log10(np.ptp(second) ** 2 / error))
