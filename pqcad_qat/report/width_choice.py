"""Widths that were chosen by measurement, as data and in words: what the policy asked for, and what was measured.

Not here: the choice (stages/chosen_widths.py), and the page (page.py).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass


@dataclass(frozen=True)
class WidthTrial:
    """One choice of widths that was measured."""

    size_bytes: int  # expected size of the deployed weights
    mean_bits: float  # mean width of the quantized layers' weights, by parameters
    float_layers: int  # number of planned layers that stay in floating point
    psnr: float  # dB, held-out images to full precision's own, after the short training


@dataclass(frozen=True)
class WidthChoice:
    """The chosen widths, and how they were found."""

    quality: float | None  # dB that the policy asks for; None where it gives a size
    max_bytes: int | None  # size in bytes that it allows; None where it asks for a quality
    training_steps: int  # of the short training before each measurement
    bits: tuple[int, ...]  # width of every quantized layer
    float_layers: tuple[str, ...]  # planned layers that 8 bits cannot serve at that quality
    chosen: WidthTrial
    trials: tuple[WidthTrial, ...]  # all that were measured, in their order


def choice_text(choice: WidthChoice) -> str:
    """What was asked for, and what was chosen: the widths, the size, and the quality that was measured."""
    asked = (
        f"quantization.quality {choice.quality:g} dB"
        if choice.quality is not None
        else f"quantization.max_size {(choice.max_bytes or 0) / 1e6:.2f} MB"
    )
    counts = sorted(Counter(choice.bits).items(), reverse=True)
    widths = ", ".join(f"{count} layers at {bits} bits" for bits, count in counts)
    trained = f"after {choice.training_steps} training steps" if choice.training_steps else "without training"
    text = (
        f"Widths for {asked}: {widths}; weights of {choice.chosen.size_bytes / 1e6:.2f} MB, held-out images at "
        f"{choice.chosen.psnr:.1f} dB to full precision {trained}."
    )
    if not choice.float_layers:
        return text
    return f"{text} Left in floating point, since INT8 is not enough there: {', '.join(choice.float_layers)}."
