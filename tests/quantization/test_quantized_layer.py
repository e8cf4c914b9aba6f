"""Quantized layers against Brevitas's own computation, and what widths, blends and ranges do to them."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from brevitas.quant import Int8WeightPerChannelFloat, Int8WeightPerTensorFloat
from small_networks import ASYMMETRIC_INPUTS, SYMMETRIC_WEIGHTS, convolution, quantized
from torch import Tensor, nn

from pqcad_qat.errors import ExportError, ModelError
from pqcad_qat.quantization.integer_layer import input_parameters, integer_layer
from pqcad_qat.quantization.layer_state import (
    QuantizedLayer,
    begin_blend,
    blend_state,
    end_blend,
    is_calibrated,
    perturbation,
    quantized_weight,
    read_bits,
    set_blend,
    set_input_bits,
    set_input_range,
    set_weight_bits,
)
from pqcad_qat.quantization.plan import QuantizerSpec
from pqcad_qat.quantization.quantized_layer import float_layer, quantized_layer


def weight_specs() -> Iterator[QuantizerSpec]:
    for bits, per_channel, symmetric, learned, method in itertools.product(
        (8, 4, 2), *[(True, False)] * 3, ("min_max", "mse")
    ):
        yield QuantizerSpec(bits, per_channel, symmetric, symmetric, learned, method)


def input_specs() -> Iterator[QuantizerSpec]:
    for bits, learned in itertools.product((8, 4), (True, False)):
        yield QuantizerSpec(bits, False, True, True, learned, "min_max")
        yield QuantizerSpec(bits, False, True, False, learned, "min_max")
        yield QuantizerSpec(bits, False, False, False, learned, "min_max")


def named(specs: Iterator[QuantizerSpec]) -> list[object]:
    return [pytest.param(spec, id="-".join(str(value) for value in vars(spec).values())) for spec in specs]


def gradients(y: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(7))
    found = torch.autograd.grad((y * weights).sum(), tensors, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(tensors, found, strict=True)]


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


@pytest.mark.parametrize("spec", named(weight_specs()))
def test_a_width_and_back_is_the_identical_weight(spec: QuantizerSpec) -> None:
    layer = quantized(convolution(), spec)
    before = quantized_weight(layer)
    for reestimate in (True, False):
        set_weight_bits(layer, 3, reestimate)
        assert read_bits(layer)[0] == 3
        assert not torch.equal(quantized_weight(layer), before)
        set_weight_bits(layer, spec.bits, reestimate)
        assert torch.equal(quantized_weight(layer), before)


def test_a_switch_keeps_parameters_and_optimizer_state() -> None:
    layer = quantized(convolution(), ladder=(8, 4))
    optimizer = torch.optim.Adam(layer.parameters(), 1e-3)
    before = list(layer.parameters())
    for bits in (8, 4):
        set_weight_bits(layer, bits)
        layer(torch.randn(2, 4, 9, 9)).square().mean().backward()
        optimizer.step()
    assert all(a is b for a, b in zip(before, layer.parameters(), strict=True))
    assert all(optimizer.state[parameter]["step"] == 2 for parameter in before)


def test_mse_ranges_are_closer_than_the_extremes() -> None:
    def error(method: str, symmetric: bool) -> Tensor:
        layer = quantized(convolution(), QuantizerSpec(2, True, symmetric, symmetric, True, method))
        return (quantized_weight(layer) - layer.weight.detach()).square().sum(dim=(1, 2, 3))

    for symmetric in (True, False):
        assert (error("mse", symmetric) <= error("min_max", symmetric)).all()
        assert error("mse", symmetric).sum() < 0.8 * error("min_max", symmetric).sum()


@pytest.mark.parametrize("spec", named(weight_specs()))
def test_a_blend_goes_from_one_plain_quantizer_to_the_other(spec: QuantizerSpec) -> None:
    layer = quantized(convolution(), spec, ladder=(8, spec.bits))
    target = copy.deepcopy(layer)
    set_weight_bits(target, 3)
    start, end = quantized_weight(layer), quantized_weight(target)
    begin_blend(layer, 3)
    assert torch.equal(quantized_weight(layer), start)
    set_blend(layer, 0.25)
    assert blend_state(layer) == (8, 3, 0.25)
    torch.testing.assert_close(quantized_weight(layer), 0.75 * start + 0.25 * end, rtol=1e-5, atol=1e-6)
    set_blend(layer, 1.0)
    at_one = quantized_weight(layer)
    torch.testing.assert_close(at_one, end, rtol=1e-5, atol=1e-6)
    end_blend(layer)
    assert blend_state(layer) is None
    assert read_bits(layer)[0] == 3
    assert torch.equal(quantized_weight(layer), layer.weight_quant.tensor_quant(layer.weight)[0])
    torch.testing.assert_close(quantized_weight(layer), at_one, rtol=1e-6, atol=1e-7)


def test_both_halves_of_a_blend_train_the_scale() -> None:
    layer = quantized(convolution(), ladder=(8, 4))
    begin_blend(layer, 2)
    scale = layer.weight_quant.tensor_quant.scaling_impl.value
    found = []
    for share in (0.0, 0.5, 1.0):
        set_blend(layer, share)
        found.append(gradients(layer.weight_quant(layer.weight), [scale])[0])
    torch.testing.assert_close(found[1], (found[0] + found[2]) / 2)


def test_perturbation_is_the_relative_change_of_the_switch() -> None:
    layer = quantized(convolution(), QuantizerSpec(4, True, True, True, True, "mse"), ladder=(8, 4))
    now = quantized_weight(layer)
    predicted = {bits: perturbation(layer, bits) for bits in (6, 4, 2)}
    assert torch.equal(quantized_weight(layer), now)
    assert predicted[6] < predicted[4] < predicted[2]
    set_weight_bits(layer, 4)
    change = (quantized_weight(layer) - now).norm() / now.norm()
    assert predicted[4] == pytest.approx(float(change), rel=1e-5)


def test_a_strict_reload_restores_widths_blend_sign_and_ranges() -> None:
    specs = (QuantizerSpec(4, True, False, False, True, "mse"), QuantizerSpec(8, False, True, "auto", False, "min_max"))
    layer = quantized(convolution(), *specs, ladder=(8, 4))
    set_input_range(layer, 0.0, 3.0)
    set_input_bits(layer, 4)
    set_weight_bits(layer, 6)
    begin_blend(layer, 4)
    set_blend(layer, 0.3)
    other = quantized_layer(convolution(seed=5), layer.plan)
    parameters = list(other.parameters())
    other.load_state_dict(layer.state_dict(), strict=True)
    assert all(a is b for a, b in zip(parameters, other.parameters(), strict=True))
    assert read_bits(other) == (6, 4)
    assert blend_state(other) == pytest.approx((6, 4, 0.3))
    x = torch.randn(2, 4, 9, 9)
    assert torch.equal(layer(x), other(x))


def test_state_dict_of_fixed_scales_has_the_same_keys_as_of_learned_ones() -> None:
    fixed = QuantizerSpec(8, False, False, False, False, "min_max")
    inputs = [
        {key for key in quantized(convolution(), SYMMETRIC_WEIGHTS, spec).state_dict() if "input_quant" in key}
        for spec in (ASYMMETRIC_INPUTS, fixed)
    ]
    assert inputs[0] == inputs[1]


@pytest.mark.parametrize(
    ("spec", "low", "high", "expected"),
    [
        (QuantizerSpec(8, False, True, "auto", True, "min_max"), -1.0, 0.5, (1 / 128, 0, -128, 127)),
        (QuantizerSpec(8, False, True, "auto", True, "min_max"), -0.5, 1.27, (0.01, 0, -128, 127)),
        (QuantizerSpec(8, False, True, "auto", True, "min_max"), 0.0, 2.55, (0.01, 0, 0, 255)),
        (QuantizerSpec(4, False, True, False, False, "min_max"), 0.0, 1.5, (0.1, 0, 0, 15)),
        (QuantizerSpec(8, False, False, False, True, "min_max"), -0.55, 2.0, (0.01, 55, 0, 255)),
        (QuantizerSpec(8, False, False, False, False, "min_max"), 0.0, 2.55, (0.01, 0, 0, 255)),
    ],
)
def test_input_ranges_become_integers(
    spec: QuantizerSpec, low: float, high: float, expected: tuple[float, int, int, int]
) -> None:
    layer = quantized(convolution(), SYMMETRIC_WEIGHTS, spec)
    set_input_range(layer, low, high)
    assert input_parameters(layer) == pytest.approx(expected, rel=1e-6)
    ends = torch.tensor([low, 0.0, high]).reshape(1, 1, 3, 1)
    torch.testing.assert_close(layer.input_quant(ends), ends, rtol=1e-5, atol=expected[0] / 2)
    assert layer.input_quant(ends)[0, 0, 1, 0] == 0


def test_an_input_without_a_range_is_refused() -> None:
    plan = quantized(convolution()).plan
    layer = quantized_layer(convolution(), plan)
    assert not is_calibrated(layer)
    with pytest.raises(ModelError, match="no range yet"):
        layer(torch.randn(1, 4, 9, 9))
    with pytest.raises(ModelError, match="layer layer: its input range"):
        set_input_range(layer, 0.0, 0.0)


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
    with pytest.raises(ExportError, match="layer conv is between 8 and 4 bits"):
        integer_layer("conv", layer)


def test_the_layer_shows_its_quantization() -> None:
    layer: QuantizedLayer = quantized(convolution(), ladder=(8, 4))
    assert "weights=8 bits symmetric learned per_channel, inputs=8 bits asymmetric learned" in repr(layer)
    begin_blend(layer, 4)
    assert "weights=8->4 (0.00) bits" in repr(layer)
