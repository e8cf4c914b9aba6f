"""The convolution of an enlarged image, computed before it is enlarged: a sub-pixel convolution (Shi et al., arXiv
1609.05158).

Nearest upsampling makes four copies of a pixel, and of the nine products that a 3x3 kernel takes of them several are of
one pixel: their weights are added up instead. Four kernels of 2x2, one for each place among the copies, give the same
sums, exact in integers, with half the products. Not here: other rewrites (graph_rewrites.py).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import openvino as ov
import openvino.opset13 as op

LARGEST_SUM = 64
"""Of weights: up to it sums of products are exact on every CPU (modules.needs_vnni); weights of 4 and 5 bits never
exceed it.
"""

SAME_SIZE = {"strides": [1, 1], "dilations": [1, 1], "pads_begin": [1, 1], "pads_end": [1, 1], "auto_pad": "explicit"}
TWOFOLD = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}


def convolution_before_upsampling(convolution: ov.Node) -> None:
    """Put a sub-pixel convolution in the place of a 3x3 convolution in INT8 of an image upsampled twofold; leave any
    other.

    The weights' own constant stays, as does its quantizer: what is computed of it is computed when OpenVINO compiles
    the graph. The new convolution bears the name of the old one. Its output (B, 4 O, H + 1, W + 1) has the phases of
    the image (B, O, 2 H, 2 W) as channels, and around it the half of each outermost window that lies outside.
    """
    weights, enlarged = _int8_weights(convolution), _enlarged(convolution)
    if weights is None or enlarged is None or _largest_sum(weights.get_node().get_data()) > LARGEST_SUM:
        return
    first, image = enlarged
    first.replace_source_output(image)
    outputs, height, width = weights.get_shape()[0], *list(image.get_shape())[2:]
    dequantization = convolution.input_value(1).get_node()
    scale = dequantization.input_value(1)
    scales = op.concat([scale] * 4, 0) if list(scale.get_shape())[:1] == [outputs] else scale
    dequantized = op.multiply(op.convert(_phases(weights), "f32"), scales)
    phases = op.convolution(convolution.input_value(0), dequantized, [1, 1], [1, 1], [1, 1], [1, 1])
    phases.set_friendly_name(convolution.get_friendly_name())
    replaced = convolution
    if (added := _bias(convolution)) is not None:
        replaced, bias = added
        phases = op.add(phases, op.concat([bias] * 4, 1))
    whole = op.depth_to_space(phases, "blocks_first", 2)
    inside = op.slice(
        whole, np.array([1, 1]), np.array([2 * height + 1, 2 * width + 1]), np.array([1, 1]), np.array([2, 3])
    )
    for reader in replaced.output(0).get_target_inputs():
        reader.replace_source_output(inside.output(0))


def _phases(weights: ov.Output) -> ov.Node:
    """(O, I, 3, 3) -> (4 O, I, 2, 2), from the last phase to the first: window i ends with the pixel whose first copy
    is in phase 0.
    """
    return op.concat(
        [_collapsed(_collapsed(weights, 2, row).output(0), 3, column) for row in (1, 0) for column in (1, 0)], 0
    )


def _collapsed(weights: ov.Output, axis: int, phase: int) -> ov.Node:
    """Three weights along an axis -> two: the copies of one pixel are the second and the third in phase 0, the first
    two in phase 1.
    """
    a, b, c = (op.slice(weights, np.array([k]), np.array([k + 1]), np.array([1]), np.array([axis])) for k in range(3))
    return op.concat([a, op.add(b, c)] if phase == 0 else [op.add(a, b), c], axis)


def _largest_sum(weights: npt.NDArray[np.int8]) -> int:
    sums = weights.astype(np.int16)
    for axis in (2, 3):
        a, b, c = np.split(sums, 3, axis)
        sums = np.concatenate([a, b, c, a + b, b + c], axis)
    return int(np.abs(sums).max())


def _int8_weights(convolution: ov.Node) -> ov.Output | None:
    """The int8 constant of a 3x3 convolution that keeps an image's size, behind Convert and Multiply."""
    node, chain = convolution.input_value(1).get_node(), []
    while node.get_input_size():
        chain.append(node.get_type_name())
        node = node.input_value(0).get_node()
    attributes = convolution.get_attributes()
    plain = all(attributes[key] == value for key, value in SAME_SIZE.items())
    fits = (
        chain == ["Multiply", "Convert"]
        and node.get_element_type() == ov.Type.i8
        and list(node.get_output_shape(0))[2:] == [3, 3]
    )
    return node.output(0) if plain and fits else None


def _enlarged(convolution: ov.Node) -> tuple[ov.Input, ov.Output] | None:
    """Who reads the upsampled image on the way to this convolution alone, and the image before."""
    reader = convolution.input(0)
    node = reader.get_source_output().get_node()
    while node.get_type_name() in ("FakeQuantize", "Clamp") and len(node.output(0).get_target_inputs()) == 1:
        reader = node.input(0)
        node = reader.get_source_output().get_node()
    if node.get_type_name() != "Interpolate":
        return None
    image, attributes = node.input_value(0), node.get_attributes()
    twofold = list(node.get_output_shape(0))[2:] == [2 * size for size in list(image.get_shape())[2:]]
    return (reader, image) if twofold and all(attributes[key] == value for key, value in TWOFOLD.items()) else None


def _bias(convolution: ov.Node) -> tuple[ov.Node, ov.Output] | None:
    """The Add of a constant bias, and the bias (1, O, 1, 1)."""
    readers = [reader.get_node() for reader in convolution.output(0).get_target_inputs()]
    if (
        len(readers) != 1
        or readers[0].get_type_name() != "Add"
        or readers[0].input_value(1).get_node().get_type_name() != "Constant"
    ):
        return None
    return readers[0], readers[0].input_value(1)
