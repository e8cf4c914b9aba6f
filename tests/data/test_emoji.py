"""Emoji of a colour font that the test builds: which bitmaps count, how sequences are recognised, and every fault as a
ModelError.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from fontTools.feaLib.builder import addOpenTypeFeaturesFromString
from fontTools.fontBuilder import FontBuilder
from fontTools.ttLib.tables.DefaultTable import DefaultTable
from PIL import Image

from pqcad_qat.data.emoji import emoji_pictures, read_groups
from pqcad_qat.data.images import load_images
from pqcad_qat.errors import ModelError

LIST = """\
# group: Smileys & Emotion
1F600                  ; fully-qualified     # grinning face
# group: People & Body
1F3C4                  ; fully-qualified     # person surfing
1F3C4 200D 2640 FE0F   ; fully-qualified     # woman surfing
# group: Activities
26BD                   ; fully-qualified     # soccer ball
"""
CODES = {"face": 0x1F600, "surfer": 0x1F3C4, "joiner": 0x200D, "female": 0x2640, "ball": 0x26BD, "digit": 0x31}
GLYPHS = (".notdef", *CODES, "woman", "unencoded", "nobody")
# the first one backwards
LIGATURES = "feature ccmp { sub female joiner surfer by woman; sub joiner unencoded by nobody; } ccmp;"
COLOURS = {"face": "yellow", "surfer": "blue", "ball": "black", "digit": "lime", "woman": "red", "nobody": "pink"}


def png(colour: str) -> bytes:
    """17 x 16 pixels, the leftmost column transparent."""
    picture = Image.new("RGBA", (17, 16), colour)
    picture.paste((255, 0, 0, 0), (0, 0, 1, 16))
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def write_font(folder: Path, bitmaps: Mapping[str, bytes]) -> Path:
    """A font with these bitmaps, Unicode's list beside it."""
    builder = FontBuilder(128)
    builder.setupGlyphOrder(list(GLYPHS))
    builder.setupCharacterMap({code: name for name, code in CODES.items()})
    builder.setupHorizontalMetrics(dict.fromkeys(GLYPHS, (128, 0)))
    builder.setupHorizontalHeader(ascent=128, descent=0)
    builder.setupPost()
    addOpenTypeFeaturesFromString(builder.font, LIGATURES)
    if bitmaps:
        for tag, content in bitmap_tables([bitmaps.get(name) for name in GLYPHS]).items():
            builder.font[tag] = DefaultTable(tag)
            builder.font[tag].data = content
    (folder / "emoji-test.txt").write_text(LIST)
    builder.save(folder / "font.ttf")
    return folder / "font.ttf"


def bitmap_tables(bitmaps: list[bytes | None]) -> dict[str, bytes]:
    """OpenType's CBDT and CBLC of one strike: image format 17, index format 1."""
    entries = [b"" if one is None else bytes(5) + struct.pack(">L", len(one)) + one for one in bitmaps]
    offsets = struct.pack(f">{len(entries) + 1}L", 0, *accumulate(map(len, entries)))
    last = len(entries) - 1
    index = struct.pack(">HHL", 0, last, 8) + struct.pack(">HHL", 1, 17, 4) + offsets
    size = struct.pack(">LLLL24xHHBBBb", 56, len(index), 1, 0, 0, last, 16, 16, 32, 1)
    version = struct.pack(">L", 0x00030000)
    return {"CBDT": version + b"".join(entries), "CBLC": version + struct.pack(">L", 1) + size + index}


@pytest.fixture
def font(tmp_path: Path) -> Path:
    return write_font(tmp_path, {name: png(colour) for name, colour in COLOURS.items()})


def colours(pictures: list[Image.Image]) -> list[object]:
    return [picture.getpixel((8, 8)) for picture in pictures]


YELLOW, BLUE, BLACK, RED = (255, 255, 0, 255), (0, 0, 255, 255), (0, 0, 0, 255), (255, 0, 0, 255)


