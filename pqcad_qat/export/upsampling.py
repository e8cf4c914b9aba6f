"""The convolution of an upsampled image, computed before the upsampling as a sub-pixel convolution (arXiv 1609.05158).

Method, along one axis: nearest upsampling writes every pixel p twice. A kernel (a, b, c) centred on the first copy
(phase 0) reads the pixel before p once and p twice, so its weights on these two pixels are (a, b + c). Centred on the
second copy (phase 1), it reads p twice and the next pixel once, with the weights (a + b, c).

In two dimensions a 3x3 kernel becomes four 2x2 kernels, one for each combination of phases. They run on the small
image, and DepthToSpace interleaves their outputs. The sums are the same, exactly so in integers, with about half the
products. The method is that of Shi et al.

Not here: the other rewrites (graph_rewrites.py).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import openvino as ov
import openvino.opset13 as op

LARGEST_SUM = 64
"""Largest magnitude of a summed weight. Up to it the sums of products are exact on every CPU (see
traceable_modules.needs_vnni). Sums of weights of 4 and 5 bits never exceed it.
"""

SAME_SIZE = {"strides": [1, 1], "dilations": [1, 1], "pads_begin": [1, 1], "pads_end": [1, 1], "auto_pad": "explicit"}
"""Attributes of a 3x3 convolution whose output has the size of its input."""

TWOFOLD = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
"""Attributes of an Interpolate that repeats every pixel, as nearest upsampling does."""


def convolution_before_upsampling(convolution: ov.Node) -> None:
    """Replace an INT8 3x3 convolution of a twofold upsampled image by a sub-pixel convolution.

    Any other convolution is left as it is. So is one with a summed weight beyond LARGEST_SUM.

    The constant of the weights and the input's quantizer stay in the graph. OpenVINO computes the four kernels from
    that constant when it compiles the graph. The new convolution takes the old one's name.

    The new convolution pads by 1 and returns (B, 4 O, H + 1, W + 1): window i covers the pixels i - 1 and i. Its
    channels hold the phases of the image (B, O, 2 H, 2 W). After they are interleaved, one row or column on each side
    belongs to no pixel of the image and is cut off.
    """
    weights, enlarged = _int8_weights(convolution), _enlarged(convolution)
    if weights is None or enlarged is None or _largest_sum(weights.get_node().get_data()) > LARGEST_SUM:
        return
    first, image = enlarged
    # what read the upsampled image, the quantizer or the convolution, reads the small one
    first.replace_source_output(image)
    outputs = weights.get_shape()[0]
    dequantization = convolution.input_value(1).get_node()
    scale = dequantization.input_value(1)
    # scales of single output channels are repeated for the four phases; one scale for all stays as it is
    scales = op.concat([scale] * 4, 0) if list(scale.get_shape())[:1] == [outputs] else scale
    dequantized = op.multiply(op.convert(_phases(weights), "f32"), scales)
    phases = op.convolution(convolution.input_value(0), dequantized, [1, 1], [1, 1], [1, 1], [1, 1])
    phases.set_friendly_name(convolution.get_friendly_name())
    replaced = convolution
    if (added := _bias(convolution)) is not None:
        replaced, bias = added
        phases = op.add(phases, op.concat([bias] * 4, 1))
    whole = op.depth_to_space(phases, "blocks_first", 2)
    # the first and the last row and column come from windows that lie half outside the image
    inside = op.slice(whole, np.array([1, 1]), np.array([-1, -1]), np.array([1, 1]), np.array([2, 3]))
    for reader in replaced.output(0).get_target_inputs():
        reader.replace_source_output(inside.output(0))


def _phases(weights: ov.Output) -> ov.Node:
    """The four 2x2 kernels as one constant: (O, I, 3, 3) -> (4 O, I, 2, 2), phase 1 before phase 0 on each axis.

    Window i, over the pixels i - 1 and i, serves phase 1 of pixel i - 1 and phase 0 of pixel i, in this order.
    """
    return op.concat(
        [_collapsed(_collapsed(weights, 2, row).output(0), 3, column) for row in (1, 0) for column in (1, 0)], 0
    )


def _collapsed(weights: ov.Output, axis: int, phase: int) -> ov.Node:
    """Sum the three weights along an axis to two: (a, b + c) for phase 0, (a + b, c) for phase 1."""
    a, b, c = (op.slice(weights, np.array([k]), np.array([k + 1]), np.array([1]), np.array([axis])) for k in range(3))
    return op.concat([a, op.add(b, c)] if phase == 0 else [op.add(a, b), c], axis)


def _largest_sum(weights: npt.NDArray[np.int8]) -> int:
    """Largest magnitude of any weight or of any sum that a phase's kernel contains."""
    sums = weights.astype(np.int16)
    for axis in (2, 3):
        a, b, c = np.split(sums, 3, axis)
        sums = np.concatenate([a, b, c, a + b, b + c], axis)
    return int(np.abs(sums).max())


def _int8_weights(convolution: ov.Node) -> ov.Output | None:
    """The int8 constant behind Convert and Multiply of a 3x3 convolution that keeps the image's size, or None."""
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
    """The input port that reads the upsampled image, and the image before the upsampling, or None.

    A FakeQuantize, a Clamp and factors of channels may stand between, if nothing else reads them: they act on each
    value alone, so they give the same result before the upsampling.
    """
    reader = convolution.input(0)
    node = reader.get_source_output().get_node()
    while _of_values(node) and len(node.output(0).get_target_inputs()) == 1:
        reader = node.input(0)
        node = reader.get_source_output().get_node()
    if node.get_type_name() != "Interpolate":
        return None
    image, attributes = node.input_value(0), node.get_attributes()
    twofold = list(node.get_output_shape(0))[2:] == [2 * size for size in list(image.get_shape())[2:]]
    return (reader, image) if twofold and all(attributes[key] == value for key, value in TWOFOLD.items()) else None


def _of_values(node: ov.Node) -> bool:
    """Whether a node acts on each value of a picture alone: a quantizer, a clamp, or factors of the channels."""
    if node.get_type_name() == "Multiply":
        factors = node.input_value(1)
        return factors.get_node().get_type_name() == "Constant" and list(factors.get_shape())[-2:] in ([], [1, 1])
    return node.get_type_name() in ("FakeQuantize", "Clamp")


def _bias(convolution: ov.Node) -> tuple[ov.Node, ov.Output] | None:
    """The Add of a constant bias that alone reads the convolution, and the bias (1, O, 1, 1); None without one."""
    readers = [reader.get_node() for reader in convolution.output(0).get_target_inputs()]
    if (
        len(readers) != 1
        or readers[0].get_type_name() != "Add"
        or readers[0].input_value(1).get_node().get_type_name() != "Constant"
    ):
        return None
    return readers[0], readers[0].input_value(1)
