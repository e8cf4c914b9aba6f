"""Brevitas's GPTQ for one layer: its weights are rounded so that its outputs change little, not each by itself.

The method (Frantar et al. 2022, arXiv 2210.17323). A layer multiplies its weights W with columns x of its input. The
squared error of its outputs is tr((W - Q) H (W - Q)^T), where H is the mean of x x^T. Columns of W are rounded one
after another, those of large inputs first. What the rounding of one changes is made up for, in the least squared error,
by the columns that are still to be rounded.

Brevitas's own loop over a model (gptq_mode) is not used: it runs the model once for each layer, holds the matrices H of
all layers at once, and reads every pixel.

Not here: the layers of a whole model (gptq_rounding.py), and ranges (ranges.py), which stay as they are.
"""
# Brevitas ships no types, so mypy treats its classes as Any:
# mypy: disable-error-code="misc"

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from pqcad_qat.quantization.brevitas_layers import QuantizedConv2d
from pqcad_qat.quantization.layer_state import QuantizedLayer, quantized_weight

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # on parts of Brevitas that are not used here
    from brevitas.graph.gptq import GPTQ
    from brevitas.graph.gpxq import LayerHandler

BLOCK = 64
"""Number of columns after which errors are passed on to all columns beyond, instead of after each one."""


class LayerRounding(GPTQ):
    """GPTQ for one quantized layer whose range is learned: one that is computed from the weights would change with
    them.

    A convolution has a column x for each pixel of its output. They are drawn at random, since neighbours say the same.
    """

    def __init__(self, layer: QuantizedLayer, columns: int, seed: int) -> None:
        """Begin without any column.

        Args:
            layer: the layer.
            columns: largest number of columns drawn from one state.
            seed: seed of their choice.
        """
        assert layer.weight_quant.tensor_quant.learned, "the range is computed from the weights"
        super().__init__(
            layer,
            layer.plan.name,
            act_order=True,
            len_parallel_layers=1,
            create_weight_orig=False,
            num_blocks=-(-layer.weight[0].numel() // BLOCK),
            device="same",
        )
        self.drawn_of_state = columns
        self._random = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def watch(self, x: Tensor) -> None:
        """Add columns of an input (B, I, H, W) or (B, ..., I), as the layer gets it, before it is quantized."""
        self.compute_iterative_covariance(self.layer, (x.detach(),), LayerHandler())

    @torch.no_grad()
    def round(self) -> None:
        """Write the weights that GPTQ finds into the layer: they lie on its grid."""
        self.single_layer_update()
        # Brevitas leaves them there but for their last bits.
        self.layer.weight.copy_(quantized_weight(self.layer))

    def process_input(self, inp: tuple[Tensor]) -> Tensor:
        """(G, K, number of columns) of a quantized input; G is the number of groups, K that of weights of an output."""
        x, layer = self.layer.input_quant(inp[0]).float(), self.layer
        if isinstance(layer, QuantizedConv2d):
            return convolved_columns(layer, x, lambda places: self._drawn(len(x), places).to(x.device))
        rows = x.reshape(-1, 1, x.shape[-1]) if x.dim() < 3 else x.reshape(len(x), -1, x.shape[-1])
        drawn = self._drawn(len(rows), rows.shape[1]).to(x.device)
        states = torch.arange(len(rows), device=x.device)[:, None]
        columns: Tensor = rows[states, drawn].reshape(1, -1, x.shape[-1]).mT
        return columns

    def _drawn(self, states: int, places: int) -> Tensor:
        """(states, number drawn), different places of each state."""
        number = min(self.drawn_of_state, places)
        return torch.stack([torch.randperm(places, generator=self._random)[:number] for _ in range(states)])


def convolved_columns(layer: nn.Conv2d, x: Tensor, drawn: Callable[[int], Tensor]) -> Tensor:
    """(G, K, B * N), what a convolution multiplies its weights with at N pixels of its output for each state.

    Args:
        layer: the convolution, with G groups.
        x: its input (B, I, H, W).
        drawn: function from the number of the output's pixels to (B, N), those that are taken.
    """
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    sizes = zip(x.shape[2:], layer.kernel_size, layer.dilation, layer.stride, strict=True)
    height, width = ((size - dilation * (kernel - 1) - 1) // stride + 1 for size, kernel, dilation, stride in sizes)
    pixels = drawn(height * width)
    corners = pixels // width * layer.stride[0], pixels % width * layer.stride[1]
    within = (torch.arange(k, device=x.device) * d for k, d in zip(layer.kernel_size, layer.dilation, strict=True))
    rows, columns = (corner[..., None] + offsets for corner, offsets in zip(corners, within, strict=True))
    states = torch.arange(len(x), device=x.device)[:, None, None, None]
    patches = x.permute(0, 2, 3, 1)[states, rows[..., :, None], columns[..., None, :]]  # (B, N, kh, kw, I)
    return patches.permute(4, 2, 3, 0, 1).reshape(layer.groups, -1, pixels.numel())
