"""Latents as rows of 2x2 patches, and the places of the patches: the layout in which Flux's pipeline calls its
transformer.

Not here: which family is called so (flux.py). The functions that pack and unpack take numpy arrays and torch tensors
alike.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import numpy.typing as npt

from pqcad_qat.sampling.ddim import Array

PATCH = 2
"""The side of a patch in latents; its pixels are channels of a row."""

THOUSANDTHS = 1000
"""Times and guidance are given in thousandths: the class multiplies what it is given by this."""

PLACES = ("img_ids", "txt_ids")
"""What the class takes beside rows: the places of patches (H/2 W/2, 3), and those of text (tokens, 3)."""


def rows_shape(channels: int, height: int, width: int) -> tuple[int, int]:
    """(rows, channels of a row) of latents (C, H, W)."""
    return height // PATCH * (width // PATCH), channels * PATCH**2


def packed(x: Array) -> Array:
    """(B, C, H, W) -> (B, H/2 W/2, 4C): a row for each patch."""
    batch, channels, height, width = cast(Any, x).shape
    patches = cast(Any, x).reshape(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return cast(Array, _permuted(patches, 0, 2, 4, 1, 3, 5).reshape(batch, *rows_shape(channels, height, width)))


def unpacked(rows: Array, height: int, width: int) -> Array:
    """(B, H/2 W/2, 4C) -> (B, C, H, W): the inverse of `packed`."""
    batch, _, channels = cast(Any, rows).shape
    patches = cast(Any, rows).reshape(batch, height // PATCH, width // PATCH, channels // PATCH**2, PATCH, PATCH)
    return cast(Array, _permuted(patches, 0, 3, 1, 4, 2, 5).reshape(batch, channels // PATCH**2, height, width))


def _permuted(x: Any, *axes: int) -> Any:
    """numpy's `transpose` is torch's `permute`."""
    return x.permute(axes) if hasattr(x, "permute") else x.transpose(axes)


def places(height: int, width: int) -> npt.NDArray[np.float32]:
    """(H/2 W/2, 3): row and column of every patch of latents (H, W), behind a zero."""
    rows, columns = np.meshgrid(np.arange(height // PATCH), np.arange(width // PATCH), indexing="ij")
    return np.stack([np.zeros_like(rows), rows, columns], axis=-1).reshape(-1, 3).astype(np.float32)


def text_places(tokens: int) -> npt.NDArray[np.float32]:
    """(tokens, 3): zeros, since text has no place."""
    return np.zeros((tokens, 3), np.float32)
