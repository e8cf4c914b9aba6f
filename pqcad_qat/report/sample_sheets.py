"""Sample images of several variants from the same seeds, as PNG: the labelled sheet, and one strip for each variant for
the page.

Not here: charts (figures.py), or the sampling itself.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pqcad_qat.errors import ModelError
from pqcad_qat.policy.variants import VARIANTS, summary_of

GAP = 2  # pixels between images, before enlargement
LABEL_WIDTH = 220  # pixels of the sheet's column of names
STRIP_IMAGES = 16  # largest number of images in a strip
_SHEET_IMAGE = 64  # pixels to which an image is at least enlarged, by a whole factor


def ordered(samples: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Variant -> uint8 images (K, H, W, 3), in the report's order; variants with other names come last.

    Raises:
        ModelError: the variants do not all have the same number K >= 1 of images (K, C, H, W), C 1 or 3, as finite
            floats in [-1, 1] or as uint8.
    """
    known = [name for name in VARIANTS if name in samples]
    images = {
        name: _to_uint8(name, samples[name]) for name in (*known, *(name for name in samples if name not in VARIANTS))
    }
    shapes = {name: array.shape for name, array in images.items()}
    if len(set(shapes.values())) > 1:
        raise ModelError(
            f"samples: got the shapes {shapes}; allowed one shape for all variants, for they come from the same seeds"
        )
    return images


def _to_uint8(name: str, images: np.ndarray) -> np.ndarray:
    if images.ndim != 4 or len(images) == 0 or images.shape[1] not in (1, 3):
        raise ModelError(f"samples of {name}: got {images.shape}; allowed (K, C, H, W) with K at least 1 and C 1 or 3")
    if images.dtype != np.uint8:
        if not np.isfinite(images).all():
            count = np.count_nonzero(~np.isfinite(images))
            raise ModelError(f"samples of {name}: got {count} values that are not finite; allowed finite values")
        images = np.rint((np.clip(images, -1, 1) + 1) * 127.5).astype(np.uint8)
    return np.broadcast_to(images.transpose(0, 2, 3, 1), (len(images), *images.shape[2:], 3))


def sheet_size(rows: int, columns: int, height: int, width: int) -> tuple[int, int]:
    """Width and height in pixels of a sheet of ``rows`` variants with ``columns`` images of height x width each."""
    factor = _factor(height, width)
    return LABEL_WIDTH + columns * (width + GAP) * factor + GAP * factor, rows * (height + GAP) * factor + GAP * factor


def sheet(samples: Mapping[str, np.ndarray]) -> bytes:
    """Draw samples.png: one row for each variant after its name, one column for each seed, enlarged by a whole factor.

    Raises the same errors as `ordered`.
    """
    rows = ordered(samples)
    columns, height, width, _ = next(iter(rows.values())).shape
    factor = _factor(height, width)
    page = Image.new("RGB", sheet_size(len(rows), columns, height, width), "white")
    draw = ImageDraw.Draw(page)
    name_font, note_font = ImageFont.load_default(17), ImageFont.load_default(11)
    for index, (name, images) in enumerate(rows.items()):
        top = (GAP + index * (height + GAP)) * factor
        strip = _enlarged(_strip(images), factor)
        page.paste(strip, (LABEL_WIDTH, top - GAP * factor), strip)
        draw.text((12, top + 4), name, fill="#1a2028", font=name_font)
        draw.multiline_text((12, top + 26), _wrapped(summary_of(name)), fill="#5b6573", font=note_font, spacing=0)
    return _png(page)


def strip_uri(images: np.ndarray) -> str:
    """Data URI of one variant's first images (K, H, W, 3) side by side, at their own resolution."""
    return _uri(_png(_strip(images[:STRIP_IMAGES])))


def file_uri(png: Path) -> str:
    """Data URI of a PNG file."""
    return _uri(png.read_bytes())


def _uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _strip(images: np.ndarray) -> Image.Image:
    """Place images (K, H, W, 3) side by side, with transparent gaps."""
    count, height, width, _ = images.shape
    strip = np.zeros((height + 2 * GAP, count * (width + GAP) + GAP, 4), dtype=np.uint8)
    for index, image in enumerate(images):
        left = GAP + index * (width + GAP)
        strip[GAP : GAP + height, left : left + width] = np.dstack(
            [image, np.full((height, width), 255, dtype=np.uint8)]
        )
    return Image.fromarray(strip)


def _factor(height: int, width: int) -> int:
    return max(1, -(-_SHEET_IMAGE // max(height, width)))


def _enlarged(image: Image.Image, factor: int) -> Image.Image:
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _wrapped(text: str, width: int = 36) -> str:
    lines = [""]
    for word in text.split():
        lines = [*lines[:-1], f"{lines[-1]} {word}".strip()] if len(lines[-1]) + len(word) < width else [*lines, word]
    return "\n".join(lines[:3])


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
