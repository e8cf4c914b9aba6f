"""The blocks of models of every family, what they read and return, and that a call of one repeats it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conditional_models import MODELS, Plain, conditions
from small_networks import EVERYTHING, rule
from tiny_runs import tiny_unet
from torch import Tensor, nn

from pqcad_qat.models.denoiser import DenoiserInput, predict
from pqcad_qat.quantization.conversion import calibrate_ranges, frozen_weights, quantize_model, quantized_layers
from pqcad_qat.quantization.model_blocks import MOST, arguments_of, blocks_of, results_of
from pqcad_qat.quantization.plan import evaluating, plan_layers

SHAPES = {"class_unet": (1, 16, 16)}


def batch(name: str, states: int, seed: int = 0) -> DenoiserInput:
    dice = torch.Generator().manual_seed(seed)
    x_t = torch.randn(states, *SHAPES.get(name, (4, 8, 8)), generator=dice)
    return x_t, torch.randint(0, 1000, (states,), generator=dice), conditions(name, states, seed)


def planned(model: nn.Module, data: DenoiserInput) -> nn.Module:
    quantize_model(model, plan_layers(model, {"all": EVERYTHING}, (), data))
    calibrate_ranges(model, [data])
    return model.eval()


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_is_in_one_block_and_a_block_returns_what_it_returned_in_the_model(name: str) -> None:
    """The batches have as many states as text has tokens, or latents channels: their first size tells nothing."""
    torch.manual_seed(0)
    batches = [batch(name, states, seed) for seed, states in enumerate((5, 4))]
    model = planned(MODELS[name](), batches[0])
    layers = quantized_layers(model)
    blocks = blocks_of(model, layers, batches[0])
    assert sorted(path for block in blocks for path in block.layers) == sorted(layers)
    assert all(len(block.layers) <= MOST for block in blocks)
    assert len(blocks) < len(layers)
    results = results_of(model, blocks, batches)
    rows = torch.tensor([8, 0, 3])
    for block in blocks:
        arguments = arguments_of(model, block, batches)
        with evaluating(model), frozen_weights(model):
            again = arguments.call(model.get_submodule(block.name), rows)
        assert len(again) == len(results[block.name])
        for own, in_model in zip(again, results[block.name], strict=True):
            torch.testing.assert_close(own, in_model[rows], rtol=1e-4, atol=1e-5)
        assert block.bytes_returned == sum(value[0].nbytes for value in results[block.name])


def test_blocks_come_in_the_order_of_their_calls_and_a_call_ends_with_the_last_of_them() -> None:
    model = planned(tiny_unet(), (torch.randn(2, 1, 32, 32), torch.tensor([3, 900]), {}))
    blocks = blocks_of(model, quantized_layers(model), (torch.randn(2, 1, 32, 32), torch.tensor([3, 900]), {}))
    names = [block.name for block in blocks]
    assert (names[0], names[-1]) == ("time_embedding", "conv_out")
    assert names.index("down_blocks.1") < names.index("mid_block") < names.index("up_blocks.0")
    called: list[object] = []
    with model.get_submodule("conv_out").register_forward_pre_hook(lambda *_: called.append(1)):
        results_of(model, blocks[:2], [(torch.randn(2, 1, 32, 32), torch.tensor([3, 900]), {})])
    assert called == []


class Twice(nn.Module):
    """A denoiser that calls one module twice, and another that returns no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.ReLU(), nn.Conv2d(1, 1, 3, padding=1))
        self.named = Named()
        self.idle = nn.Conv2d(1, 1, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.named(self.twice(self.twice(x))).value


class Result:
    """What no library knows how to look into."""

    def __init__(self, value: Tensor) -> None:
        self.value = value


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 2, 1), nn.Conv2d(2, 1, 1)

    def forward(self, x: Tensor) -> Any:
        return Result(self.two(self.one(x)))


def test_a_module_that_fits_no_block_gives_its_parts_and_a_layer_that_is_never_called_none() -> None:
    data = (torch.randn(2, 1, 8, 8), torch.tensor([3, 900]), {})
    model = Twice()
    rules = {"idle": rule("idle").model_copy(update={"keep_float": True}), "rest": EVERYTHING}
    quantize_model(model, plan_layers(model, rules, (), data))
    calibrate_ranges(model, [data])
    found = blocks_of(model.eval(), quantized_layers(model), data)
    assert [block.name for block in found] == ["twice.0", "twice.2", "named.one", "named.two"]
    results = results_of(model, found, [data, data])
    rows = torch.tensor([0, 3])
    for block in found:  # the first of two calls
        with evaluating(model), frozen_weights(model):
            (again,) = arguments_of(model, block, [data, data]).call(model.get_submodule(block.name), rows)
        torch.testing.assert_close(again, results[block.name][0][rows])


def test_a_condition_of_a_users_own_module_has_a_row_for_each_state() -> None:
    x_t = torch.randn(3, 1, 8, 8)
    data = (x_t, torch.tensor([1, 2, 3]), {"tone": torch.randn(3, 2)})
    model = planned(Plain(), data)
    blocks = blocks_of(model, quantized_layers(model), data)
    assert {block.name: block.of_states for block in blocks}["tone"] == (True,)
    with torch.no_grad():
        assert predict(model, *data).shape == x_t.shape


class Merged(nn.Module):
    """A denoiser one part of which reads rows that are pixels, and another an object with a tensor of states."""

    def __init__(self) -> None:
        super().__init__()
        self.pixels, self.held, self.last = nn.Linear(1, 1), Held(), nn.Conv2d(1, 1, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        y = self.pixels(x.reshape(-1, 1)).reshape(x.shape)
        out: Tensor = self.last(self.held(Result(y)))
        return out


class Held(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 1)

    def forward(self, x: Result) -> Tensor:
        y: Tensor = self.conv(x.value)
        return y


def test_what_cannot_be_called_with_the_rows_of_some_states_is_no_block() -> None:
    data = (torch.randn(2, 1, 8, 8), torch.tensor([3, 900]), {})
    model = planned(Merged(), data)
    assert [block.name for block in blocks_of(model, quantized_layers(model), data)] == ["held.conv", "last"]
