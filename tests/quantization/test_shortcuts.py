"""Convolutions over concatenated shortcuts: found, split without a change of the function, and merged again."""

from __future__ import annotations

import pytest
import torch
from small_networks import SkipNetwork, example, skip_network
from tiny_runs import tiny_unet
from torch import Tensor, nn

from pqcad_qat.quantization.shortcuts import SplitConv2d, find_shortcuts, merge_shortcuts, split_shortcuts


def test_the_reader_of_a_concatenation_is_found_and_the_one_behind_its_normalisation_is_not() -> None:
    model = skip_network()
    assert find_shortcuts(model, example()) == {model.conv_shortcut: 8}


def test_a_split_network_computes_the_same() -> None:
    model = skip_network()
    before = model(*example())
    split_shortcuts(model, example())
    assert isinstance(model.conv_shortcut, SplitConv2d)
    assert model.conv_shortcut.right.bias is None
    torch.testing.assert_close(model(*example()), before, rtol=1e-5, atol=1e-5)


def test_a_diffusers_unet_is_split_in_every_up_block_and_computes_the_same() -> None:
    torch.manual_seed(0)
    model = tiny_unet().eval()
    inputs = (torch.randn(2, 1, 32, 32), torch.tensor([3, 700]))
    with torch.no_grad():
        before = model(*inputs).sample
        split_shortcuts(model, inputs)
        split = {name for name, module in model.named_modules() if isinstance(module, SplitConv2d)}
        resnets = [f"up_blocks.{i}.resnets.{j}" for i in range(2) for j in range(2)]
        assert split == {f"{resnet}.conv_shortcut" for resnet in resnets}
        torch.testing.assert_close(model(*inputs).sample, before, rtol=1e-5, atol=1e-5)


def test_merging_gives_the_original_weights_back() -> None:
    model, original = skip_network(), skip_network()
    merge_shortcuts(split_shortcuts(model, example()))
    assert model.state_dict().keys() == original.state_dict().keys()
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), original.state_dict().values(), strict=True)
    )
    assert torch.equal(model(*example()), original(*example()))


def test_gradients_reach_both_halves_like_the_whole() -> None:
    whole, model = skip_network(), split_shortcuts(skip_network(), example())
    assert isinstance(model, SkipNetwork)
    for network in (whole, model):
        network(*example()).square().mean().backward()
    halves = torch.cat([model.conv_shortcut.left.weight.grad, model.conv_shortcut.right.weight.grad], dim=1)
    torch.testing.assert_close(halves, whole.conv_shortcut.weight.grad, rtol=1e-4, atol=1e-6)


class Reused(nn.Module):
    """A convolution that reads a concatenation once and something else once."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        y: Tensor = self.conv(self.conv(torch.cat([x, x], dim=1)))
        return y


class Mixed(nn.Module):
    """A concatenation along height, one of three parts, and one whose channels are mixed before the convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(1, 1, 1), nn.Conv2d(3, 1, 1), nn.Conv2d(2, 1, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        y: Tensor = self.a(torch.cat([x, x], dim=2)).sum() + self.b(torch.cat([x, x, x], dim=1)).sum()
        return x * (y + self.c(torch.cat([x, 2 * x], dim=1).flip(1)).sum())


@pytest.mark.parametrize("model", [Reused(), Mixed()])
def test_other_readers_are_left_alone(model: nn.Module) -> None:
    assert find_shortcuts(model, example()) == {}


def test_modules_keep_their_modes() -> None:
    model = skip_network().train()
    model.norm.eval()
    split_shortcuts(model, example())
    assert model.training
    assert model.conv_shortcut.left.training
    assert not model.norm.training
