"""Latents as rows of 2x2 patches with the positions of the patches: the layout in which Flux's pipeline calls its
transformer.

Not here: which family is called so (flux.py). `packed` and `unpacked` take numpy arrays and torch tensors alike.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import numpy.typing as npt

from pqcad_qat.sampling.ddim import Array

PATCH = 2
"""Side of a patch, in latent pixels. The pixels of a patch become channels of a row."""

THOUSANDTHS = 1000
"""Factor by which the class multiplies the times and the guidance that it is called with; its callers divide by it."""

PLACES = ("img_ids", "txt_ids")
"""Names of the position inputs beside the rows: those of patches (H/2 W/2, 3), and those of text (tokens, 3)."""


def rows_shape(channels: int, height: int, width: int) -> tuple[int, int]:
    """Return (number of rows, channels of a row) for latents (C, H, W)."""
    return height // PATCH * (width // PATCH), channels * PATCH**2


def packed(x: Array) -> Array:
    """Pack (B, C, H, W) into (B, H/2 W/2, 4C), one row per patch."""
    batch, channels, height, width = cast(Any, x).shape
    patches = cast(Any, x).reshape(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return cast(Array, _permuted(patches, 0, 2, 4, 1, 3, 5).reshape(batch, *rows_shape(channels, height, width)))


def unpacked(rows: Array, height: int, width: int) -> Array:
    """Unpack (B, H/2 W/2, 4C) into (B, C, H, W), the inverse of `packed`."""
    batch, _, channels = cast(Any, rows).shape
    patches = cast(Any, rows).reshape(batch, height // PATCH, width // PATCH, channels // PATCH**2, PATCH, PATCH)
    return cast(Array, _permuted(patches, 0, 3, 1, 4, 2, 5).reshape(batch, channels // PATCH**2, height, width))


def _permuted(x: Any, *axes: int) -> Any:
    """Reorder the axes of a numpy array (`transpose`) or a torch tensor (`permute`)."""
    return x.permute(axes) if hasattr(x, "permute") else x.transpose(axes)


def places(height: int, width: int) -> npt.NDArray[np.float32]:
    """Return the positions (H/2 W/2, 3) of all patches of latents (H, W): a zero, then row and column."""
    rows, columns = np.meshgrid(np.arange(height // PATCH), np.arange(width // PATCH), indexing="ij")
    return np.stack([np.zeros_like(rows), rows, columns], axis=-1).reshape(-1, 3).astype(np.float32)


def text_places(tokens: int) -> npt.NDArray[np.float32]:
    """Return the positions (tokens, 3) of text tokens: zeros, since text has no place in the image."""
    return np.zeros((tokens, 3), np.float32)
