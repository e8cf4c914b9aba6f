"""The distance between patches: what it sees that a paired figure does not, and what it does not see.

Not here: distances between features (test_fidelity.py), and the choice that rests on it (tests/training/).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from pqcad_qat.quality.fidelity import nearness_to
from pqcad_qat.quality.patch_distance import patch_distance


def pictures(seed: int, count: int = 16, size: int = 32, channels: int = 3) -> Tensor:
    """Coloured shapes with edges and a little texture, in [-1, 1]."""
    dice = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, channels, 6, 6, generator=dice)
    shapes = functional.interpolate(coarse, size=(size, size), mode="bicubic").mul(3).tanh()
    texture = 0.2 * torch.randn(count, channels, size, size, generator=dice)
    return (shapes + texture).clamp(-1, 1)


def test_equal_sets_are_at_zero_in_whatever_order() -> None:
    ours = pictures(0)
    assert patch_distance(ours, ours) == 0.0
    assert patch_distance(ours.flip(0), ours) == pytest.approx(0.0, abs=1e-6)


def test_it_is_the_same_at_every_call_and_leaves_the_random_state_alone() -> None:
    dice = torch.get_rng_state()
    assert patch_distance(pictures(0), pictures(1)) == patch_distance(pictures(0), pictures(1)) > 0
    assert torch.equal(torch.get_rng_state(), dice)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda x: 0.7 * x,
        lambda x: x.mean(dim=1, keepdim=True).expand_as(x),
        lambda x: functional.avg_pool2d(x, 3, stride=1, padding=1),
        lambda x: (x + 0.4).clamp(-1, 1),
    ],
    ids=["contrast", "colour", "blur", "brightness"],
)
def test_what_all_images_have_lost_outweighs_that_they_are_other_images(spoil: Callable[[Tensor], Tensor]) -> None:
    """Spoiled images are nearer one by one than other images, and further away as a set."""
    ours, others = pictures(0, count=64), pictures(1, count=64)
    spoiled = spoil(ours)
    assert nearness_to(ours, spoiled, latent=False) > nearness_to(ours, others, latent=False)
    assert patch_distance(spoiled, ours) > 1.5 * patch_distance(others, ours)


@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 14, 40), (4, 17, 9), (1, 7, 7)])
def test_it_takes_any_size(shape: tuple[int, int, int]) -> None:
    ours = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0))
    assert patch_distance(ours, ours) == 0.0
    assert patch_distance(0.5 * ours, ours) > 0.1


def test_a_constant_reference_divides_by_no_zero() -> None:
    flat = torch.zeros(2, 1, 16, 16)
    assert patch_distance(flat, flat) == 0.0
