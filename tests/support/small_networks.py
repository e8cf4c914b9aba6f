"""Small networks and plans for the tests of quantization: the features of a denoiser in a few thousand parameters.

Not here: any test.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pqcad_qat.models.denoiser import predict
from pqcad_qat.policy.layer_rules import InputQuantizer, LayerRule, WeightQuantizer
from pqcad_qat.quantization.conversion import calibrate_ranges, quantize_model
from pqcad_qat.quantization.layer_sensitivity import relative_error
from pqcad_qat.quantization.layer_state import QuantizedLayer, set_input_range
from pqcad_qat.quantization.plan import LayerPlan, QuantizerSpec, plan_layers
from pqcad_qat.quantization.quantizable_layers import KINDS
from pqcad_qat.quantization.quantized_layer import quantized_layer

SYMMETRIC_WEIGHTS = QuantizerSpec(4, per_channel=True, symmetric=True, signed=True, learned_scale=True, range="min_max")
ASYMMETRIC_INPUTS = QuantizerSpec(
    8, per_channel=False, symmetric=False, signed=False, learned_scale=True, range="min_max"
)


class SkipNetwork(nn.Module):
    """Network with two convolutions over a concatenated shortcut (one behind norm and SiLU, one direct), q, k and v
    over one tensor, and an output convolution.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(1, 8, 3, padding=1)
        self.down = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.GroupNorm(4, 16)
        self.conv1 = nn.Conv2d(16, 8, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(16, 8, 1)
        self.to_q, self.to_k, self.to_v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.conv_out = nn.Conv2d(8, 1, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        """Map x (B, 1, H, W) to (B, 1, H, W), independently of the time step."""
        skip = self.conv_in(x)
        joined = torch.cat([F.silu(self.down(skip)), skip], dim=1)
        h = self.conv1(F.silu(self.norm(joined))) + self.conv_shortcut(joined)
        rows = h.flatten(2).transpose(1, 2)
        attended = F.scaled_dot_product_attention(self.to_q(rows), self.to_k(rows), self.to_v(rows))
        y: Tensor = self.conv_out(h + attended.transpose(1, 2).reshape(h.shape))
        return y


def skip_network(seed: int = 0) -> SkipNetwork:
    torch.manual_seed(seed)
    return SkipNetwork().eval()


def calibrated_network(bits: int = 4) -> SkipNetwork:
    """The network with all layers quantized, whose inputs have the ranges of `several_batches`."""
    model = skip_network()
    rules = {"all": rule("type:Conv2d", "type:Linear", bits=bits)}
    quantize_model(model, plan_layers(model, rules, (), example()))
    calibrate_ranges(model, several_batches())
    return model


def several_batches() -> list[tuple[Tensor, Tensor, dict[str, Tensor]]]:
    return [(*example(8, seed), {}) for seed in range(1, 5)]


def error_of(model: nn.Module) -> float:
    """Relative error of what a quantized copy of the network predicts of states that are in no batch."""
    fresh = [(*example(8, seed), {}) for seed in range(11, 13)]
    with torch.no_grad():
        reference = [predict(skip_network(), *batch) for batch in fresh]
        return relative_error(model, reference, fresh)


def example(batch: int = 2, seed: int = 1) -> tuple[Tensor, Tensor]:
    return timeless(torch.randn(batch, 1, 8, 8, generator=torch.Generator().manual_seed(seed)))


def timeless(x: Tensor) -> tuple[Tensor, Tensor]:
    """Input of a denoiser that ignores its time step: x, and time steps of zero."""
    return x, torch.zeros(len(x), dtype=torch.long)


class Timeless(nn.Sequential):
    """Sequence of layers as a denoiser that ignores its time step."""

    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        y: Tensor = super().forward(x)
        return y


def rule(*match: str, bits: int = 4, inputs: dict[str, Any] | None = None, **weights: Any) -> LayerRule:
    """Rule with quantizers of the given attributes; by default learned scales and min_max ranges, with asymmetric
    inputs.
    """
    weight_values = {"bits": bits, "scale": "learned", "range": "min_max", **weights}
    input_values = {"bits": 8, "symmetric": False, "range": "min_max", **(inputs or {})}
    return LayerRule(match=match, weights=WeightQuantizer(**weight_values), inputs=InputQuantizer(**input_values))


EVERYTHING = rule("type:Conv2d", "type:Linear")


def layer_plan(
    layer: nn.Module,
    weights: QuantizerSpec = SYMMETRIC_WEIGHTS,
    inputs: QuantizerSpec = ASYMMETRIC_INPUTS,
    ladder: tuple[int, ...] = (),
) -> LayerPlan:
    return LayerPlan(
        "layer",
        KINDS[type(layer)],
        "*",
        0,
        weights,
        inputs,
        "layer",
        ladder or (weights.bits,),
        0,
        int8_exception=False,
    )


def quantized(layer: nn.Conv2d | nn.Linear, *specs: QuantizerSpec, ladder: tuple[int, ...] = ()) -> QuantizedLayer:
    """Quantize a layer and set the range of its input to [-1.5, 2.5]."""
    result = quantized_layer(layer, layer_plan(layer, *specs, ladder=ladder))
    set_input_range(result, -1.5, 2.5)
    return result


def convolution(seed: int = 0) -> nn.Conv2d:
    """Convolution from four to six channels, one of them far larger, one all positive."""
    torch.manual_seed(seed)
    layer = nn.Conv2d(4, 6, 3, padding=1)
    with torch.no_grad():
        layer.weight[1] *= 20
        layer.weight[2].abs_()
    return layer


def unet_config(**changed: Any) -> dict[str, Any]:
    """Config of a UNet2DModel on which every part of a benchmark is fast: 8x8, one channel, attention at the lower
    level.
    """
    config = {
        "_class_name": "UNet2DModel",
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": [8, 16],
        "layers_per_block": 1,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["UpBlock2D", "UpBlock2D"],
        "add_attention": False,
        "attention_head_dim": 16,
        "norm_num_groups": 4,
    }
    return config | changed


def weight_specs() -> Iterator[QuantizerSpec]:
    """Every kind of weight quantizer at 8, 4 and 2 bits."""
    for bits, per_channel, symmetric, learned, method in itertools.product(
        (8, 4, 2), *[(True, False)] * 3, ("min_max", "mse")
    ):
        yield QuantizerSpec(bits, per_channel, symmetric, symmetric, learned, method)


def named(specs: Iterator[QuantizerSpec]) -> list[object]:
    """The specs as parameters of a test, each named after its fields."""
    return [pytest.param(spec, id="-".join(str(value) for value in vars(spec).values())) for spec in specs]


def gradients(y: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    """The gradients of a fixed weighted sum of y; zeros where y does not depend on a tensor."""
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(7))
    slopes = torch.autograd.grad((y * weights).sum(), tensors, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(tensors, slopes, strict=True)]
