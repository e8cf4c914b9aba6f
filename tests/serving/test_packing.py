"""Weights in bit fields, and what OpenVINO makes of the containers they are kept in."""

from __future__ import annotations

import numpy as np
import openvino as ov
import pytest

from pqcad_qat.serving.packing import PACKED_WIDTHS, pack_values, stored_bits, unpack_values


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("shape", [(16,), (3, 5), (1, 1, 1, 1), (7, 3, 3)])
def test_packed_values_come_back(bits: int, shape: tuple[int, ...]) -> None:
    values = np.resize(np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1), dtype=np.int8), shape)
    packed = pack_values(values, bits)
    assert packed.nbytes == bits * -(-values.size // 8)
    np.testing.assert_array_equal(unpack_values(packed, bits, shape), values)


@pytest.mark.parametrize("shape", [(16,), (3, 5), (1, 1, 1, 1)])
def test_four_bits_are_openvinos_int4(shape: tuple[int, ...]) -> None:
    values = np.resize(np.arange(-8, 8, dtype=np.int8), shape)
    packed = pack_values(values, 4)[: (values.size + 1) // 2]
    constant = ov.op.Constant(ov.Tensor(packed, ov.Shape(list(shape)), ov.Type.i4))
    converted = ov.Model([ov.opset13.convert(constant, "f32")], [])
    np.testing.assert_array_equal(ov.compile_model(converted, "CPU")({})[0], values)


@pytest.mark.parametrize(
    ("bits", "values", "message"), [(4, [0, 8], r"4 bits: got \[0, 8\]; allowed \[-8, 7\]"), (2, [-3, 0], r"\[-2, 1\]")]
)
def test_values_beyond_the_width_are_refused(bits: int, values: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack_values(np.array(values, np.int8), bits)


@pytest.mark.parametrize(
    ("low", "high", "packed"),
    [
        (-2, 1, 2),
        (-1, 1, 2),
        (-2, 2, 3),
        (-4, 3, 3),
        (-8, 7, 4),
        (-9, 0, 8),
        (0, 127, 8),
    ],
)
def test_weights_take_the_fewest_bits_of_their_format(low: int, high: int, packed: int) -> None:
    weights = np.array([low, 0, high], np.int8)
    assert [stored_bits(weights, PACKED_WIDTHS[name]) for name in ("int8", "packed")] == [8, packed]


def test_unsigned_weights_with_a_zero_point_stay_bytes() -> None:
    assert stored_bits(np.array([0, 1], np.uint8), PACKED_WIDTHS["packed"]) == 8
