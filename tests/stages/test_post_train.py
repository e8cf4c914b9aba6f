"""Where the weights of a post-trained model lie within their levels, and what training begins with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from small_networks import calibrated_network, several_batches, skip_network
from torch import nn

from pqcad_qat.policy.loading import load_policy
from pqcad_qat.policy.schema import Policy
from pqcad_qat.policy.shipped import policy_file
from pqcad_qat.quantization.conversion import quantized_layers
from pqcad_qat.quantization.gptq_rounding import round_weights
from pqcad_qat.quantization.layer_state import WITHIN, level_size, quantized_weight
from pqcad_qat.stages.post_train import lay_within_levels, to_train, within_levels


class Models:
    """Stands for the models of a run whose `ptq` is this one."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def of(self, _name: str) -> nn.Module:
        return self.model


def policy(*overrides: str) -> Policy:
    return load_policy(policy_file("smoke"), overrides)


def post_trained() -> nn.Module:
    model = calibrated_network(4)
    round_weights(model, several_batches(), passes=2)
    return model


def test_weights_lie_where_full_precision_has_them_or_as_near_as_their_rounding_allows() -> None:
    model = post_trained()
    before = {name: quantized_weight(layer) for name, layer in quantized_layers(model).items()}
    full = skip_network()
    lay_within_levels(model, full)
    for name, layer in quantized_layers(model).items():
        wanted, size = full.get_parameter(f"{name}.weight"), level_size(layer)
        assert torch.equal(quantized_weight(layer), before[name])
        inside = (wanted - before[name]).abs() < 0.49 * size
        torch.testing.assert_close(layer.weight[inside], wanted[inside])
        outside = (layer.weight - before[name])[~inside].abs() / size.expand_as(wanted)[~inside]
        assert torch.all((outside >= 0.48) & (outside <= WITHIN + 1e-4))
        assert 0 < inside.sum() < inside.numel()


@pytest.mark.parametrize("part", ["all", "low_rank", "scales"])
def test_training_of_a_part_begins_with_weights_on_their_levels(part: str) -> None:
    model = post_trained()
    lay_within_levels(model, skip_network())
    asked, models = policy(f"training.trainable={part}"), Models(model)
    given: Any = to_train(asked, models)  # type: ignore[arg-type]
    assert (given is model) == (part == "all")
    plan = [replace(layer.plan, ladder=(8, 4)) for layer in quantized_layers(given).values()]
    found = within_levels(asked, plan, given)
    # an update of low rank, for one, would be added twice
    assert found.keys() == (quantized_layers(given).keys() if part == "all" else set())
    for name, within in found.items():
        assert bool(within.abs().max() > 0), name
    for name, layer in quantized_layers(given).items():
        on_levels = torch.equal(layer.weight, quantized_weight(layer))
        assert on_levels == (part != "all"), name
        assert torch.equal(quantized_weight(layer), quantized_weight(quantized_layers(model)[name]))


def test_layers_without_a_way_down_and_weights_that_are_rounded_each_by_itself_are_left_as_they_are() -> None:
    model = post_trained()
    lay_within_levels(model, skip_network())
    plan = [layer.plan for layer in quantized_layers(model).values()]
    assert {len(layer.ladder) for layer in plan} == {1}
    assert within_levels(policy(), plan, model) == {}
    assert within_levels(policy("post_training.rounding=nearest"), plan, model) == {}
    apart = policy("post_training.rounding=nearest", "training.trainable=scales")
    assert to_train(apart, Models(model)) is model  # type: ignore[arg-type]
