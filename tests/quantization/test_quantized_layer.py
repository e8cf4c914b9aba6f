"""Quantized layers against Brevitas's own computation, and against the floating-point layers that they were."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from brevitas.quant import Int8WeightPerChannelFloat, Int8WeightPerTensorFloat
from small_networks import ASYMMETRIC_INPUTS, SYMMETRIC_WEIGHTS, convolution, gradients, named, quantized, weight_specs
from torch import nn

from pqcad_qat.errors import ModelError
from pqcad_qat.quantization.layer_state import (
    QuantizedLayer,
    begin_blend,
    is_calibrated,
    quantized_weight,
    set_input_range,
)
from pqcad_qat.quantization.plan import QuantizerSpec
from pqcad_qat.quantization.quantized_layer import float_layer, quantized_layer


def input_specs() -> Iterator[QuantizerSpec]:
    for bits, learned in itertools.product((8, 4), (True, False)):
        yield QuantizerSpec(bits, False, True, True, learned, "min_max")
        yield QuantizerSpec(bits, False, True, False, learned, "min_max")
        yield QuantizerSpec(bits, False, False, False, learned, "min_max")


@pytest.mark.parametrize("spec", named(weight_specs()))
def test_weights_have_brevitas_values_and_gradients(spec: QuantizerSpec) -> None:
    layer = quantized(convolution(), spec)
    brevitas = layer.weight_quant.tensor_quant
    learned = list(brevitas.parameters())
    with torch.no_grad():
        for parameter in learned:
            parameter.mul_(0.7)  # so that some weights are clamped
    ours, theirs = layer.weight_quant(layer.weight), brevitas(layer.weight)[0]
    assert torch.equal(ours, theirs)
    tensors = [layer.weight, *learned]
    for mine, reference in zip(gradients(ours, tensors), gradients(theirs, tensors), strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spec", named(input_specs()))
def test_inputs_have_brevitas_values_and_gradients(spec: QuantizerSpec) -> None:
    layer = quantized(convolution(), SYMMETRIC_WEIGHTS, spec)
    brevitas = layer.input_quant.fused_activation_quant_proxy.tensor_quant
    x = (torch.randn(2, 4, 9, 9, generator=torch.Generator().manual_seed(1)) * 2).requires_grad_()
    ours, theirs = layer.input_quant(x), brevitas(x)[0]
    assert torch.equal(ours, theirs)
    tensors = [x, *brevitas.parameters()]
    assert len(tensors) == 1 + spec.learned_scale * (1 if spec.symmetric else 2)
    for mine, reference in zip(gradients(ours, tensors), gradients(theirs, tensors), strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("per_channel", "reference"), [(True, Int8WeightPerChannelFloat), (False, Int8WeightPerTensorFloat)]
)
def test_statistics_at_8_bits_are_the_quantizers_that_brevitas_ships(per_channel: bool, reference: object) -> None:
    import brevitas.nn

    plain = convolution()
    theirs = brevitas.nn.QuantConv2d(4, 6, 3, padding=1, weight_quant=reference)
    theirs.load_state_dict(plain.state_dict())
    layer = quantized(plain, QuantizerSpec(8, per_channel, True, True, False, "min_max"))
    assert torch.equal(quantized_weight(layer), theirs.quant_weight().value)


def test_layers_that_brevitas_computes_itself_agree() -> None:
    import brevitas.nn

    layer = quantized(convolution())
    x = torch.randn(2, 4, 9, 9, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(layer(x), brevitas.nn.QuantConv2d.forward(layer, x))
    scale = layer.weight_quant.scale()
    assert torch.equal(scale.flatten(), layer.weight.detach().abs().amax(dim=(1, 2, 3)) / 7)


def test_parameters_stay_the_same_objects_and_the_way_back_is_exact() -> None:
    for plain in (
        convolution(),
        nn.Linear(4, 5, bias=False),
        nn.Conv2d(4, 4, 3, stride=2, padding=2, dilation=2, groups=2),
    ):
        layer = quantized(plain)
        assert layer.weight is plain.weight
        assert layer.bias is plain.bias
        back = float_layer(layer)
        assert back.weight is plain.weight
        x = torch.randn(2, 4, 9, 9) if isinstance(plain, nn.Conv2d) else torch.randn(3, 4)
        assert type(back) is type(plain)
        assert torch.equal(back(x), plain(x))


def test_state_dict_of_fixed_scales_has_the_same_keys_as_of_learned_ones() -> None:
    fixed = QuantizerSpec(8, False, False, False, False, "min_max")
    inputs = [
        {key for key in quantized(convolution(), SYMMETRIC_WEIGHTS, spec).state_dict() if "input_quant" in key}
        for spec in (ASYMMETRIC_INPUTS, fixed)
    ]
    assert inputs[0] == inputs[1]


def test_an_input_without_a_range_is_refused() -> None:
    plan = quantized(convolution()).plan
    layer = quantized_layer(convolution(), plan)
    assert not is_calibrated(layer)
    with pytest.raises(ModelError, match="got no range yet"):
        layer(torch.randn(1, 4, 9, 9))
    with pytest.raises(ModelError, match="layer layer: got an input range of"):
        set_input_range(layer, 0.0, 0.0)


def test_the_layer_shows_its_quantization() -> None:
    layer: QuantizedLayer = quantized(convolution(), ladder=(8, 4))
    assert "weights=8 bits symmetric learned per_channel, inputs=8 bits asymmetric learned" in repr(layer)
    begin_blend(layer, 4)
    assert "weights=8->4 (0.00) bits" in repr(layer)
