"""Where a quantizer's range comes from: extremes or least squared error, of weights and of watched inputs.

No modules and no Brevitas here: numbers in, numbers out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pqcad_qat.errors import ModelError

BINS = 8192
CACHED = 2**16
"""Elements of a weight that the search for its range takes at a time: few enough for a core's cache, which makes it
many times faster.
"""
AT_ONCE = 2**26
"""The same on an accelerator, which each step of the search keeps waiting: of any layer but the largest, all."""
# shares of the full range that the least-squares search tries, widest first
RATIOS = tuple(i / 50 for i in range(50, 4, -1))


class InputRange:
    """What calibration has seen of one layer's input: its extremes, and on a second pass a histogram between them."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.low = float("inf")
        self.high = float("-inf")
        self.counts = torch.zeros(BINS, dtype=torch.float64)

    def watch_extremes(self, x: Tensor) -> None:
        low, high = (value.item() for value in torch.aminmax(x.detach().float()))
        if not (abs(low) < float("inf") and abs(high) < float("inf")):
            raise ModelError(
                f"calibration: the input of layer {self.name} holds NaN or infinite values; its range cannot be set"
            )
        self.low, self.high = min(self.low, low), max(self.high, high)

    def watch_histogram(self, x: Tensor) -> None:
        self.counts += torch.histc(x.detach().float(), bins=BINS, min=self.low, max=self.high).to("cpu", torch.float64)

    def check(self) -> None:
        """Refuse an input that never came or never differed from zero."""
        if self.low > self.high:
            raise ModelError(f"calibration: layer {self.name} was never called, so its input has no range")
        if self.low == 0.0 == self.high:
            raise ModelError(f"calibration: the input of layer {self.name} is zero everywhere, so it has no range")

    @property
    def width(self) -> float:
        return (self.high - self.low) / BINS

    def centres(self) -> Tensor:
        return self.low + (torch.arange(BINS, dtype=torch.float64) + 0.5) * self.width


def input_bounds(seen: InputRange, method: str, bits: int, signed: bool, *, symmetric: bool) -> tuple[float, float]:
    """The range (low, high) that the quantizer of one input should represent, low <= 0 <= high."""
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
    """The weight as rows that share a scale: (O, I * kh * kw), or one row."""
    return weight.detach().reshape(weight.shape[0] if per_channel else 1, -1)


def weight_span(rows: Tensor, symmetric: bool) -> Tensor:
    """The full range of each row: largest magnitude (symmetric), or distance between the extremes and zero
    (asymmetric).
    """
    span: Tensor = (
        rows.abs().amax(dim=1) if symmetric else rows.amax(dim=1).clamp(min=0) - rows.amin(dim=1).clamp(max=0)
    )
    return span


def weight_ratio(rows: Tensor, bits: int, symmetric: bool, method: str) -> Tensor:
    """The share of each row's full range that its grid should cover: 1 for min_max, of least squared error for mse."""
    if method != "mse":
        return torch.ones_like(rows[:, 0])
    parts = torch.split(rows, max(1, (CACHED if rows.is_cpu else AT_ONCE) // rows.shape[1]))
    return torch.cat([_best_weight_ratio(part, bits, symmetric) for part in parts])


def _best_weight_ratio(rows: Tensor, bits: int, symmetric: bool) -> Tensor:
    span = weight_span(rows, symmetric).clamp(min=1e-10)
    best = torch.ones_like(span)
    least = torch.full_like(span, float("inf"))
    for ratio in RATIOS:
        error = (_on_grid(rows, span * ratio, ratio, bits, symmetric=symmetric) - rows).square().sum(dim=1)
        better = error < least
        best, least = torch.where(better, ratio, best), torch.where(better, error, least)
    return best


def _on_grid(rows: Tensor, span: Tensor, ratio: float, bits: int, *, symmetric: bool) -> Tensor:
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
