"""Weights on disk in fewer bits: integers as bit fields, and a graph whose planned weights are packed so, or unpacked
to int8 again.

Not here: the folder around the graph (deployed_folder.py). Needs openvino and numpy.
"""

from __future__ import annotations

import gzip
import math
import re
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import openvino as ov

from pqcad_qat.errors import ExportError, ModelError
from pqcad_qat.machine.json_files import shown
from pqcad_qat.serving.compiled_graph import reason

WeightFormat = Literal["int8", "packed"]

PACKED_WIDTHS: Mapping[WeightFormat, tuple[int, ...]] = {"int8": (), "packed": (2, 3, 4)}
"""Bits that a layer's weights may be packed to; what fits none of them stays int8."""

CONTAINERS: Mapping[int, ov.Type] = {2: ov.Type.u2, 3: ov.Type.u3, 4: ov.Type.i4}
"""The type of a packed constant. It has the right size and says the width; of these only int4 holds for OpenVINO what
it holds for us.
"""

IN_FLOAT32 = "/float32"
"""Ending of the names of nodes that compute in float32 also where OpenVINO computes outside INT8 in BF16."""

_FLOAT32_MARK = '<rt_info><attribute name="DisablePrecisionConversion" version="0" value="dynamic:f16" /></rt_info>'
"""OpenVINO's own attribute of such a node, as it writes it; its Python interface can read it and not set it."""

LONGEST_TEXT = 2**26
"""Bytes of a graph's text: several times Stable Diffusion XL's."""

UNREADABLE = (RuntimeError, OSError, EOFError, zlib.error, ValueError, TypeError, OverflowError, MemoryError)
"""What reading a damaged graph may end in."""

MATRIX_OPS = ("Convolution", "GroupConvolution", "MatMul")


FURTHER, FOLLOWING = "#", "/following"
"""In names of nodes: before the number of a layer's call, from the second on; and of what multiplies a layer's output
by constants.
"""

RENAMED = ("/Dequantization", FOLLOWING, "_original")
"""What may stand behind a layer's name where OpenVINO computes the layer together with what follows, or apart from its
scale.
"""


def call_name(layer: str, call: int) -> str:
    """The name of the node that is one call, counted from 0, of a layer."""
    return layer if call == 0 else f"{layer}{FURTHER}{call + 1}"


def called_layer(node: str, layers: Collection[str]) -> str | None:
    """The layer, one of these, that a product of this name is a call of; None of another product."""
    for name in (node, *(node.partition(mark)[0] for mark in RENAMED)):
        layer, _, call = name.rpartition(FURTHER)
        if name in layers or (layer in layers and call.isdigit()):
            return name if name in layers else layer
    return None


def stored_bits(weights: npt.NDArray[np.integer], widths: Collection[int]) -> int:
    """The fewest of `widths` that hold every value as a signed integer, or 8; unsigned bytes (of a zero point) stay
    what they are.
    """
    if weights.dtype == np.uint8:
        return 8
    fitting = [bits for bits in widths if -(2 ** (bits - 1)) <= weights.min() and weights.max() < 2 ** (bits - 1)]
    return min(fitting, default=8)


