"""Proof that the planned layers of a deployed folder compute the very integers that PyTorch computes.

Method: a planned layer sums products of integers, S = sum(q_x q_w), and returns y = s_x s_w S + bias in float32, where
s_x and s_w are the scales of its input and weights. OpenVINO shows y alone, so S is recovered from y:

1. The layers are cut out of the shipped graph (cut_layers.py), each with its quantizer and its bias, and compiled.
2. Each is fed what it read in PyTorch during one prediction (layer_inputs.py).
3. (y - bias) / (s_x s_w), rounded to a whole number, is OpenVINO's sum. How far it was from a whole number is recorded
   as the resolution: well below 1/2, the rounding is beyond doubt.
4. PyTorch's sum is computed from q_x and q_w in float64, which is exact for whole numbers below 2^53.
5. Both sums must be equal, for every value that the layer returns.

Around the INT8 products everything is computed in float32 (INFERENCE_PRECISION_HINT f32), so that nothing else rounds.

Ties: PyTorch divides an input by its scale, and OpenVINO multiplies it by the inverse. If the quotient lies midway
between two integers, the last bit of this arithmetic decides, and the two may differ. Such values are moved to the grid
point that PyTorch rounds to, for both sides, and are counted.

Everything is read back from the files that ship, not from the model in memory.

Not here: what the layers execute in (execution.py), and the fidelity of images (quality/).
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
from pqcad_qat.export.cut_layers import cut_layers
from pqcad_qat.export.execution import INT8, executed_nodes, layer_precisions
from pqcad_qat.export.traceable_modules import effective_weights
from pqcad_qat.serving.compiled_graph import compile_graph, shared_core
from pqcad_qat.serving.denoiser_graphs import read_graph
from pqcad_qat.serving.deployed_folder import read_manifest
from pqcad_qat.serving.packing import MATRIX_OPS, called_layer

if TYPE_CHECKING:
    from pqcad_qat.quantization.integer_layer import IntegerLayer

BUNDLE_VALUES = 2**25
"""Number of input values at which a bundle of layers is full: some hundred megabytes on either side."""

TIE_BAND = 2.0**-13
"""Largest distance from a tie, in steps of the grid, that counts as one. Float32 arithmetic on a grid of 256 steps errs
by 2^-14 of a step at most.
"""

Float64 = npt.NDArray[np.float64]
"""Array of float64."""


@dataclass(frozen=True)
class LayerParity:
    """Comparison of one layer of the shipped file with its integers in PyTorch.

    Attributes:
        name: path of the layer.
        integers: number of sums that were compared.
        different: number of sums that differ.
        worst_error: largest difference of two sums.
        resolution: largest distance of a recovered sum from a whole number.
        ties: number of input values that lay on a tie and were moved to a grid point.
        inputs: number of input values.
        precision: runtime precision of the layer.
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
        """Whether the layer executed in INT8 and all its sums are PyTorch's."""
        return self.different == 0 and self.precision in INT8


@dataclass(frozen=True)
class ParityReport:
    """Comparison of every planned layer. The worst layer is the one with the largest difference of sums."""

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
    """Compare the integer sums of every planned layer of the shipped file with PyTorch's, on real inputs.

    Args:
        folder: the deployed folder.
        layers: every planned layer, as exported.
        inputs: what each layer reads before its quantizer, (B, C, H, W) or (..., I), for any batch.

    Raises:
        ExportError: a layer has no input, or is not in the shipped graph as planned.
        ModelError: the folder cannot be loaded.
    """
    read_manifest(folder)
    if missing := [name for name in layers if name not in inputs]:
        raise ExportError(
            f"inputs of the layers to compare: got none for {', '.join(missing)}; allowed one for every planned layer"
        )
    core = shared_core()
    graph = read_graph(folder, core)
    products: dict[str, list[ov.Node]] = {}
    # The reference to all nodes lives until the last layer is cut out. Without it, cutting out one layer would delete
    # nodes that a later layer needs.
    all_nodes = graph.get_ordered_ops()
    for node in all_nodes:
        if node.get_type_name() in MATRIX_OPS and (name := called_layer(node.get_friendly_name(), layers)) is not None:
            products.setdefault(name, []).append(node)
    if absent := [name for name in layers if name not in products]:
        raise ExportError(
            f"{folder}: got a graph without the planned layers {', '.join(absent)}; allowed one with all of them"
        )
    return ParityReport(
        tuple(
            parity for bundle in _bundles(layers, inputs) for parity in _bundle_parity(products, layers, bundle, core)
        )
    )


