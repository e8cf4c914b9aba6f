"""What each planned layer executes in, read from OpenVINO's execution graph of the file that ships.

Not here: whether its integers are PyTorch's (proof.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import openvino as ov

from pqcad_qat.errors import ExportError
from pqcad_qat.export.traceable_modules import traced_path
from pqcad_qat.serving.packing import called_layer
from pqcad_qat.serving.runtime import OVUNet2DModel

INT8 = ("i8", "u8")


if TYPE_CHECKING:
    from pqcad_qat.quantization.plan import LayerPlan

MATRIX_NODES = ("Convolution", "FullyConnected", "MatMul")  # layer types in the CPU plugin's execution graph


@dataclass(frozen=True)
class ExecutedNode:
    """One node of the execution graph.

    Attributes:
        kind: layer type of the CPU plugin.
        precision: what it runs in.
        kernel: name of the code that runs it, which names its instruction set too, such as brgconv_avx512_I8.
        names: of the original nodes that were fused into it.
    """

    kind: str
    precision: str
    kernel: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class ExecutionReport:
    """What the compiled model executes.

    Attributes:
        precisions: runtime precision of each planned layer ("i8", "u8", "bf16", "f32"; "absent" where the graph has no
            such node).
        node_types: (layer type, runtime precision) -> number of executed nodes.
        inference_precision: OpenVINO's INFERENCE_PRECISION_HINT in use.
        attention: of each attention planned for INT8 what its products run in, as of layers; the first that is not INT8
            counts.
    """

    precisions: Mapping[str, str]
    node_types: Mapping[tuple[str, str], int]
    inference_precision: str
    attention: Mapping[str, str]

    @property
    def planned(self) -> int:
        return len(self.precisions)

    @property
    def executed_int8(self) -> int:
        return sum(precision in INT8 for precision in self.precisions.values())

    @property
    def float_layers(self) -> tuple[str, ...]:
        """Planned layers that did not execute in INT8."""
        return tuple(name for name, precision in self.precisions.items() if precision not in INT8)


def execution_precision(
    folder: Path, layers: Collection[str], properties: Mapping[str, Any] | None = None
) -> ExecutionReport:
    """Compile the shipped file with the default settings and read from its execution graph what each planned layer runs
    in.

    Args:
        folder: a deployed folder.
        layers: module paths of the planned layers.
        properties: OpenVINO properties over the runtime's defaults.

    Raises:
        ModelError: a folder that cannot be loaded.
    """
    model = OVUNet2DModel.from_pretrained(folder, properties=properties)
    compiled, nodes = model.compiled, executed_nodes(model.compiled)
    return ExecutionReport(
        precisions=layer_precisions(nodes, layers),
        node_types=Counter(
            (node.kind, node.precision) for node in nodes if node.kind not in ("Const", "Input", "Output")
        ),
        inference_precision=compiled.get_property("INFERENCE_PRECISION_HINT").to_string(),
        attention=attention_precisions(compiled, model.manifest.get("attention", {})),
    )


def refuse_float(plan: Sequence[LayerPlan], executed: ExecutionReport, where: object) -> None:
    """A planned layer that left INT8 is an error, unless the policy lists it as an exception; an attention is one
    always.

    Raises:
        ExportError: which layers of `where` left it.
    """
    if missed := [
        f"{path} ran in {precision}" for path, precision in executed.attention.items() if precision not in INT8
    ]:
        raise ExportError(
            f"{where}: attention planned for INT8: {', '.join(missed)}; quantization.attention: float leaves it"
        )
    excepted = {layer.name for layer in plan if layer.int8_exception}
    floating = {name: precision for name, precision in executed.precisions.items() if precision not in INT8}
    left = [f"{name} ran in {precision}" for name, precision in floating.items() if name not in excepted]
    if left:
        raise ExportError(
            f"{where}: planned for INT8 but executed in floating point: {', '.join(left)}; "
            "change the rule of these layers, or list them with execution: float"
        )


def executed_nodes(compiled: ov.CompiledModel) -> list[ExecutedNode]:
    """Every node of the execution graph of a compiled model."""
    return [ExecutedNode(*_node_facts(node)) for node in compiled.get_runtime_model().get_ops()]


def _node_facts(node: ov.Node) -> tuple[str, str, str, tuple[str, ...]]:
    """The facts of one node of an execution graph, in the order of ExecutedNode."""
    keys = ("layerType", "runtimePrecision", "primitiveType", "originalLayersNames")
    kind, precision, kernel, names = (node.rt_info[key].astype(str) for key in keys)
    return kind, precision, kernel, tuple(names.split(","))


def layer_precisions(nodes: Sequence[ExecutedNode], layers: Collection[str]) -> dict[str, str]:
    """Runtime precision of the matrix node that each layer became, of several calls that differ the one that is not
    INT8.

    OpenVINO may leave a layer's name to what it computes together with it (packing.RENAMED).
    """
    found: dict[str, list[str]] = {}
    for node in (node for node in nodes if node.kind in MATRIX_NODES):
        for name in {called_layer(name, layers) for name in node.names} - {None}:
            found.setdefault(str(name), []).append(node.precision)
    return {name: _first_float(found[name]) if name in found else "absent" for name in layers}


def attention_precisions(compiled: ov.CompiledModel, paths: Collection[str]) -> dict[str, str]:
    """Runtime precision of the products of each quantized attention (int8_attention.py); of two that differ the one
    that is not INT8.

    OpenVINO runs both products and the softmax as one node, which computes in what its three inputs come in; or,
    without VNNI, one by one.
    """
    found: dict[str, list[str]] = {path: [] for path in paths}
    for node in compiled.get_runtime_model().get_ops():
        kind, precision, _, names = _node_facts(node)
        for path in {traced_path(name) for name in names} & found.keys():
            if kind == "MatMul":
                found[path].append(precision)
            elif kind == "Subgraph" and f"{path}/softmax" in names:
                read = [
                    _read_precision(value)
                    for value in node.input_values()
                    if _node_facts(value.get_node())[0] != "Const"
                ]
                found[path] += read if len(read) == 3 else []
    return {path: _first_float(seen) if len(seen) > 1 else "absent" for path, seen in found.items()}


def _read_precision(value: ov.Output) -> str:
    precisions: str = value.get_node().rt_info["outputPrecisions"].astype(str)
    return precisions.split(",")[int(value.get_index())]


def _first_float(precisions: Sequence[str]) -> str:
    """The first precision that is not INT8, or the first of all."""
    return next((precision for precision in precisions if precision not in INT8), precisions[0])
