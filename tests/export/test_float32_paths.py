"""Which nodes of a graph are marked to be computed in float32.

Not here: what a deployed graph then computes in BF16 (whole_runs/test_flow_runs.py).
"""

from __future__ import annotations

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as ops

from pqcad_qat.export.float32_paths import keep_in_float32
from pqcad_qat.serving.packing import IN_FLOAT32

WIDTH = 4


def ones(*shape: int) -> ov.Node:
    return ops.constant(np.ones(shape, np.float32))


def named(node: ov.Node, name: str) -> ov.Node:
    node.set_friendly_name(name)
    return node


@pytest.fixture
def marked() -> set[str]:
    """Names of the marked nodes of a network with a sinusoid of the time, a layer behind it, and its states."""
    time, sample = ops.parameter([2], np.float32, "timestep"), ops.parameter([2, WIDTH], np.float32, "sample")
    fixed = named(ops.exp(ones(1, WIDTH)), "fixed")
    column = named(ops.unsqueeze(time, ops.constant(1)), "column")
    outer = named(ops.matmul(column, fixed, False, False), "outer")
    sine = named(ops.sin(outer), "sine")
    whole = named(ops.convert(sine, "i64"), "whole")
    layer = named(ops.matmul(sine, ones(WIDTH, WIDTH), False, False), "layer")
    behind = named(ops.sin(layer), "behind")
    mixed = named(ops.add(sample, sine), "mixed")
    results = [ops.result(node) for node in (whole, behind, mixed)]
    graph = ov.Model(results, [time, sample])
    graph.inputs[0].get_tensor().set_names({"timestep"})
    keep_in_float32(graph, ["timestep"])
    names = [node.get_friendly_name() for node in graph.get_ordered_ops()]
    return {name.removesuffix(IN_FLOAT32) for name in names if name.endswith(IN_FLOAT32)}


def test_what_is_computed_of_times_alone_is_marked_up_to_the_first_layer(marked: set[str]) -> None:
    assert marked == {"column", "outer", "sine"}
