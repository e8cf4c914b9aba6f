"""The record of a part's parity: how closely one deployed pipeline part agrees with full precision.

This file does not import torch, so that a report can be read without it.

Not here: how the agreement is measured (part_psnr.py).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PartParity:
    """Agreement of one pipeline part of the deployed folder with full precision.

    Attributes:
        part: name of its folder: vae_decoder, text_encoder, ...
        format: format of the part: "float", "int8-weights" or "int8".
        size_bytes: size of its files in bytes.
        psnr: PSNR in dB against full precision. For a VAE's decoder it is that of pictures decoded from the calibration
            set's latents, for its encoder that of these pictures' latents, for a text encoder that of the last hidden
            state on random tokens.
    """

    part: str
    format: str
    size_bytes: int
    psnr: float | None
