"""Equalization of the channels of an input: each is multiplied by a factor before the quantizer, and the weights that
read it are divided by the same, so that the layer computes what it did.

One scale for a whole tensor wastes levels on channels whose values are small. SmoothQuant (Xiao et al. 2022, arXiv
2211.10438) moves a part of that difference into the weights: the factor of a channel is its largest magnitude to the
power of -1/2. Here factors are powers of two, so that multiplying by them is exact, in every precision: nothing but
the quantizers sees a difference, and the deployed integers are PyTorch's.

Not here: what a channel's values were (ranges.py), and where a layer keeps its factors (brevitas_layers.py).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

LARGEST = 8
"""Largest magnitude of a factor's exponent."""


def channel_factors(largest: Tensor) -> Tensor:
    """(I,), the factor of each channel, from the largest magnitude (I,) of its values.

    That of a channel of median size is 1. A channel of zeros is left as it is.
    """
    seen = largest > 0
    exponents = torch.zeros_like(largest)
    logarithms = largest[seen].log2()
    exponents[seen] = ((logarithms.median() - logarithms) / 2).round().clamp(-LARGEST, LARGEST)
    return exponents.exp2()


def channel_of(layer: nn.Module) -> int:
    """The dimension of the layer's input that holds its channels."""
    return 1 if isinstance(layer, nn.Conv2d) else -1


def over_inputs(factors: Tensor, layer: nn.Conv2d | nn.Linear) -> Tensor:
    """The factors (I,) in a shape that multiplies the layer's input: (I, 1, 1) for a convolution."""
    return factors[:, None, None] if isinstance(layer, nn.Conv2d) else factors


def over_weights(factors: Tensor, layer: nn.Conv2d | nn.Linear) -> Tensor:
    """The factors (I,) in a shape that divides the layer's weights (O, I / groups, ...)."""
    factors = factors.flatten()
    if isinstance(layer, nn.Conv2d):
        of_group = factors.reshape(layer.groups, 1, -1).expand(-1, layer.out_channels // layer.groups, -1)
        return of_group.reshape(layer.out_channels, -1, 1, 1)
    return factors[None]
