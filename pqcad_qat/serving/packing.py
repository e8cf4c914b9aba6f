"""Packing of weights on disk: integers as bit fields, and graphs whose planned weights are packed or unpacked to int8.

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
import openvino.opset13 as op

from pqcad_qat.errors import ExportError, ModelError
from pqcad_qat.machine.json_files import shown
from pqcad_qat.serving.compiled_graph import reason

WeightFormat = Literal["int8", "packed"]
"""Format of the weights on disk."""

PACKED_WIDTHS: Mapping[WeightFormat, tuple[int, ...]] = {"int8": (), "packed": (2, 3, 4)}
"""Widths in bits to which a layer's weights may be packed, by format; weights that fit none of them stay int8."""

CONTAINERS: Mapping[int, ov.Type] = {2: ov.Type.u2, 3: ov.Type.u3, 4: ov.Type.i4}
"""OpenVINO type of a packed constant, by width in bits. The type has the right size and states the width. Only for int4
does OpenVINO read the same values as we do.
"""

IN_FLOAT32 = "/float32"
"""Suffix of the names of nodes that compute in float32 even where OpenVINO uses BF16 outside INT8."""

_FLOAT32_MARK = '<rt_info><attribute name="DisablePrecisionConversion" version="0" value="dynamic:f16" /></rt_info>'
"""OpenVINO's own attribute of such a node, in the text that OpenVINO writes. Its Python interface can read the
attribute but not set it.
"""

LONGEST_TEXT = 2**26
"""Largest size of a graph's text in bytes: several times that of Stable Diffusion XL."""

UNREADABLE = (RuntimeError, OSError, EOFError, zlib.error, ValueError, TypeError, OverflowError, MemoryError)
"""Exceptions that reading a damaged graph may raise."""

MATRIX_OPS = ("Convolution", "GroupConvolution", "MatMul")
"""Types of nodes that compute a layer's product."""


LAYER, FURTHER, FOLLOWING = "layer.", "#", "/following"
"""Parts of node names: what stands before a layer's path, the separator before the number of a layer's second or later
call, and the suffix of nodes that combine a layer's output with constants. OpenVINO GenAI finds the layers that an
adapter changes by their paths with a dot before them.
"""

SOFTMAX = "/softmax"
"""Suffix of the name of the softmax of a quantized attention."""

RENAMED = ("/Dequantization", FOLLOWING, "_original")
"""Suffixes behind a layer's name that OpenVINO creates, where it fuses the layer with what follows or separates it from
its scale.
"""


def call_name(layer: str, call: int) -> str:
    """Name of the node that computes one call of a layer; calls are counted from 0."""
    return f"{LAYER}{layer}" if call == 0 else f"{LAYER}{layer}{FURTHER}{call + 1}"


def called_layer(node: str, layers: Collection[str]) -> str | None:
    """The layer, among these, that a product of this name computes; None for any other product."""
    # a path may itself begin like the prefix, which folders of older versions do not have
    for path in (node.removeprefix(LAYER), node):
        for name in (path, *(path.partition(mark)[0] for mark in RENAMED)):
            layer, _, call = name.rpartition(FURTHER)
            if name in layers or (layer in layers and call.isdigit()):
                return name if name in layers else layer
    return None


def softmax_name(path: str) -> str:
    """Name of the node that computes the softmax of the quantized attention of this module."""
    return f"{LAYER}{path}{SOFTMAX}"


def stored_bits(weights: npt.NDArray[np.integer], widths: Collection[int]) -> int:
    """The smallest of `widths` in bits that holds every value as a signed integer, or 8.

    Unsigned bytes, which belong to a zero point, are never packed.
    """
    if weights.dtype == np.uint8:
        return 8
    fitting = [bits for bits in widths if -(2 ** (bits - 1)) <= weights.min() and weights.max() < 2 ** (bits - 1)]
    return min(fitting, default=8)


