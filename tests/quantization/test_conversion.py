"""Whole models: converted around the same Parameters, calibrated, reloaded, frozen, and converted back exactly."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from small_networks import EVERYTHING, SkipNetwork, Timeless, example, rule, skip_network, timeless
from tiny_runs import tiny_unet
from torch import Tensor, nn

from pqcad_qat.errors import ModelError
from pqcad_qat.policy.layer_rules import LayerRule, numbered
from pqcad_qat.quantization import brevitas_quantizers, fake_quantization
from pqcad_qat.quantization.conversion import (
    calibrate_ranges,
    dequantize_model,
    frozen_weights,
    integer_layers,
    quantize_model,
    quantized_layers,
    take_weights,
    unquantized,
)
from pqcad_qat.quantization.integer_layer import input_parameters
from pqcad_qat.quantization.layer_state import quantized_weight, read_bits, set_weight_bits
from pqcad_qat.quantization.plan import plan_layers


def quantized_network(*rules: LayerRule, seed: int = 0, calibrated: bool = True) -> SkipNetwork:
    model = skip_network(seed)
    quantize_model(model, plan_layers(model, numbered(rules or (EVERYTHING,)), (8, 4), example()))
    if calibrated:
        calibrate_ranges(model, [example()])
    return model


def test_parameters_are_the_same_objects_and_the_way_back_is_bit_exact() -> None:
    model = skip_network()
    before, parameters = model(*example()), dict(model.named_parameters())
    quantize_model(model, plan_layers(model, numbered([EVERYTHING]), (8, 4), example()))
    assert all(model.get_parameter(name) is parameter for name, parameter in parameters.items())
    calibrate_ranges(model, [example()])
    assert not torch.equal(model(*example()), before)
    dequantize_model(model)
    assert quantized_layers(model) == {}
    assert dict(model.named_parameters()).keys() == parameters.keys()
    assert all(model.get_parameter(name) is parameter for name, parameter in parameters.items())
    assert torch.equal(model(*example()), before)


def test_a_diffusers_unet_goes_there_and_back() -> None:
    torch.manual_seed(0)
    model, inputs = tiny_unet().eval(), (torch.randn(2, 1, 32, 32), torch.tensor([3, 700]))
    with torch.no_grad():
        before = model(*inputs).sample
        quantize_model(model, plan_layers(model, numbered([rule("*", bits=8)]), (8,), inputs))
        calibrate_ranges(model, [inputs])
        error = (model(*inputs).sample - before).norm() / before.norm()
        assert 0 < error < 0.05
        assert torch.equal(dequantize_model(model)(*inputs).sample, before)


def test_readers_of_one_tensor_have_one_quantizer_one_parameter_and_one_entry() -> None:
    model = quantized_network()
    layers = quantized_layers(model)
    assert layers["to_q"].input_quant is layers["to_k"].input_quant is layers["to_v"].input_quant
    entries = {key.split(".input_quant")[0] for key in model.state_dict() if "input_quant" in key}
    assert "to_q" in entries
    assert not entries & {"to_k", "to_v"}
    assert input_parameters(layers["to_k"]) == input_parameters(layers["to_q"])
    copied = quantized_layers(copy.deepcopy(model))
    assert copied["to_q"].input_quant is copied["to_k"].input_quant
    assert copied["to_q"].input_quant is not layers["to_q"].input_quant
    assert copied["to_q"].shared_input is copied["to_k"].shared_input is not layers["to_q"].shared_input


def test_no_entry_of_the_state_dict_shares_memory() -> None:
    pointers = [value.data_ptr() for value in quantized_network().state_dict().values()]
    assert len(pointers) == len(set(pointers))


def test_a_module_that_hangs_in_two_places_is_replaced_in_both() -> None:
    model = skip_network()
    model.alias = model.down
    quantize_model(model, plan_layers(model, numbered([rule("down")]), (8, 4), example()))
    assert model.alias is model.down
    assert list(quantized_layers(model)) == ["down"]


def test_a_strict_reload_gives_the_same_outputs_and_keeps_parameters() -> None:
    model = quantized_network()
    for index, layer in enumerate(quantized_layers(model).values()):
        set_weight_bits(layer, 3 + index % 3)
    other = quantized_network(seed=9, calibrated=False)
    parameters = dict(other.named_parameters())
    other.load_state_dict(model.state_dict(), strict=True)
    assert all(other.get_parameter(name) is parameter for name, parameter in parameters.items())
    assert torch.equal(other(*example()), model(*example()))


def test_training_a_quantized_network_lowers_its_loss() -> None:
    model, target = quantized_network(), skip_network()(*example()).detach()
    for layer in quantized_layers(model).values():
        set_weight_bits(layer, 4)
    # at ten times that the loss first rises, and where it ends is luck
    optimizer = torch.optim.Adam(model.parameters(), 2e-4)
    losses = []
    for _ in range(60):
        loss = (model(*example()) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize("method", ["min_max", "mse"])
def test_calibration_sets_each_input_to_what_the_float_layer_reads(method: str) -> None:
    model = quantized_network(rule("*", inputs={"range": method}), calibrated=False)
    read: list[torch.Tensor] = []
    hook = model.down.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    batches = [example(seed=seed) for seed in (3, 4)]
    calibrate_ranges(model, iter(batches))
    hook.remove()
    skip_in = torch.cat([skip_network().conv_in(batch[0]) for batch in batches]).detach()
    assert torch.equal(torch.cat(read[:2]), skip_in)  # as in the float network
    scale, zero_point, low, high = input_parameters(model.down)
    covered = (low - zero_point) * scale, (high - zero_point) * scale
    extremes = float(skip_in.min()), float(skip_in.max())
    if method == "min_max":
        assert covered == pytest.approx(extremes, abs=scale)
    else:
        assert covered[0] > extremes[0] - scale
        assert covered[1] < extremes[1] + scale


def test_a_sign_is_found_by_calibration() -> None:
    model = quantized_network(rule("*", inputs={"symmetric": True}))
    assert input_parameters(model.down)[2:] == (-128, 127)
    positive = Timeless(nn.ReLU(), nn.Conv2d(1, 2, 3)).eval()
    rules = numbered([rule("*", inputs={"symmetric": True})])
    quantize_model(positive, plan_layers(positive, rules, (8, 4), example()))
    calibrate_ranges(positive, [example()])
    assert input_parameters(positive[1])[1:] == (0, 0, 255)


def test_calibration_leaves_modes_and_quantization_as_they_were() -> None:
    model = quantized_network(calibrated=False).train()
    calibrate_ranges(model, [example()])
    assert model.training
    assert model.down.weight_quant.training
    assert not torch.equal(model.down.weight_quant(model.down.weight), model.down.weight)


def test_unusable_calibration_data_name_the_layer() -> None:
    model = quantized_network(calibrated=False)
    with pytest.raises(ModelError, match="input of layer conv_in: got zeros everywhere"):
        calibrate_ranges(model, [timeless(torch.zeros(1, 1, 8, 8))])
    with pytest.raises(ModelError, match="input of layer conv_in: got NaN"):
        calibrate_ranges(model, [timeless(torch.full((1, 1, 8, 8), torch.nan))])
    with pytest.raises(ModelError, match="got no batch; allowed at least one"):
        calibrate_ranges(model, [])


def test_an_uncalibrated_network_is_refused_and_a_foreign_plan_too() -> None:
    model = quantized_network(calibrated=False)
    with pytest.raises(ModelError, match="got no range yet"):
        model(*example())
    plan = plan_layers(skip_network(), numbered([EVERYTHING]), (8, 4), example())
    with pytest.raises(ModelError, match=r"does not have in floating point: conv_in, .*; allowed a plan"):
        quantize_model(nn.Sequential(nn.Linear(2, 2)), plan)


def test_unquantized_is_the_float_network() -> None:
    model = quantized_network()
    with unquantized(model):
        assert torch.equal(model(*example()), skip_network()(*example()))
    assert not torch.equal(model(*example()), skip_network()(*example()))


def test_an_input_of_several_layers_is_quantized_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, alone = quantized_network().train(), quantized_network().train()
    for layer in quantized_layers(alone).values():
        layer.shared_input = None
    quantized: list[Tensor] = []

    def quantize(x: Tensor, *args: Any, **named: Any) -> Tensor:
        quantized.append(x)
        return fake_quantization.quantize(x, *args, **named)

    monkeypatch.setattr(brevitas_quantizers, "quantize", quantize)
    found, counts = [], []
    for network in (model, alone):
        quantized.clear()
        network(*example()).square().sum().backward()
        counts.append(len(quantized))
        found.append({name: parameter.grad for name, parameter in network.named_parameters()})
    assert counts[1] - counts[0] == 2
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], msg=name)
    assert model.to_q.shared_input.shared is None


def test_an_input_that_was_written_over_is_quantized_anew() -> None:
    model = quantized_network()
    x = torch.randn(3, 8)
    with torch.no_grad():
        before = model.to_q(x)
        x.mul_(-1.0)
        assert torch.equal(model.to_k(x), model.to_k(x.clone()))
        assert not torch.equal(model.to_q(x), before)


def test_frozen_weights_give_the_same_outputs_and_are_computed_once() -> None:
    model = quantized_network()
    with torch.no_grad():
        before = model(*example())
        with frozen_weights(model):
            held = model.down.weight_quant(model.down.weight)
            assert model.down.weight_quant(model.down.weight) is held
            assert torch.equal(model(*example()), before)
        model.down.weight.add_(1.0)
        assert not torch.equal(quantized_weight(model.down), held)
        assert not torch.equal(model(*example()), before)


def test_integer_layers_cover_every_quantized_layer() -> None:
    integers = integer_layers(quantized_network())
    assert list(integers) == list(quantized_layers(quantized_network()))
    assert integers["to_v"].input_group == "to_q"
    assert integers["to_v"].bias is None
    assert integers["to_q"].weight_int.shape == (8, 8)
    assert integers["conv_in"].kind == "Conv2d"


def test_weights_of_another_copy_are_taken_with_their_ranges_at_the_models_own_widths() -> None:
    """Weights on the grid of 4 bits are nearly those at 8 bits, and exactly those at 4 bits again."""
    narrow, wide = quantized_network(calibrated=False), quantized_network(seed=1, calibrated=False)
    for layer in quantized_layers(narrow).values():
        set_weight_bits(layer, 4)
        layer.weight.data.copy_(quantized_weight(layer))
    take_weights(wide, narrow)
    for name, layer in quantized_layers(wide).items():
        wanted = quantized_weight(quantized_layers(narrow)[name])
        assert read_bits(layer)[0] == 8
        assert 0 < (quantized_weight(layer) - wanted).norm() / wanted.norm() < 0.01
        set_weight_bits(layer, 4)
        torch.testing.assert_close(quantized_weight(layer), wanted)
