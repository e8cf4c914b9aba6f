"""Real images: pixels, labels and digests against what was written, and every fault of a file as a ModelError that
names it.
"""

from __future__ import annotations

import gzip
import hashlib
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits

from pqcad_qat.data.images import load_images, read_idx, to_float, to_uint8
from pqcad_qat.errors import ModelError

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (5, 28, 28), dtype=np.uint8)
LABELS = np.array([3, 1, 4, 1, 5], dtype=np.uint8)


def idx_bytes(array: NDArray[np.uint8]) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def fashion(tmp_path: Path) -> Path:
    """A folder as the Debian package lays it out, with five images of noise in each split."""
    for split in ("train", "t10k"):
        (tmp_path / f"{split}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(PIXELS)))
        (tmp_path / f"{split}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx_bytes(LABELS)))
    return tmp_path


@pytest.mark.parametrize("split", ["train", "test"])
def test_idx_images_come_back_in_a_frame_of_two_zeros(fashion: Path, split: str) -> None:
    found = load_images("fashion-mnist", str(fashion), 32, split)
    assert found.images.dtype == torch.uint8
    assert found.images.shape == (5, 1, 32, 32)
    np.testing.assert_array_equal(found.images[:, 0].numpy(), np.pad(PIXELS, ((0, 0), (2, 2), (2, 2))))
    assert found.labels is not None
    assert found.labels.dtype == torch.int64
    assert found.labels.tolist() == LABELS.tolist()
    assert found.name == f"fashion-mnist {split} 32x32"
    assert found.digest == hashlib.sha256(found.images.numpy().tobytes()).hexdigest()


def test_a_half_size_is_the_average_of_two_by_two_blocks_of_the_padded_images(fashion: Path) -> None:
    padded = torch.from_numpy(np.pad(PIXELS, ((0, 0), (2, 2), (2, 2)))).float()[:, None]
    expected = torch.nn.functional.avg_pool2d(padded, 2).round().to(torch.uint8)
    assert torch.equal(load_images("fashion-mnist", str(fashion), 16).images, expected)


def test_another_size_that_does_not_divide_is_refused(fashion: Path) -> None:
    with pytest.raises(ModelError, match="got 20; allowed at least 28, or a divisor of 32"):
        load_images("fashion-mnist", str(fashion), 20)


def test_an_absent_data_set_names_the_package(tmp_path: Path, fashion: Path) -> None:
    with pytest.raises(ModelError, match="dataset-fashion-mnist"):
        load_images("fashion-mnist", str(tmp_path / "nowhere"))
    (fashion / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(ModelError, match=r"t10k-labels-idx1-ubyte\.gz: got no such file.*dataset-fashion-mnist"):
        load_images("fashion-mnist", str(fashion), split="test")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(idx_bytes(PIXELS))[:-2000], "got damaged data, or not gzip"),
        (gzip.compress(idx_bytes(PIXELS))[:-8] + b"\0" * 8, "got damaged data, or not gzip"),
        (idx_bytes(PIXELS), "got damaged data, or not gzip"),
        (b"", "allowed 00000803"),
        (gzip.compress(b"\0\0\x08\x03\0\0"), "allowed 00000803"),
        (gzip.compress(idx_bytes(LABELS)), "got a file that begins 00000801; allowed 00000803"),
        (gzip.compress(b"\0\0\x0d\x03" + idx_bytes(PIXELS)[4:]), "got a file that begins 00000d03; allowed 00000803"),
        (gzip.compress(idx_bytes(PIXELS)[:-1]), "got 3919 bytes; allowed 5 x 28 x 28 = 3920, as its header says"),
        (gzip.compress(idx_bytes(PIXELS) + b"x"), "got more bytes; allowed 5 x 28 x 28 = 3920"),
    ],
    ids=[
        "truncated",
        "wrong checksum",
        "not compressed",
        "empty",
        "short header",
        "labels for images",
        "floats",
        "short",
        "long",
    ],
)
def test_a_damaged_idx_file_is_an_error_that_names_the_file(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "images.gz"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=rf"images\.gz: .*{message}"):
        read_idx(path, rank=3)


def test_labels_that_do_not_pair_with_the_images_are_refused(fashion: Path) -> None:
    (fashion / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx_bytes(LABELS[:4])))
    with pytest.raises(ModelError, match="got 5 images and 4 labels; allowed equally many"):
        load_images("fashion-mnist", str(fashion))


def test_digits_keep_scikit_learns_order_and_levels() -> None:
    found = load_images("digits", size=8)
    reference = load_digits()
    np.testing.assert_array_equal(found.images[:, 0].numpy(), np.rint(reference.images * 255 / 16))
    assert found.labels is not None
    assert found.labels.tolist() == reference.target.tolist()
    assert load_images("digits", size=32).images.shape == (1797, 1, 32, 32)