def pack_values(values: npt.NDArray[np.int8], bits: int) -> npt.NDArray[np.uint8]:
    """Pack signed integers as two's complement fields of `bits` bits.

    The first value takes the lowest bits of the first byte. For 4 bits this is OpenVINO's own layout of int4.

    Returns:
        Bytes for the number of values rounded up to a multiple of 8.

    Raises:
        ValueError: a value does not fit the width.
    """
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    if values.size and (values.min() < low or values.max() > high):
        raise ValueError(f"{bits} bits: got [{values.min()}, {values.max()}]; allowed [{low}, {high}]")
    fields = np.zeros(-(-values.size // 8) * 8, np.uint8)
    fields[: values.size] = values.reshape(-1).view(np.uint8)
    return np.packbits(np.unpackbits(fields[:, None], axis=1, count=bits, bitorder="little"), bitorder="little")


def unpack_values(packed: npt.NDArray[np.uint8], bits: int, shape: tuple[int, ...]) -> npt.NDArray[np.int8]:
    """Invert pack_values; bytes beyond the values are ignored."""
    count, sign = int(np.prod(shape)), 1 << (bits - 1)
    fields = np.unpackbits(packed.reshape(-1), count=count * bits, bitorder="little").reshape(count, bits)
    values = np.packbits(fields, axis=1, bitorder="little").reshape(shape)
    return np.asarray((values ^ sign).view(np.int8) - np.int8(sign), np.int8)  # (v xor sign) - sign extends the sign


def pack_weights(graph: ov.Model, layers: Collection[str], weights: WeightFormat) -> dict[str, int]:
    """Pack the int8 weights of the planned layers in place; return the width in bits that each is now stored in.

    Raises:
        ExportError: the weights of a planned layer are not 8-bit integers.
    """
    widths: dict[str, int] = {}
    for node in graph.get_ordered_ops():
        name = called_layer(node.get_friendly_name(), layers)
        if name is None or node.get_type_name() not in MATRIX_OPS:
            continue
        constant = _weight_constant(node)
        if name in widths and constant.get_element_type() in CONTAINERS.values():
            continue  # another call of the layer, with the same constant
        if constant.get_element_type() not in (ov.Type.i8, ov.Type.u8):
            kind = constant.get_element_type().to_string()
            raise ExportError(f"{name}: weights in the graph: got {kind}; allowed i8 or u8")
        values = np.asarray(constant.data)
        widths[name] = stored_bits(values, PACKED_WIDTHS[weights])
        if widths[name] < 8:
            _replace(constant, _packed_tensor(values, widths[name]))
    return widths


def unpack_weights(graph: ov.Model) -> None:
    """Replace every packed constant by an int8 constant with the same values and name."""
    widths = {container: bits for bits, container in CONTAINERS.items()}
    for node in graph.get_ordered_ops():
        if node.get_type_name() == "Constant" and (bits := widths.get(node.get_element_type())):
            shape = tuple(node.output(0).shape)
            _replace(node, ov.Tensor(unpack_values(np.asarray(node.data).view(np.uint8), bits, shape)))
    graph.validate_nodes_and_infer_types()  # nodes computed from weights (upsampling.py) take their type


def _packed_tensor(values: npt.NDArray[np.int8], bits: int) -> ov.Tensor:
    packed, shape = pack_values(values, bits), ov.Shape(list(values.shape))
    size = ov.Tensor(CONTAINERS[bits], shape).byte_size
    return ov.Tensor(packed[:size], shape, CONTAINERS[bits])


def _weight_constant(node: ov.Node) -> ov.Node:
    """The integer constant behind a layer's weight input."""
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
    """Write the graph's text and, beside it, its constants without rounding; OpenVINO's default would round to float16.

    OpenVINO numbers unnamed nodes by a counter of the whole process. They are renumbered by position, so that the same
    graph always gives the same bytes. Names in `named` are kept, even if they look numbered. Nodes whose names end with
    IN_FLOAT32 get OpenVINO's mark. White space between tags, a sixth of the text, is removed.
    """
    xml.parent.mkdir(parents=True, exist_ok=True)
    graph.set_friendly_name(xml.parent.name)
    for place, node in enumerate(graph.get_ordered_ops()):
        kind, _, count = (name := node.get_friendly_name()).rpartition("_")
        if name not in named and kind == node.get_type_name() and count.isdigit():
            node.set_friendly_name(f"{kind}_{place}")
    ov.save_model(graph, xml, compress_to_fp16=False)
    # a graph that was read from a file carries the mark in further places: remove all, then mark anew
    plain = re.sub(r">\s+<", "><", xml.read_text(encoding="utf-8")).replace(_FLOAT32_MARK, "")
    head = rf'<layer id="\d+" name="[^"]*{IN_FLOAT32}" [^>]*>(?:<data [^>]*/>)?'
    xml.write_text(re.sub(head, rf"\g<0>{_FLOAT32_MARK}", plain), encoding="utf-8")


def halve_weights(graph: ov.Model) -> None:
    """Store the float32 weights of every matrix product as float16, which is read back as float32."""
    for node in graph.get_ordered_ops():
        if node.get_type_name() not in MATRIX_OPS:
            continue
        for port in node.inputs():
            constant = port.get_source_output().get_node()
            if constant.get_type_name() == "Constant" and constant.get_element_type() == ov.Type.f32:
                half = op.constant(np.asarray(constant.data, np.float16))
                port.replace_source_output(op.convert(half, "f32").output(0))


def compress_text(xml: Path, compressed: Path) -> None:
    """Replace the graph's text by a gzip file, whose bytes do not depend on the time."""
    compressed.write_bytes(gzip.compress(xml.read_bytes(), mtime=0))
    xml.unlink()


def read_text_and_weights(text: Path, weights: Path, core: ov.Core) -> ov.Model:
    """Read a graph and unpack its weights; the graph is the same, bit for bit, whatever its format on disk.

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
        raise ModelError(
            f"{text}: got a graph that OpenVINO cannot read: {reason(error)}; allowed the one that was exported"
        ) from error
    return model


def _check_constants(text: Path, plain: bytes) -> None:
    """Raise ModelError for a constant whose number of bytes does not match its shape.

    OpenVINO reads such a constant, and the process may crash when the graph runs.
    """
    for kind, shape, size in re.findall(
        rb'<data element_type="([^"]*)" shape="([^"]*)" offset="[^"]*" size="([^"]*)"', plain
    ):
        if (bits := _BITS.get(kind)) is None:
            continue
        readable = re.fullmatch(rb"(\d+(, ?\d+)*)?", shape) and size.isdigit()
        needed = math.prod(int(side) for side in shape.split(b",") if side) * bits / 8 if readable else -1.0
        # fields smaller than a byte are padded at the end
        if not readable or not needed <= int(size) < needed + 8:
            raise ModelError(
                f"{text}: got a constant of shape {shown(repr(shape)[2:-1])} in {shown(repr(size)[2:-1])} "
                "bytes; allowed the bytes of its shape"
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
"""Bits of one value, by type of a constant; other types are not checked."""


def _check_length(text: Path, size: int) -> None:
    """Raise ModelError for a text too long to read: a few compressed kilobytes may unpack to gigabytes."""
    if size > LONGEST_TEXT:
        raise ModelError(f"{text}: got a graph's text of more than {LONGEST_TEXT} bytes; allowed that many at most")
