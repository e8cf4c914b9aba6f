"""Which node of a converted graph is which planned layer: a mark behind each while the graph is made, taken off when
its nodes have names.

The converter computes a convolution together with what follows where it can, a factor, a normalization or a quantizer:
of the layer's own integers and scales nothing is left then. It knows no way through a mark. Without them OpenVINO does
the same when it loads the graph,
where it costs nothing: names stay, and integers.
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
    from pqcad_qat.quantization.quantized_layer import IntegerLayer

MARK = 0x6D61726B
"""The second of a mark's shifts: no network rolls its batch so far."""

SHAPES = ("Transpose", "Reshape", "Squeeze", "Unsqueeze")
"""What moves values and leaves them as they are; the converter may move it behind a quantizer."""


class Marked(nn.Module):
    """A layer, and behind every call of it a roll whose first shift says which layer it is.

    What the roll computes is not looked at: it stands there while a graph is traced, and goes before anything runs it.
    """

    def __init__(self, layer: nn.Module, number: int) -> None:
        super().__init__()
        self.layer, self.number = layer, number

    def forward(self, x: Tensor) -> Tensor:
        return torch.roll(self.layer(x), (self.number, MARK), (0, 0))


def name_layers(graph: ov.Model, layers: Mapping[str, IntegerLayer]) -> None:
    """Name each planned layer's convolution or matrix product after the layer, further calls with their number, and
    take the marks off.

    Raises:
        ExportError: a layer that is no product of its own quantized input, such as one of a constant; or layers of one
            input group that read several quantized tensors.
    """
    products: dict[str, list[ov.Node]] = {name: [] for name in layers}
    names = tuple(layers)
    for node in graph.get_ordered_ops():
        if (number := _mark(node)) is not None:
            products[names[number]].append(_product(node.input_value(0).get_node()))
            redirect(node, node.input_value(0))
    if wrong := [
        name for name, nodes in products.items() if not nodes or any(quantizer_of(node) is None for node in nodes)
    ]:
        raise ExportError(
            f"{', '.join(wrong)}: the converted graph has no product of the layer's quantized input; "
            "allowed layers whose input the network's inputs change; keep_float: true leaves it alone"
        )
    for name, nodes in products.items():
        for call, node in enumerate(nodes):
            node.set_friendly_name(call_name(name, call))
            for place, follower in enumerate(_following(node)):
                follower.set_friendly_name(f"{call_name(name, call)}{FOLLOWING}{place}")
    _check_groups(products, layers)


def quantizer_of(product: ov.Node) -> ov.Node | None:
    """The FakeQuantize that a product reads, through changes of shape; None of anything else."""
    if product.get_type_name() not in MATRIX_OPS:
        return None
    node = product.input_value(0).get_node()
    while node.get_type_name() in SHAPES:
        node = node.input_value(0).get_node()
    return node if node.get_type_name() == "FakeQuantize" else None


def _mark(node: ov.Node) -> int | None:
    """The number of the layer that a mark is of, None for any other node."""
    if node.get_type_name() != "Roll" or node.input_value(1).get_node().get_type_name() != "Constant":
        return None
    shifts: Sequence[int] = node.input_value(1).get_node().get_data().ravel().tolist()
    return shifts[0] if shifts[1:] == [MARK] else None


def _product(output: ov.Node) -> ov.Node:
    """The product to which a layer's bias is added, or what its output is itself."""
    return output.input_value(0).get_node() if output.get_type_name() == "Add" else output


def _following(product: ov.Node) -> Iterator[ov.Node]:
    """What a product's output goes through that OpenVINO may compute with it when it loads the graph: sums and factors
    of constants.
    """
    while len(readers := list(product.output(0).get_target_inputs())) == 1:
        product = readers[0].get_node()
        constants = [value.get_node().get_type_name() == "Constant" for value in product.input_values()]
        if product.get_type_name() not in ("Add", "Multiply", "Subtract", "Divide") or not any(constants):
            return
        yield product


def _check_groups(products: Mapping[str, Sequence[ov.Node]], layers: Mapping[str, IntegerLayer]) -> None:
    """Layers that share an input quantizer must read one FakeQuantize, call by call."""
    sources: dict[tuple[str, int], set[str]] = {}
    for name, nodes in products.items():
        for call, node in enumerate(nodes):
            sources.setdefault((layers[name].input_group, call), set()).add(
                node.input_value(0).get_node().get_friendly_name()
            )
    if split := sorted({group for (group, _), names in sources.items() if len(names) > 1}):
        raise ExportError(
            f"layers of one input group must read one quantized tensor; these groups read several: {', '.join(split)}"
        )