def test_enlarged_digits_are_smooth_and_average_to_the_originals() -> None:
    originals, enlarged = load_images("digits", size=8).images.float(), load_images("digits", size=16).images.float()
    smooth = torch.nn.functional.interpolate(originals, size=16, mode="bilinear")
    blocks = torch.nn.functional.avg_pool2d(enlarged, 2)
    assert (enlarged - smooth).abs().mean() < 8  # of 255
    assert (blocks - originals).abs().mean() < 12


def test_pictures_are_read_in_the_order_of_their_names_and_grey_if_all_are(tmp_path: Path) -> None:
    for name, level in (("b.png", 20), ("a.png", 10), ("c.PNG", 30)):
        Image.new("L", (12, 12), level).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not a picture")
    found = load_images("folder", str(tmp_path), 8)
    assert found.labels is None
    assert found.images.shape == (3, 1, 8, 8)
    assert found.images[:, 0, 0, 0].tolist() == [10, 20, 30]
    assert load_images("folder", str(tmp_path), 8, channels=3).images.shape == (3, 3, 8, 8)


def test_colour_pictures_keep_their_channels_and_are_cropped_about_the_middle(tmp_path: Path) -> None:
    wide = Image.new("RGB", (24, 8), (255, 0, 0))
    wide.paste((0, 128, 255), (8, 0, 16, 8))
    wide.save(tmp_path / "wide.png")
    Image.new("L", (8, 8), 7).save(tmp_path / "x.png")
    found = load_images("folder", str(tmp_path), 8)
    assert found.images.shape == (2, 3, 8, 8)
    assert torch.equal(found.images[0], torch.tensor([0, 128, 255], dtype=torch.uint8)[:, None, None].expand(3, 8, 8))


def test_transparent_pixels_become_white(tmp_path: Path) -> None:
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert bool((load_images("folder", str(tmp_path), 8).images == 255).all())


def test_one_subfolder_a_class_gives_labels(tmp_path: Path) -> None:
    for label, count in (("cats", 2), ("dogs", 1)):
        (tmp_path / label).mkdir()
        for index in range(count):
            Image.new("L", (8, 8), index).save(tmp_path / label / f"{index}.png")
    found = load_images("folder", str(tmp_path), 8)
    assert found.labels is not None
    assert found.labels.tolist() == [0, 0, 1]


def test_a_folder_without_readable_pictures_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"got no picture, in it or in its subfolders; allowed [^/]*$"):
        load_images("folder", str(tmp_path), 8)
    deep = tmp_path / "train" / "cats"
    deep.mkdir(parents=True)
    Image.new("L", (8, 8)).save(deep / "0.png")
    with pytest.raises(ModelError, match=f"got no picture, in it or in its subfolders; .*, as in {deep}$"):
        load_images("folder", str(tmp_path), 8)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(ModelError, match=r"broken\.png: got no readable picture"):
        load_images("folder", str(tmp_path), 8)
    Image.fromarray(np.full((8, 8), 40_000, dtype=np.uint16)).save(tmp_path / "broken.png")
    with pytest.raises(ModelError, match="channels must have 8 bits, got mode I;16"):
        load_images("folder", str(tmp_path), 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": "cifar"}, "got 'cifar'; allowed fashion-mnist, digits, noto-emoji, folder"),
        ({"source": "digits", "split": "test"}, "split of digits: got 'test'; allowed train"),
        ({"source": "fashion-mnist", "split": "validation"}, "got 'validation'; allowed train, test"),
        ({"source": "digits", "size": 0}, "got 0; allowed a positive number"),
        ({"source": "folder"}, "got no path; allowed the path of a folder"),
        ({"source": "folder", "path": "/nowhere"}, "/nowhere: got no such folder"),
        ({"source": "folder", "path": "{pictures}", "channels": 4}, "got 4; allowed 1, 3"),
    ],
)
def test_a_wrong_argument_is_answered_with_what_is_allowed(
    tmp_path: Path, arguments: dict[str, object], message: str
) -> None:
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    if arguments.get("path") == "{pictures}":
        arguments = {**arguments, "path": str(tmp_path)}
    with pytest.raises(ModelError, match=message):
        load_images(**arguments)  # type: ignore[arg-type]


def test_every_byte_survives_the_way_to_float_and_back() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(levels)), levels)
    assert to_float(levels)[[0, 255]].tolist() == [-1.0, 1.0]


def test_to_uint8_clamps_rounds_and_refuses_what_is_not_finite() -> None:
    assert to_uint8(torch.tensor([-7.0, -1.0, 0.0, 1.0, 9.0])).tolist() == [0, 0, 128, 255, 255]
    with pytest.raises(ModelError, match="got 2 NaN or infinite values of 3"):
        to_uint8(torch.tensor([0.0, float("nan"), float("inf")]))
