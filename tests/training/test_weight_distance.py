"""The distance of weights to full precision: closed forms, and what it keeps over a resumed run."""

from __future__ import annotations

import pytest
import torch
from small_networks import Timeless, timeless
from torch import nn

from pqcad_qat.policy.layer_rules import InputQuantizer, LayerRule, WeightQuantizer, numbered
from pqcad_qat.quantization.conversion import quantize_model, quantized_layers
from pqcad_qat.quantization.layer_state import begin_blend, quantized_weight, set_blend, set_weight_bits
from pqcad_qat.quantization.plan import plan_layers
from pqcad_qat.training.callback import StepReport, TrainState
from pqcad_qat.training.weight_distance import OBSERVE_EVERY, WeightDistance


def network() -> nn.Module:
    torch.manual_seed(0)
    model = Timeless(nn.Conv2d(1, 4, 3), nn.SiLU(), nn.Conv2d(4, 4, 3))
    rule = LayerRule(match="type:Conv2d", weights=WeightQuantizer(bits=2), inputs=InputQuantizer(bits=8))
    return quantize_model(model, plan_layers(model, numbered([rule]), (8, 2), timeless(torch.randn(1, 1, 8, 8))))


def at_step(model: nn.Module, step: int) -> TrainState:
    return TrainState(model, torch.optim.SGD(model.parameters(), 0.1), model, step=step)


REPORT = StepReport(1.0, {}, 1.0, 0.1, 8)


def test_it_is_the_mean_relative_change_of_the_weights_in_use() -> None:
    model = network()
    layers = quantized_layers(model)
    distance = WeightDistance(layers)
    wanted = [
        float((quantized_weight(layer) - layer.weight.detach()).norm() / layer.weight.detach().norm())
        for layer in layers.values()
    ]
    assert distance.scalars() == {"weight_distance": pytest.approx(sum(wanted) / 2)}
    with torch.no_grad():
        for layer in layers.values():
            layer.weight.mul_(3)  # a relative change of 2, whatever the widths
    distance.after_step(at_step(model, OBSERVE_EVERY), REPORT)
    assert distance.scalars()["weight_distance"] == pytest.approx(2, rel=0.02)


def test_fewer_bits_are_farther_and_a_blend_lies_between() -> None:
    model = network()
    layers = quantized_layers(model)
    found = [WeightDistance(layers).scalars()["weight_distance"]]
    for layer in layers.values():
        begin_blend(layer, 2)
        set_blend(layer, 0.5)
    found.append(WeightDistance(layers).scalars()["weight_distance"])
    for layer in layers.values():
        set_weight_bits(layer, 2)
    found.append(WeightDistance(layers).scalars()["weight_distance"])
    assert found[0] < 0.9 * found[1] < 0.9 * found[2]


def test_between_observations_and_over_a_resume_it_stays() -> None:
    model = network()
    distance = WeightDistance(quantized_layers(model))
    before = distance.scalars()
    with torch.no_grad():
        model[0].weight.mul_(3)  # type: ignore[operator]
    distance.after_step(at_step(model, OBSERVE_EVERY - 1), REPORT)
    assert distance.scalars() == before
    other = WeightDistance(quantized_layers(network()))
    other.load_state_dict({"mean": 0.25})
    assert other.scalars() == {"weight_distance": 0.25}
    assert other.state_dict() == {"mean": 0.25}
