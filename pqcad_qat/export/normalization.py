"""Group normalization of a converted graph, rewritten as operations that keep the memory layout of the convolutions.

OpenVINO computes GroupNormalization only in the planar layout, while INT8 convolutions read and write channels last.
Every tensor between them therefore changes its layout twice, which costs a tenth of a denoiser call.

Method: the node is replaced by reductions, additions and multiplications. OpenVINO runs each of these in whatever
layout its input has, so no layout changes.

Not here: the other rewrites (graph_rewrites.py).
"""

from __future__ import annotations

from itertools import count

import numpy as np
import numpy.typing as npt
import openvino as ov
import openvino.opset13 as op

from pqcad_qat.serving.packing import IN_FLOAT32

ROWS = [0, 2, 1]
"""Transposition between (B, C, pixels) and (B, pixels, C); it is its own inverse."""


def channels_last_normalization(norm: ov.Node) -> None:
    """Replace a GroupNormalization that has constant gains and offsets by operations that run in any memory layout.

    A GroupNormalization with computed gains or offsets is left as it is.

    diffusers' attention reshapes the image to (B, C, pixels), normalizes it, and transposes the result to rows (B,
    pixels, C). There the image itself is normalized instead. Its rows are then only another view of memory that is
    channels last already.
    """
    if not all(_is_constant(value) for value in norm.input_values()[1:]):
        return
    gamma, beta = (value.get_node().get_data().astype(np.float32) for value in norm.input_values()[1:])
    groups, epsilon = (norm.get_attributes()[key] for key in ("num_groups", "epsilon"))
    source = _image(norm.input_value(0))
    normal = _normalized(source, groups, epsilon, gamma, beta=beta, name=norm.get_friendly_name())
    if len(source.get_shape()) == len(norm.get_output_shape(0)):
        redirect(norm, normal.output(0))
        return
    for reader in norm.output(0).get_target_inputs():
        if _is_transpose(reader.get_node(), ROWS):
            rows = op.reshape(op.transpose(normal, np.array([0, 2, 3, 1])), np.array([0, -1, len(gamma)]), True)
            redirect(reader.get_node(), rows.output(0))
        else:
            reader.replace_source_output(op.reshape(normal, np.array([0, len(gamma), -1]), True).output(0))


def _image(x: ov.Output) -> ov.Output:
    """The image (B, C, H, W) that x (B, C, pixels) was reshaped from; x itself where there is none.

    Two transpositions in a row that cancel each other are skipped.
    """
    node = x.get_node()
    if _is_transpose(node, ROWS) and _is_transpose(node.input_value(0).get_node(), ROWS):
        node = node.input_value(0).get_node().input_value(0).get_node()
    if len(x.get_shape()) != 3 or node.get_type_name() != "Reshape":
        return x
    image = node.input_value(0)
    return image if len(image.get_shape()) == 4 and list(image.get_shape())[:2] == list(x.get_shape())[:2] else x


def _normalized(
    x: ov.Output,
    groups: int,
    epsilon: float,
    gamma: npt.NDArray[np.float32],
    *,
    beta: npt.NDArray[np.float32],
    name: str,
) -> ov.Node:
    """(x - mean) * (gamma / sqrt(variance + epsilon)) + beta, with one mean and variance for each group of channels.

    x is (B, C, ...). The variance is the mean square minus the square of the mean. Both are computed in two stages:
    over the pixels of each channel, which OpenVINO sums in float32 in any layout, then over the channels of each group.

    The second stage handles only a few hundred numbers. They are marked to stay in float32 where the rest of the graph
    runs in BF16, because BF16 would lose the difference of two squares.
    """
    channels, space = len(gamma), list(x.get_shape())[2:]
    pixels, last, numbers = op.constant(np.arange(2, 2 + len(space))), op.constant([2]), count()
    # from the graph, which may be given another size; the product is one of float32, since OpenVINO takes a Convert of
    # whole numbers with a Multiply behind it for the dequantization of INT8
    size = op.reduce_prod(op.convert(op.gather(op.shape_of(x, "i64"), pixels, op.constant(0)), "f32"), op.constant([0]))
    grouped, by_channel = op.constant([0, groups, channels // groups]), op.constant([0, channels, *(1 for _ in space)])

    def precise(node: ov.Node) -> ov.Node:
        node.set_friendly_name(f"{name}/{next(numbers)}{IN_FLOAT32}")
        return node

    def of_group(node: ov.Node) -> ov.Node:
        return precise(op.reshape(node, grouped, True))

    def of_channel(node: ov.Node) -> ov.Node:
        return precise(op.reshape(node, by_channel, True))

    # reduce_l2 over the pixels and then over a group's channels gives the square root of the group's sum of squares.
    mean = precise(op.reduce_mean(of_group(op.reduce_mean(x, pixels, True)), last, True))
    norm = precise(op.reduce_l2(of_group(op.reduce_l2(x, pixels, True)), last, True))
    share = precise(op.multiply(precise(op.multiply(norm, norm)), np.float32(groups / channels)))
    square = precise(op.divide(share, precise(size)))
    variance = precise(op.subtract(square, precise(op.multiply(mean, mean))))
    deviation = precise(op.sqrt(precise(op.add(variance, np.float32(epsilon)))))
    # from here on one number for each channel: a gain, and the negative mean as a shift
    gain = of_channel(precise(op.divide(op.constant(gamma.reshape(1, groups, -1)), deviation)))
    shift = of_channel(precise(op.multiply(mean, op.constant(-np.ones_like(gamma).reshape(1, groups, -1)))))
    normal = op.add(op.multiply(op.add(x, shift), gain), op.constant(beta.reshape(1, channels, *(1 for _ in space))))
    normal.set_friendly_name(name)
    return normal


def _is_constant(value: ov.Output) -> bool:
    return bool(value.get_node().get_type_name() == "Constant")


def _is_transpose(node: ov.Node, order: list[int]) -> bool:
    return bool(
        node.get_type_name() == "Transpose"
        and _is_constant(node.input_value(1))
        and node.input_value(1).get_node().get_data().tolist() == order
    )


def redirect(node: ov.Node, source: ov.Output) -> None:
    """Connect every reader of the node's first output to the source instead."""
    for reader in node.output(0).get_target_inputs():
        reader.replace_source_output(source)
