"""Marks that show which node of a converted graph belongs to which planned layer.

Problem: where it can, the converter fuses a convolution with the factor, normalization or quantizer that follows. The
layer's own integers and scales are then lost. Method: while the model is traced, a Roll operation stands behind each
layer. The converter cannot fuse across it. Once the nodes have their layers' names, the marks are removed. OpenVINO
then fuses the same nodes when it loads the graph, where no harm is done: names and integers stay.

Not here: the conversion (export_model.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import openvino as ov
import torch
from torch import Tensor, nn

from pqcad_qat.errors import ExportError
from pqcad_qat.export.normalization import redirect
from pqcad_qat.serving.packing import FOLLOWING, MATRIX_OPS, call_name

if TYPE_CHECKING:
    from pqcad_qat.quantization.integer_layer import IntegerLayer

MARK = 0x6D61726B
"""Second shift of a mark's Roll; no network shifts its batch by that much, so it tells marks from other rolls."""

SHAPES = ("Transpose", "Reshape", "Squeeze", "Unsqueeze")
"""Types of nodes that move values without changing them; the converter may move these behind a quantizer."""


class Marked(nn.Module):
    """A layer whose output goes through a Roll; the first shift of the Roll is the place of the layer in the plan.

    The result of the Roll does not matter: it exists only during tracing and is removed before the graph runs.
    """

    def __init__(self, layer: nn.Module, place: int) -> None:
        super().__init__()
        self.layer, self.place = layer, place

    def forward(self, x: Tensor) -> Tensor:
        return torch.roll(self.layer(x), (self.place, MARK), (0, 0))


def name_layers(graph: ov.Model, layers: Mapping[str, IntegerLayer]) -> None:
    """Name the convolution or matrix product of each planned layer after the layer, and remove the marks.

    Second and further calls of one layer get a number after the name. Constant sums and factors that follow a product
    are named after it too.

    Args:
        graph: a converted graph; it is changed in place.
        layers: the planned layers by module path, in the order of their marks.

    Raises:
        ExportError: a layer is not a product of its own quantized input, for example because its input is constant; or
            layers of one input group read several quantized tensors.
    """
    products: dict[str, list[ov.Node]] = {name: [] for name in layers}
    names = tuple(layers)
    for node in graph.get_ordered_ops():
        if (place := _mark(node)) is not None:
            products[names[place]].append(_product(node.input_value(0).get_node()))
            # take the mark off: its readers read the layer's output itself
            redirect(node, node.input_value(0))
    if wrong := [
        name for name, nodes in products.items() if not nodes or any(quantizer_of(node) is None for node in nodes)
    ]:
        raise ExportError(
            f"{', '.join(wrong)}: got no product of the layer's quantized input in the converted graph; "
            "allowed layers whose input the network's inputs change; keep_float: true leaves it alone"
        )
    for name, nodes in products.items():
        for call, node in enumerate(nodes):
            node.set_friendly_name(call_name(name, call))
            for place, follower in enumerate(_following(node)):
                follower.set_friendly_name(f"{call_name(name, call)}{FOLLOWING}{place}")
    _check_groups(products, layers)


def quantizer_of(product: ov.Node) -> ov.Node | None:
    """The FakeQuantize that a product reads, possibly through changes of shape; None for any other node."""
    if product.get_type_name() not in MATRIX_OPS:
        return None
    node = product.input_value(0).get_node()
    while node.get_type_name() in SHAPES:
        node = node.input_value(0).get_node()
    return node if node.get_type_name() == "FakeQuantize" else None


def _mark(node: ov.Node) -> int | None:
    """The place of the layer that a mark belongs to; None for any other node."""
    if node.get_type_name() != "Roll" or node.input_value(1).get_node().get_type_name() != "Constant":
        return None
    shifts: Sequence[int] = node.input_value(1).get_node().get_data().ravel().tolist()
    return shifts[0] if shifts[1:] == [MARK] else None


def _product(output: ov.Node) -> ov.Node:
    """The product of a layer: the node before the bias is added, or the output node itself where there is no bias."""
    return output.input_value(0).get_node() if output.get_type_name() == "Add" else output


def _following(product: ov.Node) -> Iterator[ov.Node]:
    """Additions and multiplications by constants behind a product, which OpenVINO may fuse with it at load."""
    while len(readers := list(product.output(0).get_target_inputs())) == 1:
        product = readers[0].get_node()
        constants = [value.get_node().get_type_name() == "Constant" for value in product.input_values()]
        if product.get_type_name() not in ("Add", "Multiply", "Subtract", "Divide") or not any(constants):
            return
        yield product


def _check_groups(products: Mapping[str, Sequence[ov.Node]], layers: Mapping[str, IntegerLayer]) -> None:
    """Check that layers sharing an input quantizer read one FakeQuantize in each of their calls.

    Raises:
        ExportError: the layers of a group read several.
    """
    sources: dict[tuple[str, int], set[str]] = {}
    for name, nodes in products.items():
        for call, node in enumerate(nodes):
            sources.setdefault((layers[name].input_group, call), set()).add(
                node.input_value(0).get_node().get_friendly_name()
            )
    if split := sorted({group for (group, _), names in sources.items() if len(names) > 1}):
        raise ExportError(
            f"input groups {', '.join(split)}: got layers that read several quantized tensors; allowed one a group"
        )
