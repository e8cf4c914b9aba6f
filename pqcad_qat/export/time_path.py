"""Nodes of a graph that depend on the time alone, marked to be computed in float32 on every CPU.

This serves users' own modules. Outside the plan OpenVINO computes in BF16 where the CPU supports it. BF16 rounds time
step 999 to 1000, which changes its sines by up to 2 radians.

Not here: the sinusoids of diffusers' classes, which become tables (time_tables.py).
"""

from __future__ import annotations

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
"""Types of nodes that make up sinusoids and other functions of the time. Layers, normalizations and quantizers are not
among them.
"""


def keep_time_in_float32(graph: ov.Model, time: ov.Node) -> None:
    """Mark every node computed from the time alone, up to the first layer, normalization or activation that reads it.

    The mark is the suffix IN_FLOAT32 of the node's name. A node is marked if its type is in POINTWISE and each of its
    inputs is a constant, the time, or a marked node, with at least one that is not constant.

    Args:
        graph: a converted graph; it is changed in place.
        time: the graph's input of the time.
    """
    time_only = {time.get_friendly_name()}
    for node in graph.get_ordered_ops():
        sources = [value.get_node() for value in node.input_values()]
        varying = [source for source in sources if source.get_type_name() != "Constant"]
        if (
            node.get_type_name() not in POINTWISE
            or not varying
            or any(source.get_friendly_name() not in time_only for source in varying)
        ):
            continue
        # packing.write_graph turns the suffix into OpenVINO's own mark
        node.set_friendly_name(f"{node.get_friendly_name()}{IN_FLOAT32}")
        time_only.add(node.get_friendly_name())
