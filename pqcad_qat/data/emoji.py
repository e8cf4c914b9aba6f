"""Colour emoji as images: the bitmaps of a font's CBDT table, labelled with the groups of Unicode's list.

Not here: scaling to the size of a data set, or other images (data/images.py).
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from fontTools.ttLib import TTFont
from numpy.typing import NDArray
from PIL import Image

from pqcad_qat.errors import ModelError

NOTO_EMOJI_FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
EMOJI_LIST = "/usr/share/unicode/emoji/emoji-test.txt"
"""Paths at which Debian's packages install the font and Unicode's list."""

_VARIATION_SELECTOR = 0xFE0F  # asks for the coloured form; it appears in the list but not in the font
_LIGATURE = 4  # GSUB lookup type that replaces a sequence of glyphs by one

Emoji = tuple[int, ...]
"""Code points of an emoji in ascending order, because a font may spell a sequence backwards."""


def emoji_pictures(font: Path, listing: Path) -> tuple[list[Image.Image], NDArray[np.int64]]:
    """Return the distinct bitmaps (RGBA) of the emoji in Unicode's list, in the font's order, and their group numbers.

    Args:
        font: font with a CBDT table, such as Noto Color Emoji.
        listing: Unicode's emoji-test.txt, whose groups are numbered from 0 in their order there.

    Raises:
        ModelError: a file is missing or has another format.
    """
    glyphs, groups = _read_font(font), read_groups(listing)
    bitmap_groups: dict[bytes, int] = {}
    for emoji, bitmap in glyphs:
        if emoji in groups:
            bitmap_groups.setdefault(bitmap, groups[emoji])
    if not bitmap_groups:
        raise ModelError(
            f"{font}: got {len(glyphs)} bitmaps, none of them an emoji of {listing}; allowed a font that has some"
        )
    try:
        pictures = [Image.open(io.BytesIO(bitmap)).convert("RGBA") for bitmap in bitmap_groups]
    except (OSError, SyntaxError, ValueError) as error:
        raise ModelError(f"{font}: got a bitmap that is not a readable picture: {error}; allowed PNG data") from error
    return pictures, np.array(list(bitmap_groups.values()), np.int64)


def read_groups(listing: Path) -> dict[Emoji, int]:
    """Return the group number of each emoji in Unicode's list.

    The list has lines such as `1F600 ; fully-qualified # ...` below headings such as `# group: Smileys & Emotion`.
    """
    if not listing.is_file():
        raise ModelError(
            f"{listing}: got no such file; allowed Unicode's list of emoji, from Debian's package "
            f"unicode-data{_INSTALL}"
        )
    groups: dict[Emoji, int] = {}
    group = -1
    try:
        for line in listing.read_text(encoding="utf-8").splitlines():
            group += line.startswith("# group:")
            codes, separator, _ = line.partition(";")
            if separator and not line.startswith("#"):
                groups[_emoji(int(code, 16) for code in codes.split())] = group
    except ValueError as error:
        raise ModelError(f"{listing}: got text of another format: {error}; allowed Unicode's emoji-test.txt") from error
    return groups


_INSTALL = " (apt-get install fonts-noto-color-emoji unicode-data)"


def _read_font(path: Path) -> list[tuple[Emoji, bytes]]:
    """Return the emoji and the PNG data of every bitmap, in the order of the glyphs."""
    if not path.is_file():
        raise ModelError(
            f"{path}: got no such file; allowed the font from Debian's package fonts-noto-color-emoji{_INSTALL}"
        )
    try:
        with TTFont(path, lazy=True) as font:
            spelled = _spelled(font)
            bitmaps = font["CBDT"].strikeData[0]
            return [(_emoji(spelled[name]), bitmap.imageData) for name, bitmap in bitmaps.items() if name in spelled]
    except Exception as error:  # fontTools raises many kinds of exceptions on a file of another format
        raise ModelError(
            f"{path}: got another file than a font with colour bitmaps: {error}; allowed one with a CBDT table"
        ) from error


def _spelled(font: Any) -> dict[str, tuple[int, ...]]:
    """Return the code points that spell each glyph, directly or through ligatures."""
    spelled: dict[str, tuple[int, ...]] = {name: (code,) for code, name in font.getBestCmap().items()}
    lookups = font["GSUB"].table.LookupList.Lookup if "GSUB" in font else []
    for table in chain.from_iterable(lookup.SubTable for lookup in lookups if lookup.LookupType == _LIGATURE):
        for first, ligatures in table.ligatures.items():
            for ligature in ligatures:
                spellings = [spelled.get(name) for name in (first, *ligature.Component)]
                if None not in spellings:
                    spelled.setdefault(ligature.LigGlyph, sum(filter(None, spellings), ()))
    return spelled


def _emoji(codes: Iterable[int]) -> Emoji:
    """Return an emoji from code points, which ignores their order and the variation selector."""
    return tuple(sorted(code for code in codes if code != _VARIATION_SELECTOR))
