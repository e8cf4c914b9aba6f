"""The search for the smallest choice of widths that has a quality, with as few measurements as it takes.

Not here: what a measurement is (chosen_widths.py), and the order of the choices (quantization/mixed_precision.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

from pqcad_qat.quantization.plan import LayerPlan

MEASURED = 8
"""Largest number of choices that one search measures."""

FLOAT_SHARE = 0.5
"""Largest share of the planned layers that may stay in floating point: with more there is little to deploy."""

SMALLEST_ERROR = 1e-30
"""Smallest error of a choice that is told from none."""

Plan = tuple[LayerPlan, ...]


def left_float(plan: Plan, errors: Mapping[str, float]) -> Iterator[Plan]:
    """The plan with more and more layers in floating point, those first whose error is the largest.

    Layers that read one tensor share its quantizer, and go together.
    """
    groups: dict[str, float] = {}
    for layer in plan:
        groups[layer.input_group] = groups.get(layer.input_group, 0.0) + errors[layer.name]
    quantized = plan
    for group in sorted(groups, key=groups.__getitem__, reverse=True):
        quantized = tuple(layer for layer in quantized if layer.input_group != group)
        if len(plan) - len(quantized) > FLOAT_SHARE * len(plan):
            return
        yield quantized


def search(measure: Callable[[int], float], errors: Sequence[float], quality: float) -> int | None:
    """The first of several choices, which get better, that has the quality; None if the last has not.

    The bracket of a choice that misses the quality and a later one that has it is narrowed, in turns at the place that
    the errors predict, for PSNR falls by 10 dB where they grow tenfold, and in the middle. After MEASURED measurements
    the best bracket so far is the answer.

    Args:
        measure: function that measures the choice at a place, in dB.
        errors: errors of the choices as they are predicted, in any unit.
        quality: quality in dB.
    """
    low, high = 0, len(errors) - 1
    if (at_low := measure(low)) >= quality:
        return low
    if (at_high := measure(high)) < quality:
        return None
    decibels = [-10 * math.log10(max(error, SMALLEST_ERROR)) for error in errors]
    for turn in range(MEASURED - 2):
        if high - low == 1:
            break
        wanted = decibels[low] + (quality - at_low) / (at_high - at_low) * (decibels[high] - decibels[low])
        predicted = next((place for place in range(low + 1, high) if decibels[place] >= wanted), high - 1)
        place = (low + high) // 2 if turn % 2 else predicted
        psnr = measure(place)
        low, at_low, high, at_high = (low, at_low, place, psnr) if psnr >= quality else (place, psnr, high, at_high)
    return high
