"""Equalized channels: the function stays, the quantizer's errors fall, and everything that leaves the layer fits it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from deployed_fixture import BATCH, SHAPE, SmallDenoiser, quantized
from tiny_runs import tiny_unet
from torch import Tensor, nn

from pqcad_qat.export.execution import execution_precision
from pqcad_qat.export.proof import layer_parity
from pqcad_qat.policy.layer_rules import LayerRule, numbered
from pqcad_qat.quantization.conversion import (
    calibrate_ranges,
    dequantize_model,
    quantize_model,
    quantized_layers,
    unquantized,
)
from pqcad_qat.quantization.equalization import LARGEST, channel_factors, over_weights
from pqcad_qat.quantization.layer_state import quantized_weight, weights_for
from pqcad_qat.quantization.plan import plan_layers

A4 = {"bits": 4, "symmetric": False, "equalize": True}
A8 = {"bits": 8, "symmetric": False, "equalize": True}


def uneven() -> SmallDenoiser:
    """A denoiser whose channels differ by factors of up to 64, as the ones before and after them undo."""
    torch.manual_seed(0)
    model = SmallDenoiser()
    sizes = 2.0 ** torch.linspace(-3, 3, 16)
    with torch.no_grad():
        model.conv_in.weight.mul_(sizes[:, None, None, None])
        model.down.weight.div_(sizes[None, :, None, None])
    return model


def uneven_unet() -> nn.Module:
    """The tiny UNet with normalized channels of different size."""
    torch.manual_seed(0)
    model = tiny_unet()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.GroupNorm):
                module.weight.mul_(2.0 ** (2 * torch.randn(module.num_channels)))
    return model


def quantized_copy(model: nn.Module, *, equalize: bool, bits: int = 4) -> tuple[nn.Module, Tensor, Tensor]:
    model = copy.deepcopy(model).eval()
    states, timesteps = torch.randn(BATCH, *SHAPE, generator=torch.Generator().manual_seed(1)), torch.tensor([999, 40])
    rule = LayerRule.model_validate(
        {
            "match": ["type:Conv2d", "type:Linear"],
            "weights": {"bits": 8},
            "inputs": {"bits": bits, "symmetric": False, "equalize": equalize},
        }
    )
    quantize_model(model, plan_layers(model, numbered([rule]), (), (states, timesteps)))
    calibrate_ranges(model, [(states, timesteps)])
    return model, states, timesteps


def test_factors_are_powers_of_two_around_one_that_even_channels_out_by_half() -> None:
    factors = channel_factors(torch.tensor([16.0, 4.0, 1.0, 0.25, 0.0, 1e-30]))
    assert factors[4] == 1  # a channel of zeros
    assert torch.equal(factors.log2(), factors.log2().round())
    assert factors[5] == 2.0**LARGEST
    assert factors[:4].tolist() == [0.25, 0.5, 1, 2]  # whatever the dead ones are
    assert channel_factors(torch.ones(3)).tolist() == [1, 1, 1]


def test_weights_of_each_group_are_divided_by_its_own_channels() -> None:
    layer = nn.Conv2d(4, 6, 1, groups=2)
    of_rows = over_weights(torch.tensor([1.0, 2.0, 4.0, 8.0]), layer)
    assert of_rows[..., 0, 0].tolist() == [[1, 2]] * 3 + [[4, 8]] * 3


@torch.no_grad()
def test_without_quantizers_the_function_is_the_same_to_the_bit() -> None:
    model = uneven()
    equalized, states, timesteps = quantized_copy(model, equalize=True)
    factors = {name: layer.input_quant.factors for name, layer in quantized_layers(equalized).items()}
    assert factors["to_q"] is factors["to_k"]
    assert len(factors["down"].unique()) > 3
    expected = model(states, timesteps)
    for _ in range(2):  # calibrated again, it has other factors
        with unquantized(equalized):
            assert torch.equal(equalized(states, timesteps), expected)
        calibrate_ranges(equalized, [(states.flip(-1) * 3, timesteps)])
    assert torch.equal(dequantize_model(copy.deepcopy(equalized))(states, timesteps), expected)


@torch.no_grad()
def test_channels_of_different_size_are_quantized_with_a_smaller_error() -> None:
    model = uneven()
    errors = {}
    for equalize in (False, True):
        made, states, timesteps = quantized_copy(model, equalize=equalize)
        errors[equalize] = float((made(states, timesteps) - model(states, timesteps)).square().mean())
    assert errors[True] < 0.5 * errors[False]


@torch.no_grad()
def test_a_state_carries_its_factors_and_full_precision_comes_in_the_units_of_the_weights() -> None:
    model = uneven()
    equalized, states, timesteps = quantized_copy(model, equalize=True)
    fresh = quantize_model(copy.deepcopy(model), [layer.plan for layer in quantized_layers(equalized).values()]).eval()
    fresh.load_state_dict(equalized.state_dict(), strict=True)
    assert torch.equal(fresh(states, timesteps), equalized(states, timesteps))
    layer = quantized_layers(equalized)["down"]
    assert torch.equal(weights_for(layer, model.down.weight), layer.weight)
    assert not torch.equal(quantized_weight(layer), layer.weight)


@pytest.mark.parametrize("build", [uneven, uneven_unet])
@pytest.mark.parametrize("inputs", [A4, A8], ids=["4 bits", "8 bits"])
def test_every_deployed_layer_executes_in_int8_and_gives_pytorchs_integers(
    inputs: dict[str, object], build: Callable[[], nn.Module], tmp_path: Path
) -> None:
    made = quantized(build(), {"bits": 4}, inputs)
    factors = [layer.input_factors for layer in made.layers.values() if layer.input_factors is not None]
    assert sum(len(set(of_layer.tolist())) > 1 for of_layer in factors) > len(factors) / 3
    folder = made.export(tmp_path / "openvino")
    executed = execution_precision(folder, made.layers)
    assert executed.float_layers == ()
    assert executed.executed_int8 == executed.planned == len(made.layers)
    parity = layer_parity(folder, made.layers, made.inputs)
    assert [layer.name for layer in parity.layers if layer.different] == []
    assert parity.layers_exact == parity.layers_checked == len(made.layers)