def pack_values(values: npt.NDArray[np.int8], bits: int) -> npt.NDArray[np.uint8]:
    """Two's complement fields of `bits` bits, the first in the lowest bits of the first byte: for 4 bits OpenVINO's own
    layout of int4.

    Returns:
        as many bytes as `bits` times the number of values rounded up to a multiple of 8 takes.

    Raises:
        ValueError: a value that the width does not hold.
    """
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    if values.size and (values.min() < low or values.max() > high):
        raise ValueError(f"{bits} bits hold [{low}, {high}], got [{values.min()}, {values.max()}]")
    fields = np.zeros(-(-values.size // 8) * 8, np.uint8)
    fields[: values.size] = values.reshape(-1).view(np.uint8)
    return np.packbits(np.unpackbits(fields[:, None], axis=1, count=bits, bitorder="little"), bitorder="little")


def unpack_values(packed: npt.NDArray[np.uint8], bits: int, shape: tuple[int, ...]) -> npt.NDArray[np.int8]:
    """The inverse of pack_values; bytes beyond the values are ignored."""
    count, sign = int(np.prod(shape)), 1 << (bits - 1)
    fields = np.unpackbits(packed.reshape(-1), count=count * bits, bitorder="little").reshape(count, bits)
    values = np.packbits(fields, axis=1, bitorder="little").reshape(shape)
    return np.asarray((values ^ sign).view(np.int8) - np.int8(sign), np.int8)  # sign extension


def pack_weights(graph: ov.Model, layers: Collection[str], weights: WeightFormat) -> dict[str, int]:
    """Pack the int8 weights of the planned layers in place; returns the bits that each is now stored in.

    Raises:
        ExportError: a planned layer whose weights are no 8-bit integers.
    """
    found: dict[str, int] = {}
    for node in graph.get_ordered_ops():
        name = called_layer(node.get_friendly_name(), layers)
        if name is None or node.get_type_name() not in MATRIX_OPS:
            continue
        constant = _weight_constant(node)
        if name in found and constant.get_element_type() in CONTAINERS.values():
            continue  # a further call, of the same constant
        if constant.get_element_type() not in (ov.Type.i8, ov.Type.u8):
            raise ExportError(f"{name}: weights must be int8 in the graph, got {constant.get_element_type()}")
        values = np.asarray(constant.data)
        found[name] = stored_bits(values, PACKED_WIDTHS[weights])
        if found[name] < 8:
            _replace(constant, _packed_tensor(values, found[name]))
    return found


def unpack_weights(graph: ov.Model) -> None:
    """Put an int8 constant with the same values and name in the place of every packed one."""
    widths = {container: bits for bits, container in CONTAINERS.items()}
    for node in graph.get_ordered_ops():
        if node.get_type_name() == "Constant" and (bits := widths.get(node.get_element_type())):
            shape = tuple(node.output(0).shape)
            _replace(node, ov.Tensor(unpack_values(np.asarray(node.data).view(np.uint8), bits, shape)))
    graph.validate_nodes_and_infer_types()  # what is computed of weights (upsampling.py) has their type


def _packed_tensor(values: npt.NDArray[np.int8], bits: int) -> ov.Tensor:
    packed, shape = pack_values(values, bits), ov.Shape(list(values.shape))
    size = ov.Tensor(CONTAINERS[bits], shape).byte_size
    return ov.Tensor(packed[:size], shape, CONTAINERS[bits])


def _weight_constant(node: ov.Node) -> ov.Node:
    """The integer constant at the root of a layer's weight input."""
    source = node.input_value(1).get_node()
    while source.get_type_name() != "Constant":
        source = source.input_value(0).get_node()
    return source


def _replace(constant: ov.Node, tensor: ov.Tensor) -> None:
    replacement = ov.op.Constant(tensor, shared_memory=False)
    replacement.set_friendly_name(constant.get_friendly_name())
    replacement.output(0).get_tensor().set_names(constant.output(0).get_names())
    for consumer in constant.output(0).get_target_inputs():
        consumer.replace_source_output(replacement.output(0))


def write_graph(graph: ov.Model, xml: Path, named: Collection[str] = ()) -> None:
    """Write the graph's text and, beside it, its constants as they are (OpenVINO's default would round them to
    float16).

    Names that OpenVINO has numbered by all nodes that the process ever made are numbered by place, so that the same
    graph gives the same bytes; those that are `named` are somebody's, whatever they look like. Nodes whose names end
    with IN_FLOAT32 are marked so. White space between tags, a sixth of the text, goes.
    """
    xml.parent.mkdir(parents=True, exist_ok=True)
    graph.set_friendly_name(xml.parent.name)
    for place, node in enumerate(graph.get_ordered_ops()):
        kind, _, number = (name := node.get_friendly_name()).rpartition("_")
        if name not in named and kind == node.get_type_name() and number.isdigit():
            node.set_friendly_name(f"{kind}_{place}")
    ov.save_model(graph, xml, compress_to_fp16=False)
    # what was read bears it in more places
    plain = re.sub(r">\s+<", "><", xml.read_text(encoding="utf-8")).replace(_FLOAT32_MARK, "")
    head = rf'<layer id="\d+" name="[^"]*{IN_FLOAT32}" [^>]*>(?:<data [^>]*/>)?'
    xml.write_text(re.sub(head, rf"\g<0>{_FLOAT32_MARK}", plain), encoding="utf-8")


def compress_text(xml: Path, compressed: Path) -> None:
    """Put the graph's text as gzip in the place of the plain one; the same bytes at any time."""
    compressed.write_bytes(gzip.compress(xml.read_bytes(), mtime=0))
    xml.unlink()


def read_text_and_weights(text: Path, weights: Path, core: ov.Core) -> ov.Model:
    """A graph with its weights unpacked: the same graph, bit for bit, whatever their format on disk.

    Raises:
        ModelError: OpenVINO cannot read the files.
    """
    try:
        if text.suffix == ".gz":
            with gzip.open(text) as file:
                plain = file.read(LONGEST_TEXT + 1)
            _check_length(text, len(plain))
            _check_constants(text, plain)
            model = core.read_model(plain, weights.read_bytes())
        else:
            _check_length(text, text.stat().st_size)
            _check_constants(text, text.read_bytes())
            model = core.read_model(text, weights)
        unpack_weights(model)
    except UNREADABLE as error:
        raise ModelError(f"{text.parent}: OpenVINO cannot read the graph there: {reason(error)}") from error
    return model


def _check_constants(text: Path, plain: bytes) -> None:
    """Raise ModelError for a constant whose bytes are not those of its shape: OpenVINO reads it, and may end the
    process in computing.
    """
    for kind, shape, size in re.findall(
        rb'<data element_type="([^"]*)" shape="([^"]*)" offset="[^"]*" size="([^"]*)"', plain
    ):
        if (bits := _BITS.get(kind)) is None:
            continue
        whole = re.fullmatch(rb"(\d+(, ?\d+)*)?", shape) and size.isdigit()
        taken = math.prod(int(side) for side in shape.split(b",") if side) * bits / 8 if whole else -1.0
        # of fields smaller than a byte the last bytes are filled up
        if not whole or not taken <= int(size) < taken + 8:
            raise ModelError(
                f"{text}: got a constant of shape {shown(repr(shape)[2:-1])} in {shown(repr(size)[2:-1])} "
                "bytes; allowed its own"
            )


_BITS: Mapping[bytes, int] = {
    b"u2": 2,
    b"u3": 3,
    b"i4": 4,
    b"u4": 4,
    b"i8": 8,
    b"u8": 8,
    b"f16": 16,
    b"f32": 32,
    b"i32": 32,
    b"i64": 64,
}
"""Type of a constant -> bits of a value; of others nothing is checked."""


def _check_length(text: Path, size: int) -> None:
    """Raise ModelError for a text that would take gigabytes to read, as a few compressed kB may."""
    if size > LONGEST_TEXT:
        raise ModelError(f"{text}: got a graph's text of more than {LONGEST_TEXT} bytes; allowed that many")
