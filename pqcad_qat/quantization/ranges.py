"""The choice of a quantizer's range from data: by extremes or by least squared error, for weights and for inputs.

The search for the least squared error tries shares of the full range and keeps the best. For weights it quantizes the
values themselves, row by row. For inputs it quantizes the centres of a histogram's bins, weighted by their counts.
Both ways of choosing a range are described by Nagel et al. 2021 (arXiv 2106.08295).

Not here: quantized layers and their state (layer_state.py). These functions take numbers and return numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pqcad_qat.errors import ModelError
from pqcad_qat.quantization.equalization import channel_factors

BINS = 8192
"""Number of bins in an input's histogram."""
CACHED = 2**16
"""Number of a weight's elements that the search handles at a time on the CPU.

So few fit into the cache of a core, which makes the search many times faster.
"""
AT_ONCE = 2**26
"""The same number on an accelerator, which would wait at each step of the search.

Only the largest layers have more elements.
"""
RATIOS = tuple(i / 50 for i in range(50, 4, -1))
"""Shares of the full range that the search for the least squared error tries, widest first."""


class InputRange:
    """Observations of one layer's input during calibration: its extremes, and a histogram between them.

    Attributes:
        channel: dimension of the input whose channels are observed each for itself; None for none.
        factors: (C,), what `equalize` has found for them; from then on all is observed in these units.
    """

    def __init__(self, name: str, channel: int | None = None) -> None:
        self.name, self.channel = name, channel
        self.factors: Tensor | None = None
        self.lows, self.highs = torch.tensor(float("inf")), torch.tensor(float("-inf"))
        self.low = float("inf")
        self.high = float("-inf")
        self.counts = torch.zeros(BINS, dtype=torch.float64)

    def watch_extremes(self, x: Tensor) -> None:
        """Extend the extremes by those of x.

        Raises:
            ModelError: x holds NaN or infinity.
        """
        x = x.detach().float()
        low, high = (value.item() for value in torch.aminmax(x))
        if not (abs(low) < float("inf") and abs(high) < float("inf")):
            raise ModelError(
                f"calibration: input of layer {self.name}: got NaN or infinite values; allowed finite ones, which "
                "its range is set from"
            )
        self.low, self.high = min(self.low, low), max(self.high, high)
        if self.channel is not None:
            lows, highs = (value.cpu() for value in torch.aminmax(x.movedim(self.channel, 0).flatten(1), dim=1))
            self.lows, self.highs = torch.minimum(self.lows, lows), torch.maximum(self.highs, highs)

    def equalize(self) -> None:
        """Find factors for the channels, and go on in their units."""
        self.factors = channel_factors(torch.maximum(self.lows.abs(), self.highs.abs()))
        self.low, self.high = float((self.lows * self.factors).min()), float((self.highs * self.factors).max())

    def watch_histogram(self, x: Tensor) -> None:
        """Add x to the histogram, whose ends are the extremes found before."""
        x = x.detach().float()
        if self.factors is not None and self.channel is not None:
            x = (x.movedim(self.channel, -1) * self.factors.to(x.device)).movedim(-1, self.channel)
        self.counts += torch.histc(x, bins=BINS, min=self.low, max=self.high).to("cpu", torch.float64)

    def check(self) -> None:
        """Refuse an input that was never seen or is zero everywhere.

        Raises:
            ModelError: names the layer and the reason.
        """
        if self.low > self.high:
            raise ModelError(
                f"calibration: input of layer {self.name}: got no values, since the layer was never called; allowed "
                "layers that the model calls"
            )
        if self.low == 0.0 == self.high:
            raise ModelError(
                f"calibration: input of layer {self.name}: got zeros everywhere; allowed other values as well, which "
                "its range is set from"
            )

    @property
    def width(self) -> float:
        """Width of a bin, in units of the input."""
        return (self.high - self.low) / BINS

    def centres(self) -> Tensor:
        """(BINS,), the centre of each bin."""
        return self.low + (torch.arange(BINS, dtype=torch.float64) + 0.5) * self.width


