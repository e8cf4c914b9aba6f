"""The sheet of samples and the page's strips: sizes, pixels, and images that do not fit.

Not here: the page (test_report_files.py).
"""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image
from report_fixture import fixture_samples

from pqcad_qat.errors import ModelError
from pqcad_qat.policy.variants import FP32, PQ, PQCAD
from pqcad_qat.report.sample_sheets import GAP, LABEL_WIDTH, ordered, sheet, sheet_size, strip_uri


def picture(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def test_sheet_has_a_row_a_variant_and_a_column_a_seed() -> None:
    samples = fixture_samples(5)
    found = picture(sheet(samples))
    width, height = sheet_size(len(samples), 5, 32, 32)
    assert found.shape == (height, width, 3)
    assert (width, height) == (LABEL_WIDTH + (5 * (32 + GAP) + GAP) * 2, (8 * (32 + GAP) + GAP) * 2)


def test_sheet_holds_each_image_enlarged_by_a_whole_factor() -> None:
    samples = fixture_samples(3)
    found = picture(sheet(samples))
    for row, images in enumerate(ordered(samples).values()):
        for column, image in enumerate(images):
            top, left = 2 * (GAP + row * (32 + GAP)), LABEL_WIDTH + 2 * (GAP + column * (32 + GAP))
            np.testing.assert_array_equal(found[top : top + 64, left : left + 64], image.repeat(2, 0).repeat(2, 1))


def test_sheet_names_every_row() -> None:
    found = picture(sheet(fixture_samples(2)))
    for row in range(8):
        label = found[row * 68 + 4 : row * 68 + 68, :LABEL_WIDTH]
        assert label.min() < 80, f"row {row} has no dark lettering"


def test_rows_stand_in_the_order_of_the_report_and_other_names_last() -> None:
    image = np.zeros((1, 1, 4, 4), np.float32)
    assert list(ordered({"mine": image, PQCAD: image, FP32: image})) == [FP32, PQCAD, "mine"]


def test_float_images_meet_uint8_at_both_ends_and_in_the_middle() -> None:
    values = np.array([-1.0, 0.0, 1.0, 3.0], np.float32).reshape(1, 1, 2, 2)
    np.testing.assert_array_equal(ordered({FP32: values})[FP32][0, ..., 0], [[0, 128], [255, 255]])


def test_uint8_images_are_taken_as_they_are() -> None:
    colour = np.arange(12, dtype=np.uint8).reshape(1, 3, 2, 2)
    np.testing.assert_array_equal(ordered({FP32: colour})[FP32][0], colour[0].transpose(1, 2, 0))


def test_strip_is_a_transparent_png_of_the_images_own_resolution() -> None:
    uri = strip_uri(ordered(fixture_samples(20))[FP32])
    strip = Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,"))))
    assert strip.size == (16 * (32 + GAP) + GAP, 32 + 2 * GAP)
    assert np.asarray(strip)[0, 0, 3] == 0


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ({FP32: np.zeros((4, 32, 32), np.float32)}, r"fp32: got \(4, 32, 32\); allowed \(K, C, H, W\)"),
        ({FP32: np.zeros((0, 1, 8, 8), np.float32)}, "K at least 1"),
        ({PQ: np.zeros((2, 2, 8, 8), np.float32)}, "C 1 or 3"),
        ({PQ: np.full((1, 1, 2, 2), np.nan, np.float32)}, "pq: got 4 values that are not finite"),
        (
            {FP32: np.zeros((2, 1, 8, 8), np.float32), PQ: np.zeros((3, 1, 8, 8), np.float32)},
            "one shape for all variants, for they come from",
        ),
    ],
)
def test_images_that_do_not_fit_are_refused(samples: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        sheet(samples)
