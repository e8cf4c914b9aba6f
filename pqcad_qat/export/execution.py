"""What each planned layer executes in, read from OpenVINO's execution graph of the file that ships.

Method: the plugin that compiles a graph decides for itself what runs in INT8. It tells its decisions in the execution
graph, whose nodes state their runtime precision and the names of the nodes that were fused into them. Planned layers
are found there by name (node_marks.py gave the names), and so are the products of attention (int8_attention.py).

Not here: whether a layer's integers are PyTorch's (proof.py).
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
from pqcad_qat.serving.compiled_graph import compile_graph, shared_core
from pqcad_qat.serving.deployed_folder import graph_on_disk
from pqcad_qat.serving.packing import called_layer, softmax_name
from pqcad_qat.serving.runtime import OVUNet2DModel

if TYPE_CHECKING:
    from pqcad_qat.quantization.plan import LayerPlan

INT8 = ("i8", "u8")
"""Runtime precisions that count as INT8: signed and unsigned bytes."""

MATRIX_NODES = ("Convolution", "FullyConnected", "MatMul")
"""Types of matrix nodes in the execution graph of OpenVINO's CPU plugin."""


@dataclass(frozen=True)
class ExecutedNode:
    """One node of the execution graph.

    Attributes:
        kind: layer type of the CPU plugin.
        precision: the precision that it runs in.
        kernel: name of the code that runs it. It states the instruction set too, as in brgconv_avx512_I8.
        names: names of the original nodes that were fused into it.
    """

    kind: str
    precision: str
    kernel: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class ExecutionReport:
    """What the compiled model executes.

    Attributes:
        precisions: runtime precision of each planned layer: "i8", "u8", "bf16" or "f32"; "absent" where the graph has
            no such node.
        node_types: (layer type, runtime precision) -> number of executed nodes.
        inference_precision: OpenVINO's INFERENCE_PRECISION_HINT in use.
        attention: runtime precision of the products of each attention that is planned for INT8, by module path. If the
            products differ, it is the first one that is not INT8.
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
    """Compile the shipped file and read the runtime precision of each planned layer from its execution graph.

    Args:
        folder: a deployed folder.
        layers: module paths of the planned layers.
        properties: OpenVINO properties that override the runtime's defaults.

    Raises:
        ModelError: the folder cannot be loaded.
    """
    return loaded_precision(OVUNet2DModel.from_pretrained(folder, properties=properties), layers)


def loaded_precision(model: OVUNet2DModel, layers: Collection[str]) -> ExecutionReport:
    """Do the same as `execution_precision` for a deployed folder that is loaded already."""
    return _executed(model.compiled, layers, model.manifest.get("attention", {}))


def execution_at_any_size(folder: Path, layers: Collection[str], attention: Collection[str]) -> ExecutionReport:
    """Do the same as `execution_precision` where the graph is compiled as it is on disk, for any batch and size, as
    OpenVINO GenAI and optimum-intel compile it.

    Args:
        folder, layers: as for `execution_precision`.
        attention: module paths of the attention that is planned for INT8.

    Raises:
        ModelError: the folder cannot be loaded.
    """
    core = shared_core()
    return _executed(compile_graph(graph_on_disk(folder, core), core), layers, attention)


def _executed(compiled: ov.CompiledModel, layers: Collection[str], attention: Collection[str]) -> ExecutionReport:
    nodes = executed_nodes(compiled)
    return ExecutionReport(
        precisions=layer_precisions(nodes, layers),
        node_types=Counter(
            (node.kind, node.precision) for node in nodes if node.kind not in ("Const", "Input", "Output")
        ),
        inference_precision=compiled.get_property("INFERENCE_PRECISION_HINT").to_string(),
        attention=attention_precisions(compiled, attention),
    )


def refuse_float(plan: Sequence[LayerPlan], executed: ExecutionReport, where: object) -> None:
    """Refuse a model in which a planned layer or attention does not execute in INT8.

    Layers that the policy lists as exceptions may leave INT8; an attention may not.

    Raises:
        ExportError: a layer or an attention left INT8. The message begins with `where` and names them.
    """
    allowed = " or ".join(INT8)
    if missed := [f"{path} in {precision}" for path, precision in executed.attention.items() if precision not in INT8]:
        raise ExportError(
            f"{where}: attention planned for INT8: got {', '.join(missed)}; allowed {allowed}, "
            "or quantization.attention: float"
        )
    excepted = {layer.name for layer in plan if layer.int8_exception}
    floating = {name: precision for name, precision in executed.precisions.items() if precision not in INT8}
    if refused := [f"{name} in {precision}" for name, precision in floating.items() if name not in excepted]:
        raise ExportError(
            f"{where}: layers planned for INT8: got {', '.join(refused)}; allowed {allowed}; "
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
    """Runtime precision of the matrix node that each layer became; "absent" where there is none.

    If the calls of one layer differ, the first precision that is not INT8 counts. OpenVINO may pass a layer's name on
    to nodes that it computes together with the layer (packing.RENAMED).
    """
    precisions: dict[str, list[str]] = {}
    for node in (node for node in nodes if node.kind in MATRIX_NODES):
        for name in {called_layer(name, layers) for name in node.names} - {None}:
            precisions.setdefault(str(name), []).append(node.precision)
    return {name: _first_float(precisions[name]) if name in precisions else "absent" for name in layers}


def attention_precisions(compiled: ov.CompiledModel, paths: Collection[str]) -> dict[str, str]:
    """Runtime precision of the products of each quantized attention; "absent" where both are not found.

    If the products differ, the first precision that is not INT8 counts.

    With VNNI, OpenVINO runs both products and the softmax as one node of kind Subgraph. It computes in the precisions
    of its three inputs: queries, keys and values. Without VNNI the products are nodes of kind MatMul.
    """
    precisions: dict[str, list[str]] = {path: [] for path in paths}
    for node in compiled.get_runtime_model().get_ops():
        kind, precision, _, names = _node_facts(node)
        for path in {traced_path(name) for name in names} & precisions.keys():
            if kind == "MatMul":
                precisions[path].append(precision)
            elif kind == "Subgraph" and softmax_name(path) in names:
                sources = [value for value in node.input_values() if _node_facts(value.get_node())[0] != "Const"]
                precisions[path] += map(_read_precision, sources) if len(sources) == 3 else []
    # both products, or the three inputs of the one node, must be there
    return {path: _first_float(several) if len(several) > 1 else "absent" for path, several in precisions.items()}


def _read_precision(value: ov.Output) -> str:
    """The precision in which a node of an execution graph passes this value on."""
    precisions: str = value.get_node().rt_info["outputPrecisions"].astype(str)
    return precisions.split(",")[int(value.get_index())]


def _first_float(precisions: Sequence[str]) -> str:
    """The first precision that is not INT8, or the first of all."""
    return next((precision for precision in precisions if precision not in INT8), precisions[0])
