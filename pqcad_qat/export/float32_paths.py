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

    The mark is the suffix IN_FLOAT32 of the node's name. A node is marked if its type is in POINTWISE and each of its
    inputs is a constant, one of these inputs, or a marked node, with at least one that is not constant.

    Args:
        graph: a converted graph; it is changed in place.
        inputs: names of inputs of the graph.
    """
    marked = {graph.input(name).get_node().get_friendly_name() for name in inputs}
    for node in graph.get_ordered_ops():
        sources = [value.get_node() for value in node.input_values()]
        varying = [source for source in sources if source.get_type_name() != "Constant"]
        if (
            node.get_type_name() not in POINTWISE
            or not varying
            or any(source.get_friendly_name() not in marked for source in varying)
        ):
            continue
        # packing.write_graph turns the suffix into OpenVINO's own mark; whole numbers are never rounded to BF16
        if node.get_output_element_type(0).is_real():
            node.set_friendly_name(f"{node.get_friendly_name()}{IN_FLOAT32}")
        marked.add(node.get_friendly_name())
