"""What widths, blends and ranges do to a quantized layer."""

from __future__ import annotations

import copy

import pytest
import torch
from small_networks import SYMMETRIC_WEIGHTS, convolution, gradients, named, quantized, weight_specs
from torch import Tensor

from pqcad_qat.quantization.integer_layer import input_parameters
from pqcad_qat.quantization.layer_state import (
    WITHIN,
    begin_blend,
    blend_state,
    end_blend,
    level_size,
    move_onto_levels,
    move_within_levels,
    perturbation,
    quantized_weight,
    read_bits,
    set_blend,
    set_input_bits,
    set_input_range,
    set_weight_bits,
)
from pqcad_qat.quantization.plan import QuantizerSpec
from pqcad_qat.quantization.quantized_layer import quantized_layer


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


@pytest.mark.parametrize("symmetric", [True, False])
def test_weights_move_towards_others_and_stay_rounded_as_they_are(symmetric: bool) -> None:
    layer = quantized(convolution(), QuantizerSpec(4, True, symmetric, symmetric, True, "mse"))
    rounded = quantized_weight(layer)
    own = layer.weight.detach().clone()
    size = level_size(layer)
    wanted = own + size * torch.linspace(-1.5, 1.5, own.numel()).reshape(own.shape)
    move_within_levels(layer, wanted)
    assert torch.equal(quantized_weight(layer), rounded)
    reach = (layer.weight - rounded).abs() / size
    assert float(reach.max()) <= WITHIN + 1e-6
    # what can be reached is reached, and what cannot be lies at the boundary on its side
    near = (wanted - rounded).abs() < 0.49 * size
    torch.testing.assert_close(layer.weight[near], wanted[near])
    assert near.any()
    far = (wanted - rounded).abs() > 0.51 * size
    assert bool(((wanted - rounded)[far] * (layer.weight - rounded)[far] > 0).all())
    assert float(reach[far].min()) > 0.49
    assert far.any()
    move_onto_levels(layer)
    assert torch.equal(layer.weight, rounded)