def _bundles(
    layers: Mapping[str, IntegerLayer], inputs: Mapping[str, npt.NDArray[np.float32]]
) -> Iterator[dict[str, _QuantizedInput]]:
    """The quantized inputs of the layers, in order, in bundles that are compared at a time (BUNDLE_VALUES)."""
    bundle: dict[str, _QuantizedInput] = {}
    for name, layer in layers.items():
        bundle[name] = _quantize(layer, inputs[name])
        if sum(quantized.fed.size for quantized in bundle.values()) >= BUNDLE_VALUES:
            yield bundle
            bundle = {}
    if bundle:
        yield bundle


def _bundle_parity(
    products: Mapping[str, Sequence[ov.Node]],
    layers: Mapping[str, IntegerLayer],
    bundle: Mapping[str, _QuantizedInput],
    core: ov.Core,
) -> Iterator[LayerParity]:
    """Compile and compare the layers of one bundle; every call of a layer reads the same input."""
    calls = [(name, product) for name in bundle for product in products[name]]
    cut = cut_layers([(layers[name], product, bundle[name].fed.shape) for name, product in calls])
    compiled = compile_graph(cut, core, properties={"INFERENCE_PRECISION_HINT": "f32"})
    precisions = layer_precisions(executed_nodes(compiled), bundle)
    outputs = compiled([bundle[name].fed for name, _ in calls])
    for name, quantized in bundle.items():
        of_layer = [outputs[index] for index, (called, _) in enumerate(calls) if called == name]
        yield _compare(layers[name], quantized, of_layer, precisions[name])


@dataclass(frozen=True)
class _QuantizedInput:
    """Input of one layer.

    Attributes:
        fed: the values that both sides read, with ties moved to a grid point.
        integers: q_x - zero point.
        ties: number of values that were moved.
    """

    fed: npt.NDArray[np.float32]
    integers: Float64
    ties: int


def _quantize(layer: IntegerLayer, x: npt.NDArray[np.float32]) -> _QuantizedInput:
    """Quantize the input of a layer, and move values on a tie to the grid point that they are rounded to."""
    steps = x.astype(np.float64) / layer.input_scale
    rounded = np.rint(steps)
    low, high = layer.input_low - layer.input_zero_point, layer.input_high - layer.input_zero_point
    inside = (steps > low - 1) & (steps < high + 1)
    ties = inside & (np.abs(np.abs(steps - rounded) - 0.5) < TIE_BAND)
    integers = np.clip(rounded, low, high)
    fed = np.where(ties, (rounded * layer.input_scale).astype(np.float32), x).astype(np.float32)
    return _QuantizedInput(fed, integers, int(ties.sum()))


def _compare(
    layer: IntegerLayer, quantized: _QuantizedInput, outputs: Sequence[npt.NDArray[np.float32]], precision: str
) -> LayerParity:
    """Compare the outputs of every call of a layer, all on the same input, with PyTorch's integers."""
    expected = _sums(layer, quantized.integers)
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


def _sums(layer: IntegerLayer, integers: Float64) -> Float64:
    """Sums of q_x q_w, exact: float64 holds every whole number below 2^53."""
    x, weights = torch.from_numpy(integers), torch.from_numpy(effective_weights(layer).astype(np.float64))
    if layer.kind == "Linear":
        return np.asarray(F.linear(x, weights).numpy())
    return np.asarray(F.conv2d(x, weights, None, layer.stride, layer.padding, layer.dilation, layer.groups).numpy())


def end_to_end_psnr(predicted: npt.ArrayLike, reference: npt.ArrayLike) -> float:
    """PSNR in dB of deployed predictions against a reference on the same states; infinite where they are equal.

    The peak is the range of the reference.

    Raises:
        ExportError: the shapes differ.
    """
    first, second = np.asarray(predicted, np.float64), np.asarray(reference, np.float64)
    if first.shape != second.shape:
        raise ExportError(f"predictions: got shape {first.shape}; allowed {second.shape}, as the reference has")
    error = float(np.mean((first - second) ** 2))
    return float("inf") if error == 0 else float(10 * np.log10(np.ptp(second) ** 2 / error))
