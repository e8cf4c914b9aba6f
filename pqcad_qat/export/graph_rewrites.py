"""Rewrites of a converted graph: subgraphs that OpenVINO executes slowly are replaced by equal ones that run faster.

Method: every node is visited once, in execution order. A node that matches a pattern gets a replacement beside it, and
all readers of the node are connected to the replacement. Nodes without readers then drop out of the graph. Shapes and
results stay the same.

Speed was measured on the architecture of google/ddpm-cifar10-32; see the README's benchmark.

Not here: the conversion (export_model.py), and two rewrites with files of their own (normalization.py, upsampling.py).
"""

from __future__ import annotations

import numpy as np
import openvino as ov
import openvino.opset13 as op

from pqcad_qat.export.normalization import channels_last_normalization, redirect
from pqcad_qat.export.upsampling import convolution_before_upsampling


def rewrite(graph: ov.Model) -> None:
    """Apply every rewrite to the graph, in place."""
    for node in graph.get_ordered_ops():
        match node.get_type_name():
            case "Slice" if (source := concatenated_input(node)) is not None:
                redirect(node, source)
            case "ScaledDotProductAttention" if node.get_input_size() == 3 and not node.get_attributes()["causal"]:
                redirect(node, _attention(*node.input_values()).output(0))
            case "GroupNormalization":
                channels_last_normalization(node)
            case "Convolution":
                convolution_before_upsampling(node)
            case "Swish" if node.get_input_size() == 1 and len(node.get_output_shape(0)) == 4:
                redirect(node, _silu(node.input_value(0)).output(0))
    graph.validate_nodes_and_infer_types()


def concatenated_input(node: ov.Node) -> ov.Output | None:
    """The input of a Concat that a Slice takes out whole; None for any other Slice.

    The two convolutions of a split shortcut (quantization/shortcuts.py) read the two halves of a concatenation. They
    can read the inputs of the concatenation directly.
    """
    joined, *bounds = node.input_values()
    if joined.get_node().get_type_name() != "Concat" or any(
        bound.get_node().get_type_name() != "Constant" for bound in bounds
    ):
        return None
    values = [bound.get_node().get_data().tolist() for bound in bounds]
    axis = joined.get_node().get_attributes()["axis"]
    # only a slice with step 1 along the concatenation's one axis can be a whole input of it
    if len(values) != 4 or values[2:] != [[1], [axis]]:
        return None
    # a slice matches an input of the concatenation if it begins where that input begins and has its shape
    begin = 0
    for source in joined.get_node().input_values():
        if begin == values[0][0] and source.get_shape() == node.get_output_shape(0):
            return source
        begin += source.get_shape()[axis]
    return None


def _attention(query: ov.Output, key: ov.Output, value: ov.Output) -> ov.Node:
    """softmax(Q K^T / sqrt(d)) V, where the product itself transposes K.

    OpenVINO's own decomposition of ScaledDotProductAttention transposes K in a separate node.
    """
    scaled = op.multiply(query, np.float32(query.get_shape()[-1] ** -0.5))
    return op.matmul(op.softmax(op.matmul(scaled, key, False, True), -1), value, False, False)


def _silu(x: ov.Output) -> ov.Node:
    """x / (1 + exp(-x)), which takes fewer instructions on a CPU than Swish.

    The factor of the exponent differs from -1 by one unit in the last place. With exactly -1 OpenVINO would recognize
    the pattern and turn it back into Swish.
    """
    return op.divide(x, op.add(op.exp(op.multiply(x, np.nextafter(np.float32(-1), np.float32(-2)))), np.float32(1)))
