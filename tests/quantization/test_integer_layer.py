"""The integers of a quantized layer, which give its weight back exactly."""

from __future__ import annotations

import numpy as np
import pytest
from small_networks import convolution, named, quantized, weight_specs

from pqcad_qat.errors import ExportError
from pqcad_qat.quantization.integer_layer import integer_layer
from pqcad_qat.quantization.layer_state import (
    begin_blend,
    quantized_weight,
)
from pqcad_qat.quantization.plan import QuantizerSpec


@pytest.mark.parametrize("spec", named(weight_specs()))
def test_integers_and_scales_give_the_weight_back_exactly(spec: QuantizerSpec) -> None:
    layer = quantized(convolution(), spec)
    integers = integer_layer("conv", layer)
    assert integers.weight_int.dtype == np.int8
    assert integers.weight_scale.dtype == np.float32
    assert integers.weight_scale.shape == ((6, 1, 1, 1) if spec.per_channel else ())
    restored = (
        integers.weight_int.astype(np.float32) - integers.weight_zero_point.astype(np.float32)
    ) * integers.weight_scale
    assert np.array_equal(restored, quantized_weight(layer).numpy())
    limit = 2 ** (spec.bits - 1)
    assert integers.weight_int.min() >= -limit + spec.symmetric
    assert integers.weight_int.max() <= limit - 1
    assert (integers.stride, integers.padding, integers.dilation, integers.groups) == ((1, 1), (1, 1), (1, 1), 1)
    assert not spec.symmetric or not integers.weight_zero_point.any()


def test_integers_within_a_transition_are_refused() -> None:
    layer = quantized(convolution(), ladder=(8, 4))
    begin_blend(layer, 4)
    with pytest.raises(ExportError, match="layer conv: got weights between 8 and 4 bits"):
        integer_layer("conv", layer)
