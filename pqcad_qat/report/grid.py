"""A plain grid of images as a PNG, for inspecting samples.

Not here: the labelled sheet of a report (sample_sheets.py).
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

SMALLEST_SIDE = 96
"""Side in pixels up to which small images are enlarged, by a whole factor and without smoothing, so that they can be
judged.
"""


def save_grid(images: npt.ArrayLike, path: Path) -> None:
    """Write uint8 images (N, C, H, W), C 1 or 3, row by row in a nearly square grid, separated by one white pixel."""
    pictures = np.asarray(images)
    count, channels, height, width = pictures.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    sheet = np.full((rows * (height + 1) - 1, columns * (width + 1) - 1, channels), 255, np.uint8)
    for index, image in enumerate(pictures.transpose(0, 2, 3, 1)):
        top, left = index // columns * (height + 1), index % columns * (width + 1)
        sheet[top : top + height, left : left + width] = image
    picture = Image.fromarray(sheet[..., 0] if channels == 1 else sheet)
    factor = max(1, SMALLEST_SIDE // max(height, width))
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST).save(path)