def test_groups_are_counted_as_they_come_and_sequences_known_in_any_order_without_their_selector(
    tmp_path: Path,
) -> None:
    (tmp_path / "list.txt").write_text(LIST)
    found = read_groups(tmp_path / "list.txt")
    assert found == {(0x1F600,): 0, (0x1F3C4,): 1, (0x200D, 0x2640, 0x1F3C4): 1, (0x26BD,): 2}


def test_listed_emoji_come_in_the_fonts_order_with_their_groups(font: Path) -> None:
    pictures, groups = emoji_pictures(font, font.with_name("emoji-test.txt"))
    # neither the digit, which is not listed, nor what has no code point
    assert colours(pictures) == [YELLOW, BLUE, BLACK, RED]
    assert groups.tolist() == [0, 1, 2, 1]


def test_a_bitmap_of_two_emoji_counts_once_for_the_first(tmp_path: Path) -> None:
    font = write_font(tmp_path, {"face": png("red"), "ball": png("black"), "woman": png("red")})
    pictures, groups = emoji_pictures(font, font.with_name("emoji-test.txt"))
    assert colours(pictures) == [RED, BLACK]
    assert groups.tolist() == [0, 2]


def test_as_a_data_set_they_lie_over_white_and_are_square(font: Path) -> None:
    found = load_images("noto-emoji", str(font), 17)
    assert found.name == "noto-emoji 17x17"
    assert found.labels is not None
    assert found.labels.tolist() == [0, 1, 2, 1]
    assert found.images.shape == (4, 3, 17, 17)
    assert bool((found.images[:, :, :, 0] == 255).all())  # transparent
    assert found.images[2, :, 8, 8].tolist() == [0, 0, 0]
    assert load_images("noto-emoji", str(font), 8, channels=1).images.shape == (4, 1, 8, 8)


def test_scaling_down_averages_over_all_pixels(tmp_path: Path) -> None:
    stripes = Image.new("RGBA", (64, 64), "white")
    for column in range(0, 64, 2):
        stripes.paste("black", (column, 0, column + 1, 64))
    file = io.BytesIO()
    stripes.save(file, "PNG")
    found = load_images("noto-emoji", str(write_font(tmp_path, {"ball": file.getvalue()})), 8)
    assert torch.all((found.images[:, :, :, 2:6].int() - 128).abs() < 16)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda font: font.unlink(), r"font\.ttf: got no such file; .*package fonts-noto-color-emoji"),
        (lambda font: font.write_bytes(b"no font"), r"font\.ttf: got another file than a font with colour bitmaps"),
        (
            lambda font: font.write_bytes(font.read_bytes()[:-300]),
            r"font\.ttf: got another file than a font with colour bitmaps",
        ),
        (
            lambda font: write_font(font.parent, {}),
            r"font\.ttf: got another file than a font with colour bitmaps: .*CBDT.*; allowed",
        ),
        (
            lambda font: write_font(font.parent, {"ball": b"no picture"}),
            r"font\.ttf: got a bitmap that is not a readable picture",
        ),
        (
            lambda font: write_font(font.parent, {"digit": png("red")}),
            r"got 1 bitmaps, none of them an emoji of .*emoji-test\.txt",
        ),
        (
            lambda font: font.with_name("emoji-test.txt").write_text("x; y"),
            r"emoji-test\.txt: got text of another format: .*; allowed Unicode's emoji-test\.txt",
        ),
    ],
    ids=["absent", "no font", "cut short", "no bitmaps", "no picture", "nothing listed", "another list"],
)
def test_a_fault_names_the_file_and_what_it_should_be(font: Path, damage: object, message: str) -> None:
    assert callable(damage)
    damage(font)
    with pytest.raises(ModelError, match=message):
        load_images("noto-emoji", str(font), 16)


def test_an_absent_list_names_its_package(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"list\.txt: got no such file; .*package unicode-data \(apt-get install"):
        read_groups(tmp_path / "list.txt")
