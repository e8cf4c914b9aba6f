"""What of a quantized model is trained: updates of low rank, ranges alone, and what is left when a training ends.

Not here: the training loop (training/test_trainer.py).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from small_networks import example, rule, skip_network
from torch import Tensor, nn

from pqcad_qat.errors import PolicyError
from pqcad_qat.quantization.conversion import calibrate_ranges, frozen_weights, quantize_model, quantized_layers
from pqcad_qat.quantization.layer_state import QuantizedLayer, quantized_weight, set_weight_bits
from pqcad_qat.quantization.plan import plan_layers
from pqcad_qat.quantization.trained_part import (
    RANGES,
    TrainedPart,
    begin_training,
    changing_state,
    end_training,
    load_changing,
)
from pqcad_qat.training.callback import Batch, Callback, TrainState
from pqcad_qat.training.checkpoint import CheckpointFolder, checkpoints, load_checkpoint
from pqcad_qat.training.trainer import LoopSettings, fit, new_state

RANK = 2
LOW_RANK = TrainedPart("low_rank", RANK, seed=3)
SETTINGS = LoopSettings(steps=12, learning_rate=0.01, ema=0.9, part=LOW_RANK)


def network(scale: str = "learned") -> nn.Module:
    """The small network with shortcuts, all of it quantized but its output convolution."""
    model = skip_network()
    everything_else = rule("conv_in", "down", "conv1", "conv_shortcut", "to_?", scale=scale, inputs={"scale": scale})
    quantize_model(model, plan_layers(model, {"all": everything_else}, (4,), example()))
    calibrate_ranges(model, [example()])
    return model


class Regression(Callback):
    name = "regression"

    def loss_terms(self, state: TrainState, batch: Batch) -> Mapping[str, Tensor]:
        return {"loss": (state.network(batch["x"]) - batch["y"]).square().mean()}


def batches(step: int) -> Batch:
    x, _ = example(batch=8, seed=step)
    return {"x": x, "y": x.roll(1, dims=2)}


def trained(model: nn.Module, settings: LoopSettings = SETTINGS, folder: CheckpointFolder | None = None) -> TrainState:
    accelerator = Accelerator(cpu=True)
    state = new_state(model, settings, accelerator)
    fit(state, [Regression()], batches, settings, accelerator=accelerator, checkpoints=folder)
    return state


def first_layer(model: nn.Module) -> QuantizedLayer:
    return quantized_layers(model)["conv1"]


def test_a_training_of_low_rank_begins_as_the_model_is_and_moves_weights_within_that_rank() -> None:
    model = network()
    x, before = batches(0)["x"], {name: layer.weight.clone() for name, layer in quantized_layers(model).items()}
    with torch.no_grad():
        given = model(x)
        begun = copy.deepcopy(model)
        begin_training(begun, LOW_RANK)
        assert torch.equal(begun(x), given)
    state = trained(model)
    with torch.no_grad():
        computed = model(x)
        assert not torch.allclose(computed, given)
        assert all(torch.equal(layer.weight, before[name]) for name, layer in quantized_layers(model).items())
        end_training(model, state.frozen)
        assert torch.equal(model(x), computed)
    for name, layer in quantized_layers(model).items():
        moved = (layer.weight - before[name]).detach().flatten(1)
        assert torch.linalg.matrix_rank(moved, rtol=1e-4) == RANK
    assert model.state_dict().keys() == network().state_dict().keys()
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_first_step_moves_weights_as_far_as_if_they_were_trained_themselves() -> None:
    """One step of Adam at a constant rate: on average each weight moves by about the rate."""
    one = LoopSettings(steps=1, learning_rate=0.001, shape="constant", part=TrainedPart("low_rank", rank=32))
    model = network()
    before = first_layer(model).weight.detach().clone()
    state = trained(model, one)
    end_training(model, state.frozen)
    moved = (first_layer(model).weight.detach() - before).square().mean().sqrt()
    assert 0.5e-3 < float(moved) < 2e-3


def test_what_an_optimizer_and_an_average_hold_is_what_is_trained() -> None:
    state = trained(network())
    assert state.ema is not None
    assert state.ema.keys() == state.parameters.keys()
    assert {
        "conv1.update.a",
        "conv1.update.b",
        "conv1.bias",
        "conv_out.weight",
        "norm.weight",
    } < state.parameters.keys()
    assert state.frozen == {f"{name}.weight" for name in quantized_layers(state.model)}
    held = {value.shape for entry in state.optimizer.state.values() for value in entry.values() if value.ndim}
    assert first_layer(state.model).weight.shape not in held


def test_ranges_alone_are_trained_where_that_is_asked_for() -> None:
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = trained(model, LoopSettings(steps=3, learning_rate=0.01, part=TrainedPart("scales")))
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert changed == state.parameters.keys()
    assert all(any(kind in name for kind in RANGES) for name in changed)
    end_training(model, state.frozen)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_ranges_that_are_not_learned_cannot_be_all_that_is_trained() -> None:
    with pytest.raises(PolicyError, match=r"trainable: got scales, and no layer has a learned range; allowed"):
        begin_training(network("statistics"), TrainedPart("scales"))


def test_a_parameter_that_was_frozen_before_stays_so() -> None:
    model = network()
    model.get_parameter("conv_out.bias").requires_grad_(False)
    frozen = begin_training(model, LOW_RANK)
    assert "conv_out.bias" not in frozen
    end_training(model, frozen)
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == ["conv_out.bias"]


def test_a_training_of_low_rank_that_was_cut_off_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    whole = trained(network())
    folder = CheckpointFolder(tmp_path, every=5)
    trained(network(), SETTINGS, folder)
    accelerator = Accelerator(cpu=True)
    resumed = new_state(network(), SETTINGS, accelerator)
    load_checkpoint(checkpoints(tmp_path)[0], resumed, [Regression()])
    assert resumed.step == 5
    fit(resumed, [Regression()], batches, SETTINGS, accelerator=accelerator)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_weights_are_taken_back_to_what_they_were_on_the_way_and_at_the_start() -> None:
    model, x = network(), batches(7)["x"]
    start = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        given = model(x)
    state = trained(model)
    kept = changing_state(model, state.frozen)
    assert not state.frozen & kept.keys()
    with torch.no_grad(), frozen_weights(model):
        later = model(x)
    with torch.no_grad():
        load_changing(model, start, state.frozen)
        assert torch.equal(model(x), given)
        load_changing(model, kept, state.frozen)
        assert torch.equal(model(x), later)
    with pytest.raises(RuntimeError, match="got a state without"):
        load_changing(model, {}, state.frozen)


def test_widths_and_ranges_are_those_of_the_weights_with_their_updates() -> None:
    model = network()
    state = trained(model)
    merged = copy.deepcopy(model)
    end_training(merged, state.frozen)
    for one, other in zip(quantized_layers(model).values(), quantized_layers(merged).values(), strict=True):
        for layer in (one, other):
            set_weight_bits(layer, 3)
        assert torch.equal(quantized_weight(one), quantized_weight(other))
