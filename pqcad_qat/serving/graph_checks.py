"""Checks that a graph matches the manifest beside it, in its ports and its planned layers.

Not here: whether the graph computes what the plan says (proof.py). Needs openvino and numpy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import openvino as ov

from pqcad_qat.errors import ModelError
from pqcad_qat.serving.compiled_graph import reason
from pqcad_qat.serving.graph_inputs import expected_ports
from pqcad_qat.serving.packing import MATRIX_OPS, UNREADABLE, called_layer


def check_graph(graph: ov.Model, manifest: Mapping[str, Any], folder: Path) -> None:
    """Raise ModelError for a graph whose ports or layers differ from the folder's manifest."""
    where = str(folder / manifest["graph"])
    try:
        fault = _fault(graph, manifest)
    except UNREADABLE as error:  # for example names that are not valid text
        raise ModelError(
            f"{where}: got a graph that OpenVINO cannot read: {reason(error)}; allowed the one that was exported"
        ) from error
    if fault:
        raise ModelError(f"{where}: {fault}")


def port_of(port: ov.Output) -> tuple[list[int], str]:
    """Shape and dtype of a graph's input or output; a size that is not fixed is -1."""
    shape, kind = port.get_partial_shape(), port.get_element_type()
    sizes = [size.get_length() if size.is_static else -1 for size in shape] if shape.rank.is_static else [-1]
    return sizes, {ov.Type.f32: "float32", ov.Type.i64: "int64"}.get(kind, kind.to_string())


def _fault(graph: ov.Model, manifest: Mapping[str, Any]) -> str:
    """The first difference between a graph and its manifest, as a message; empty where there is none."""
    names = [port.get_names() for port in graph.inputs]
    conditions: Sequence[Mapping[str, Any]] = manifest.get("conditions", ())
    expected = expected_ports(
        set().union(*names),
        manifest["batch_size"],
        manifest["sample_shape"],
        manifest.get("timestep_dtype", "int64"),
        conditions=conditions,
    )
    ports = {
        name: port_of(port) for port, known in zip(graph.inputs, names, strict=True) for name in known & expected.keys()
    }
    if ports != expected or len(names) != len(expected):
        shown_ports = _port_list(ports) or "none of them"
        return f"got {len(names)} inputs, {shown_ports}; allowed {_port_list(expected)}, as the manifest says"
    states = next(expected[name] for name in ("sample", "hidden_states") if name in expected)
    if not graph.outputs or port_of(graph.outputs[0]) != states:
        first = [port_of(port) for port in graph.outputs[:1]]
        return f"got the output {first}; allowed {states}, as of the samples"
    layers = manifest["layers"]
    matrices = {
        name: node
        for node in graph.get_ordered_ops()
        if node.get_type_name() in MATRIX_OPS and (name := called_layer(node.get_friendly_name(), layers)) is not None
    }
    if absent := [name for name in layers if name not in matrices]:
        return f"got no layer {absent[0][:200]!r}; allowed a graph with every layer that the manifest lists"
    # OpenVINO's CPU plugin ends the process (SIGFPE) if the weights of an INT8 matrix product are not transposed
    untransposed = [
        name
        for name in manifest["layers"]
        if matrices[name].get_type_name() == "MatMul" and not _transposed(matrices[name])
    ]
    if untransposed:
        return f"{untransposed[0][:200]}: got weights (inputs, outputs); allowed (outputs, inputs)"
    return ""


def _transposed(product: ov.Node) -> bool:
    return bool(product.get_attributes().get("transpose_b"))


def _port_list(ports: Mapping[str, tuple[list[int], str]]) -> str:
    """The ports as a message lists them."""
    return ", ".join(f"{name} {shape} {dtype}" for name, (shape, dtype) in ports.items())
