"""A picture as it is seen: turned as its camera says, and over white where it is transparent.

Not here: which pictures are read, and at which size (images.py). Needs no PyTorch.
"""

from __future__ import annotations

from PIL import Image, ImageOps


def upright(picture: Image.Image) -> Image.Image:
    """Return a picture turned as its EXIF data says, over white, in RGB."""
    return over_white(ImageOps.exif_transpose(picture))


def over_white(picture: Image.Image) -> Image.Image:
    """Return a picture in RGB, with white where it is transparent."""
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA")).convert("RGB")
