"""A small quantized denoiser, and its export to a folder, shared by the tests of deployment.

Not here: any test.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from tiny_runs import SCHEDULER, tiny_unet
from torch import Tensor, nn

from pqcad_qat.export.export_model import ExportRequest, export_model
from pqcad_qat.policy.layer_rules import LayerRule, numbered
from pqcad_qat.quantization.conversion import calibrate_ranges, integer_layers, quantize_model, quantized_layers
from pqcad_qat.quantization.integer_layer import IntegerLayer
from pqcad_qat.quantization.plan import plan_layers
from pqcad_qat.quantization.shortcuts import split_shortcuts
from pqcad_qat.serving.packing import WeightFormat

if TYPE_CHECKING:
    import pytest

SHAPE = (1, 32, 32)
BATCH = 2
PROVENANCE = {"policy": "test", "model": {"source": "random weights", "digest": "none"}}


@dataclass(frozen=True)
class Quantized:
    """A quantized model, its integer layers, and the inputs of those layers and the model's prediction on one batch."""

    model: nn.Module
    layers: Mapping[str, IntegerLayer]
    inputs: Mapping[str, np.ndarray]
    states: Tensor  # (B, C, H, W)
    timesteps: Tensor  # (B,)
    prediction: np.ndarray  # (B, C, H, W)

    def export(self, folder: Path, weights: WeightFormat = "int8", batch: int = BATCH) -> Path:
        request = ExportRequest(self.model, SCHEDULER, self.layers, SHAPE, batch_size=batch, provenance=PROVENANCE)
        return export_model(request, folder, weights).path


def quantized_unet(weights: Mapping[str, Any], inputs: Mapping[str, Any]) -> Quantized:
    """The tiny UNet, quantized, with its shortcuts split."""
    torch.manual_seed(0)
    return quantized(tiny_unet(), weights, inputs)


@dataclass(frozen=True)
class DeployedUnet:
    """The tiny UNet at 4 bits, and its folder in each format."""

    quantized: Quantized
    int8: Path
    packed: Path


_MADE: list[DeployedUnet] = []


def deployed_unet(factory: pytest.TempPathFactory) -> DeployedUnet:
    """Quantized and exported once in a process, for all tests, which must not change it."""
    if not _MADE:
        made, root = quantized_unet({"bits": 4}, {"bits": 8, "symmetric": False}), factory.mktemp("deployed-unet")
        int8, packed = made.export(root / "int8" / "openvino"), made.export(root / "packed" / "openvino", "packed")
        _MADE.append(DeployedUnet(made, int8, packed))
    return _MADE[0]


def quantized_small(weights: Mapping[str, Any], inputs: Mapping[str, Any]) -> Quantized:
    """The small denoiser below, quantized."""
    torch.manual_seed(0)
    return quantized(SmallDenoiser(), weights, inputs)


def quantized(model: nn.Module, weights: Mapping[str, Any], inputs: Mapping[str, Any]) -> Quantized:
    """Quantize every layer of a model alike; the arguments are the keys `weights` and `inputs` of a policy's rule."""
    states, timesteps = torch.randn(BATCH, *SHAPE), torch.tensor([999, 40])
    split_shortcuts(model, (states, timesteps))
    rule = LayerRule.model_validate(
        {"match": ["type:Conv2d", "type:Linear"], "weights": dict(weights), "inputs": dict(inputs)}
    )
    plan = plan_layers(model, numbered([rule]), (weights["bits"],), (states, timesteps))
    quantize_model(model, plan)
    calibrate_ranges(model, [(states, timesteps)])
    model.eval()
    seen, prediction = _run(model, states, timesteps)
    return Quantized(model, integer_layers(model), seen, states, timesteps, prediction)


@torch.no_grad()
def _run(model: nn.Module, states: Tensor, timesteps: Tensor) -> tuple[dict[str, np.ndarray], np.ndarray]:
    seen: dict[str, np.ndarray] = {}

    def watch(name: str) -> Any:
        def see(layer: Any, arguments: tuple[Tensor]) -> None:
            factors = layer.input_quant.factors
            seen[name] = (arguments[0] if factors is None else arguments[0] * factors).numpy().copy()

        return see

    hooks = [layer.register_forward_pre_hook(watch(name)) for name, layer in quantized_layers(model).items()]
    output = model(states, timesteps)
    prediction = (output if isinstance(output, Tensor) else output.sample).numpy()
    for hook in hooks:
        hook.remove()
    return seen, prediction


class SmallDenoiser(nn.Module):
    """Denoiser with every kind of layer that deployment must run in INT8, in a graph that compiles fast.

    It maps x (B, 1, 32, 32) and t (B,) to (B, 1, 32, 32).
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(1, 16, 3, padding=1)
        self.down = nn.Conv2d(16, 16, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(16, 16, 3, padding=2, dilation=2, groups=2, bias=False)
        self.time = nn.Linear(1, 16)
        self.to_q, self.to_k = nn.Linear(16, 16, bias=False), nn.Linear(16, 16)
        self.conv_out = nn.Conv2d(16, 1, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.down(F.silu(self.conv_in(x))) + self.time(t.float()[:, None] / 1000)[:, :, None, None]
        h = F.silu(self.grouped(F.silu(h)))
        tokens = h.flatten(2).transpose(1, 2)  # (B, HW, C)
        h = (self.to_q(tokens) * self.to_k(tokens)).transpose(1, 2).reshape(h.shape)
        out: Tensor = self.conv_out(F.interpolate(h, scale_factor=2.0))
        return out
