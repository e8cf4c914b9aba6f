"""What a module of the user's own computes of the time, in float32 on every CPU.

OpenVINO computes outside the plan in BF16 where the CPU has it: time step 999 is then 1000, and sines of it are wrong
by up to 2 radians.
Not here: the sinusoids of diffusers' classes, which are tables (time_tables.py).
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
"""What sinusoids and other functions of the time are made of; layers, normalizations and quantizers are not."""


def keep_time_in_float32(graph: ov.Model, time: ov.Node) -> None:
    """Mark all that is computed of the time alone, up to the first layer or activation that reads it.

    Args:
        graph: converted.
        time: its input of the time.
    """
    of_time = {time.get_friendly_name()}
    for node in graph.get_ordered_ops():
        sources = [value.get_node() for value in node.input_values()]
        varying = [source for source in sources if source.get_type_name() != "Constant"]
        if (
            node.get_type_name() not in POINTWISE
            or not varying
            or any(source.get_friendly_name() not in of_time for source in varying)
        ):
            continue
        node.set_friendly_name(f"{node.get_friendly_name()}{IN_FLOAT32}")
        of_time.add(node.get_friendly_name())
