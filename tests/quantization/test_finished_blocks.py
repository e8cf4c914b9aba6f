"""Finished blocks return what they returned before: the same weights are learned, in fewer calls."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conditional_models import class_unet, conditions
from small_networks import example, rule
from torch import Tensor, nn

from pqcad_qat.models.denoiser import DenoiserInput
from pqcad_qat.quantization import learned_rounding
from pqcad_qat.quantization.conversion import calibrate_ranges, quantize_model, quantized_layers
from pqcad_qat.quantization.finished_blocks import FinishedBlocks, small_enough
from pqcad_qat.quantization.gptq_rounding import rounded_layers
from pqcad_qat.quantization.learned_rounding import learn_rounding
from pqcad_qat.quantization.model_blocks import arguments_of, blocks_of
from pqcad_qat.quantization.plan import plan_layers

STATES, BATCHES = 12, 3


class Overwriting(nn.Module):
    """A layer that changes what it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.other = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.other(self.layer(x.mul_(0.5)))
        return y


class Skipping(nn.Module):
    """A denoiser that reads once more what a block has changed, and overwrites what another returns."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.block = nn.Conv2d(1, 4, 3, padding=1), Overwriting()
        self.middle, self.last = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.first(x)
        y: Tensor = self.last(self.middle(self.block(h)).relu_() + h)
        return y


def unet_states(seed: int) -> DenoiserInput:
    dice = torch.Generator().manual_seed(seed)
    x_t = torch.randn(STATES, 1, 16, 16, generator=dice)
    return x_t, torch.randint(0, 1000, (STATES,), generator=dice), conditions("class_unet", STATES, seed)


def quantized(full: nn.Module, states: list[DenoiserInput]) -> nn.Module:
    model = quantize_model(copy.deepcopy(full), plan_layers(full, {"all": rule("*", bits=3)}, (), states[0]))
    calibrate_ranges(model, states)
    return model


def cases(name: str) -> tuple[nn.Module, list[DenoiserInput]]:
    torch.manual_seed(0)
    if name == "unet":
        return class_unet().eval(), [unet_states(seed) for seed in range(BATCHES)]
    return Skipping().eval(), [(*example(STATES, seed), {}) for seed in range(BATCHES)]


@pytest.mark.parametrize("name", ["unet", "overwriting"])
def test_the_same_weights_are_learned_in_fewer_calls(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    full, states = cases(name)
    found: list[list[Tensor]] = []
    computed = [0, 0]
    for turn, keeps in enumerate((True, False)):
        model = quantized(full, states)
        layers = quantized_layers(model)
        first = next(iter(layers.values()))
        compute = type(first).forward

        def counting(*arguments: Any, turn: int = turn, compute: Any = compute) -> Any:
            computed[turn] += 1
            return compute(*arguments)

        if not keeps:
            monkeypatch.setattr(learned_rounding, "small_enough", lambda *_: set())
        with monkeypatch.context() as watching:
            watching.setattr(type(first), "forward", counting)
            learn_rounding(model, full, rounded_layers(model), states, steps=2)
        found.append([layer.weight.detach() for layer in layers.values()])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    assert computed[0] < computed[1]


def test_fewer_states_are_the_first_of_those_that_are_kept() -> None:
    full, states = cases("unet")
    model = quantized(full, states)
    blocks = blocks_of(model, rounded_layers(model), states[0])
    finished = FinishedBlocks(model, STATES * BATCHES)
    for block in blocks[:-1]:
        finished.add(block)
    with finished.returning(states):
        arguments_of(model, blocks[-1], states)
    x_t, t, given = states[1]
    few = [states[0], (x_t[:3], t[:3], {name: value[:3] for name, value in given.items()})]
    with finished.returning(few):
        kept = arguments_of(model, blocks[-1], few)
    wanted = arguments_of(model, blocks[-1], few)
    for one, other in zip(kept.leaves, wanted.leaves, strict=True):
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other
    assert all("forward" not in vars(module) for module in model.modules())


def test_the_blocks_that_return_least_are_kept() -> None:
    full, states = cases("unet")
    model = quantized(full, states)
    blocks = blocks_of(model, rounded_layers(model), states[0])
    sizes = sorted(block.bytes_returned for block in blocks)
    counts = {block.name: 5 for block in blocks}
    most = 5 * (sizes[0] + sizes[1])
    found = small_enough(blocks, counts, most)
    assert sorted(block.bytes_returned for block in blocks if block.name in found) == sizes[:2]
    assert small_enough(blocks, counts, 5 * sum(sizes)) == {block.name for block in blocks}
    assert small_enough((), {}, 1) == set()
