"""Cutting of planned layers out of the shipped graph, so that each can be run alone on an input of its own.

Method: the quantizer of the layer is copied, reads a new Parameter, and feeds the layer's product. A new Result reads
the layer's output. The nodes between are those of the shipped graph.

The new Parameter must mean what the layer's input means in PyTorch. Where the exporter or OpenVINO has moved an
operation past the quantizer, it is put back or left out: a twofold upsampling (upsampling.py), a transposition or
change of shape, or a factor in front of the quantizer.

Not here: the comparison of what the layers compute (proof.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import openvino as ov

from pqcad_qat.errors import ExportError
from pqcad_qat.export.node_marks import quantizer_of

if TYPE_CHECKING:
    from pqcad_qat.quantization.integer_layer import IntegerLayer

Range = npt.NDArray[np.float32]
"""An end of a quantizer's range: one for the whole tensor, or one for each channel, in a shape that broadcasts."""

UPSAMPLED = ([0, 0], [2**31, 2**31], [2, 2], [2, 3])
"""Start, stop, step and axes of the Slice that undoes a twofold upsampling: every second pixel of every second row."""


def cut_layers(calls: Sequence[tuple[IntegerLayer, ov.Node, tuple[int, ...]]]) -> ov.Model:
    """A graph of these layers alone, in order, each from its own Parameter to its own Result.

    Args:
        calls: layer, its product in the shipped graph, and the shape of its input.

    Raises:
        ExportError: a layer is not in the graph as it was exported.
    """
    parameters, results = [], []
    for layer, product, shape in calls:
        parameter = ov.opset13.parameter(list(shape), np.float32)
        output, upsampled = _output(product, layer)
        # a layer that upsamples by itself (upsampling.py) reads the small image
        source = ov.opset13.slice(parameter, *(np.array(value) for value in UPSAMPLED)) if upsampled else parameter
        quantized = _copy_quantizer(layer.name, product, source)
        if product.get_attributes().get("transpose_a"):  # a transposition that OpenVINO has moved into the product
            *outer, last, features = range(len(shape))
            quantized = ov.opset13.transpose(quantized, np.array([*outer, features, last]))
        product.input(0).replace_source_output(quantized.output(0))
        parameters.append(parameter)
        results.append(ov.opset13.result(output))
    return ov.Model(results, parameters)


def _copy_quantizer(name: str, product: ov.Node, source: ov.Node) -> ov.Node:
    """A copy of a product's Clamp and FakeQuantize that reads another source; layers may share the original.

    A transposition or a change of shape that OpenVINO has moved behind the quantizer is left out. The quantizer has one
    scale for the whole tensor, so it gives the same values before and after.
    """
    fake_quantize = quantizer_of(product)
    if fake_quantize is None:
        kind = product.input_value(0).get_node().get_type_name()
        raise ExportError(f"{name}: got an input from {kind} in the shipped graph; allowed one from FakeQuantize")
    ranges = [value.get_node() for value in fake_quantize.input_values()[1:]]
    in_low, in_high, out_low, out_high = (np.asarray(constant.data, np.float32) for constant in ranges)
    source = _in_its_units(source, in_low, in_high, out_low, out_high=out_high)
    before = fake_quantize.input_value(0).get_node()
    if before.get_type_name() == "Clamp":
        bounds = before.get_attributes()
        source = ov.opset13.clamp(source, bounds["min"], bounds["max"])
    return ov.opset13.fake_quantize(source, *ranges, fake_quantize.get_attributes()["levels"])


def _in_its_units(source: ov.Node, in_low: Range, in_high: Range, out_low: Range, *, out_high: Range) -> ov.Node:
    """The source in the units that a FakeQuantize reads.

    OpenVINO fuses a factor before a FakeQuantize into its input range, which then differs from its output range; a
    factor of each channel gives the input a range of each channel.
    """
    if np.array_equal(in_low, out_low) and np.array_equal(in_high, out_high):
        return source
    factor = (in_high - in_low) / (out_high - out_low)
    if np.array_equal(in_low, out_low * factor):  # nothing is added, so that a power of two changes no last bit
        return ov.opset13.multiply(source, factor)
    scaled = ov.opset13.multiply(ov.opset13.subtract(source, out_low), factor)
    return ov.opset13.add(scaled, in_low)


def _output(product: ov.Node, layer: IntegerLayer) -> tuple[ov.Node, bool]:
    """The node that returns the whole output of a layer, and whether the layer upsamples its input by itself.

    That node is the product, or the Add of the bias where there is one. A convolution that upsamples (upsampling.py)
    returns the phases of an image. There it is the Slice behind DepthToSpace, which has made them one image.
    """
    output = product if layer.bias is None else _reader(layer, product, "Add", "of its bias")
    upsamples = {reader.get_node().get_type_name() for reader in output.output(0).get_target_inputs()} == {
        "DepthToSpace"
    }
    if upsamples:
        for kind in ("DepthToSpace", "Slice"):
            output = _reader(layer, output, kind, "of its phases")
    return output, upsamples


def _reader(layer: IntegerLayer, node: ov.Node, kind: str, content: str) -> ov.Node:
    """The only reader of a node, which must be of this kind.

    Raises:
        ExportError: there are several, or it is of another kind.
    """
    readers = [reader.get_node() for reader in node.output(0).get_target_inputs()]
    if len(readers) != 1 or readers[0].get_type_name() != kind:
        kinds = ", ".join(reader.get_type_name() for reader in readers) or "nothing"
        raise ExportError(f"{layer.name}: got {kinds} behind it in the shipped graph; allowed one {kind} {content}")
    return readers[0]
