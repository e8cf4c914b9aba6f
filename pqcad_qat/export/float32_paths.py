"""Nodes of a graph that depend on times, sizes or positions alone, marked to be computed in float32 on every CPU.

Outside the plan OpenVINO computes in BF16 where the CPU supports it. BF16 rounds time step 999 to 1000, which changes
its sines by up to 2 radians. So this serves the time of users' own modules, the sizes that SDXL reads, and where
patches lie in a graph of Flux for any size.

Not here: the sinusoids of diffusers' classes, which become tables (time_tables.py).
"""

from __future__ import annotations

from collections.abc import Iterable

import openvino as ov

from pqcad_qat.serving.packing import IN_FLOAT32

POINTWISE = {
    *(
        "Abs",
        "Add",
        "Ceiling",
        "Clamp",
        "Divide",
        "Exp",
        "Floor",
        "FloorMod",
        "Gather",
        "Log",
        "Maximum",
        "Minimum",
        "Mod",
        "Multiply",
        "Negative",
    ),
    *("Power", "Round", "Sqrt", "Subtract", "Cos", "Sin", "Tan", "Tanh"),
    *(
        "Broadcast",
        "Concat",
        "Convert",
        "Reshape",
        "Slice",
        "Split",
        "Squeeze",
        "Tile",
        "Transpose",
        "Unsqueeze",
        "VariadicSplit",
    ),
}
"""Types of nodes that make up sinusoids and other functions of numbers. Layers, normalizations and quantizers are not
among them.
"""


def keep_in_float32(graph: ov.Model, inputs: Iterable[str]) -> None:
    """Mark every node computed from these inputs alone, up to the first layer, normalization or activation that reads
    them.

    The mark is the suffix IN_FLOAT32 of the node's name. A node is marked if its type is in POINTWISE, or it is the
    outer product of two vectors, and each of its inputs is computed from constants, or by marked nodes from these
    inputs. Whole numbers need no mark.

    Args:
        graph: a converted graph; it is changed in place.
        inputs: names of inputs of the graph.
    """
    fixed, computed = set[str](), {graph.input(name).get_node().get_friendly_name() for name in inputs}
    for node in graph.get_ordered_ops():
        sources = {value.get_node().get_friendly_name() for value in node.input_values()}
        if sources <= fixed and node.get_type_name() != "Parameter":
            fixed.add(node.get_friendly_name())
        elif sources and sources <= fixed | computed:
            real = node.get_output_size() == 1 and node.get_output_element_type(0).is_real()
            if real and not (node.get_type_name() in POINTWISE or _is_outer_product(node)):
                continue
            if real:
                # packing.write_graph turns the suffix into OpenVINO's own mark
                node.set_friendly_name(f"{node.get_friendly_name()}{IN_FLOAT32}")
            computed.add(node.get_friendly_name())


def _is_outer_product(node: ov.Node) -> bool:
    """Whether a matrix product sums over one number, so that it is as exact as a multiplication."""
    shape = node.get_input_partial_shape(0) if node.get_type_name() == "MatMul" else None
    return shape is not None and shape.rank.is_static and str(shape[len(shape) - 1]) == "1"
