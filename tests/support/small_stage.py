"""A training stage on a small quantized network, for the tests of what happens during training.

Not here: any test, or the networks of the tests of quantization (small_networks.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from small_networks import Timeless, timeless
from torch import Tensor, nn

from pqcad_qat.policy.layer_rules import InputQuantizer, LayerRule, WeightQuantizer
from pqcad_qat.quantization.conversion import calibrate_ranges, quantize_model
from pqcad_qat.quantization.plan import plan_layers
from pqcad_qat.training.callback import Batch, Callback, TrainState

STEPS = 60


@dataclass
class Matching(Callback):
    """Least-squares loss as a callback; `meddle` may change the layers before a training step."""

    layers: Mapping[str, nn.Module]
    meddle: Callable[[int, Mapping[str, nn.Module]], None] = lambda _step, _layers: None
    extra: Callable[[Mapping[str, nn.Module]], Tensor] | None = None

    def __post_init__(self) -> None:
        self.name = "matching"

    def before_step(self, state: TrainState) -> None:
        self.meddle(state.step, self.layers)

    def loss_terms(self, state: TrainState, batch: Batch) -> Mapping[str, Tensor]:
        more = {} if self.extra is None else {"extra": self.extra(self.layers)}
        return {"squared": (state.network(batch["x"]) - batch["target"]).square().mean(), **more}


def network(scale: str = "learned") -> nn.Module:
    """Two convolutions at 8 bits with a ladder down to 4, calibrated."""
    torch.manual_seed(0)
    model = Timeless(nn.Conv2d(1, 8, 3), nn.SiLU(), nn.Conv2d(8, 8, 3))
    weights = WeightQuantizer(bits=4, scale=scale)  # type: ignore[arg-type]
    plan = plan_layers(
        model,
        {"every": LayerRule(match=("type:Conv2d",), weights=weights, inputs=InputQuantizer(bits=8))},
        [8, 4],
        timeless(images(0)),
    )
    quantize_model(model, plan)
    calibrate_ranges(model, [timeless(images(seed)) for seed in range(4)])
    return model


def images(seed: int) -> Tensor:
    return torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def full_precision(x: Tensor) -> Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        y: Tensor = nn.Sequential(nn.Conv2d(1, 8, 3), nn.SiLU(), nn.Conv2d(8, 8, 3))(x)
    return y


def batches(step: int) -> Batch:
    return {"x": images(step), "target": full_precision(images(step))}


def weight_range(layer: nn.Module) -> Tensor:
    found: Tensor = layer.weight_quant.tensor_quant.scaling_impl.value  # type: ignore[union-attr,assignment]
    return found


def input_range(layer: nn.Module) -> Tensor:
    found: Tensor = layer.input_quant.fused_activation_quant_proxy.tensor_quant.scaling_impl.value
    return found