def input_bounds(seen: InputRange, method: str, bits: int, signed: bool, *, symmetric: bool) -> tuple[float, float]:
    """The range (low, high) that an input's quantizer should represent, low <= 0 <= high."""
    low, high = min(seen.low, 0.0), max(seen.high, 0.0)
    if method == "mse":
        ratio = _best_input_ratio(seen, low, high, bits, signed=signed, symmetric=symmetric)
        low, high = low * ratio, high * ratio
    return low, high


def input_grid(low: float, high: float, bits: int, signed: bool, *, symmetric: bool) -> tuple[float, int, int, int]:
    """(scale, zero point, smallest and largest integer) of an input whose values lie in [low, high]."""
    if not symmetric:
        top = 2**bits - 1
        scale = (high - low) / top
        return scale, min(max(round(-low / scale), 0), top) if scale else 0, 0, top
    if signed:
        half = 2 ** (bits - 1)
        return max(-low / half, high / (half - 1)), 0, -half, half - 1
    return high / (2**bits - 1), 0, 0, 2**bits - 1


def _best_input_ratio(seen: InputRange, low: float, high: float, bits: int, *, signed: bool, symmetric: bool) -> float:
    """The share of [low, high] whose grid has the least squared error over the histogram."""
    centres, counts = seen.centres(), seen.counts
    best, least = 1.0, float("inf")
    for ratio in RATIOS:
        scale, zero_point, smallest, largest = input_grid(low * ratio, high * ratio, bits, signed, symmetric=symmetric)
        on_grid = ((centres / scale).round() + zero_point).clamp(smallest, largest).sub(zero_point).mul(scale)
        error = float(((on_grid - centres).square() * counts).sum())
        if error < least:
            best, least = ratio, error
    return best


def weight_rows(weight: Tensor, per_channel: bool) -> Tensor:
    """The weight as rows that share a scale: (O, I * kh * kw) per channel, or one row."""
    return weight.detach().reshape(weight.shape[0] if per_channel else 1, -1)


def weight_span(rows: Tensor, symmetric: bool) -> Tensor:
    """(rows,), the full range of each row.

    If symmetric it is the largest magnitude, otherwise the distance between the extremes, both taken to include zero.
    """
    span: Tensor = (
        rows.abs().amax(dim=1) if symmetric else rows.amax(dim=1).clamp(min=0) - rows.amin(dim=1).clamp(max=0)
    )
    return span


def weight_ratio(rows: Tensor, bits: int, symmetric: bool, method: str) -> Tensor:
    """(rows,), the share of each row's full range that its grid should cover.

    It is 1 for `min_max`, and the share of least squared error for `mse`.
    """
    if method != "mse":
        return torch.ones_like(rows[:, 0])
    # Each row's search is independent, so rows are searched in groups that fit into memory well.
    groups = torch.split(rows, max(1, (CACHED if rows.is_cpu else AT_ONCE) // rows.shape[1]))
    return torch.cat([_best_weight_ratio(group, bits, symmetric) for group in groups])


def _best_weight_ratio(rows: Tensor, bits: int, symmetric: bool) -> Tensor:
    """(rows,), the share of each row's full range whose grid has the least squared error."""
    span = weight_span(rows, symmetric).clamp(min=1e-10)
    best = torch.ones_like(span)
    least = torch.full_like(span, float("inf"))
    for ratio in RATIOS:
        error = (_on_grid(rows, span * ratio, ratio, bits, symmetric=symmetric) - rows).square().sum(dim=1)
        better = error < least
        best, least = torch.where(better, ratio, best), torch.where(better, error, least)
    return best


def _on_grid(rows: Tensor, span: Tensor, ratio: float, bits: int, *, symmetric: bool) -> Tensor:
    """The rows quantized over this span and dequantized.

    The lower end of an asymmetric range is multiplied by `ratio`, as the span was.
    """
    if symmetric:
        top = 2 ** (bits - 1) - 1
        scale = (span / top)[:, None]
        symmetric_grid: Tensor = (rows / scale).round().clamp(-top, top) * scale
        return symmetric_grid
    top = 2**bits - 1
    scale = (span / top)[:, None]
    zero_point = (-rows.amin(dim=1, keepdim=True).clamp(max=0) * ratio / scale).round().clamp(0, top)
    grid: Tensor = ((rows / scale + zero_point).round().clamp(0, top) - zero_point) * scale
    return grid
