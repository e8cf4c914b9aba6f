"""Real images as uint8 tensors (N, C, H, W): Fashion-MNIST, scikit-learn's digits, emoji, or a folder of pictures.

Not here: how emoji are read from a font (emoji.py), how a picture is turned upright (upright.py), noise, trajectories
(calibration.py), or image quality (quality/fidelity.py).
"""

from __future__ import annotations

import gzip
import hashlib
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from pqcad_qat.data.emoji import EMOJI_LIST, NOTO_EMOJI_FONT, emoji_pictures
from pqcad_qat.data.upright import over_white, upright
from pqcad_qat.errors import ModelError
from pqcad_qat.machine.files import file_digest

Source = Literal["fashion-mnist", "digits", "noto-emoji", "folder"]
Split = Literal["train", "test"]

FASHION_MNIST_FOLDER = "/usr/share/datasets/fashion-mnist"
FASHION_MNIST_PADDED = 32  # side in pixels after the 28 x 28 images are padded with two zeros on each side
PICTURE_SUFFIXES = (".jpeg", ".jpg", ".png")
"""File name endings of images that are read from a folder."""

_IDX_UNSIGNED_BYTE = 0x08
_FILES: dict[Split, tuple[str, str]] = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}


@dataclass(frozen=True)
class ImageSet:
    """Images of one size, and their labels where they have any."""

    images: Tensor  # uint8 (N, C, H, W)
    labels: Tensor | None  # int64 (N,)
    name: str  # source, split and size, for display
    digest: str  # SHA-256 of the pixels in (N, C, H, W) order, one byte each

    def __len__(self) -> int:
        return int(self.images.shape[0])


def load_images(
    source: str, path: str | None = None, size: int = 32, split: str = "train", *, channels: int | None = None
) -> ImageSet:
    """Read a data set at `size` x `size` pixels.

    Args:
        source: one of the names in `Source`.
        path: folder of the IDX files, of images, or of one folder of images per class; for the emoji, the font. By
            default Debian's packages dataset-fashion-mnist and fonts-noto-color-emoji provide the files. Unicode's
            emoji-test.txt is read beside the font, or from the package unicode-data.
        size: height and width in pixels.
        split: train or test; only Fashion-MNIST has a test split.
        channels: 1 or 3, for folders and emoji; by default 1 if every image is grey, else 3 (RGB).

    Raises:
        ModelError: an argument is not allowed, or a file is missing or damaged.
    """
    if source not in get_args(Source):
        raise ModelError(f"image source: got {source!r}; allowed {', '.join(get_args(Source))}")
    if split not in get_args(Split) or (split == "test" and source != "fashion-mnist"):
        raise ModelError(
            f"split of {source}: got {split!r}; allowed {'train, test' if source == 'fashion-mnist' else 'train'}"
        )
    if size < 1:
        raise ModelError(f"image size: got {size}; allowed a positive number of pixels")
    if source == "fashion-mnist":
        pixels, labels = _fashion_mnist(
            Path(path or FASHION_MNIST_FOLDER), "test" if split == "test" else "train", size
        )
        return image_set(pixels, labels, f"{source} {split} {size}x{size}")
    if source == "digits":
        pixels, labels = _digits(size)
        return image_set(pixels, labels, f"{source} {size}x{size}")
    if source == "noto-emoji":
        pictures, labels = _emoji(Path(path or NOTO_EMOJI_FONT), size)
        return image_set(_pixels(pictures, channels), labels, f"{source} {size}x{size}")
    if path is None:
        raise ModelError("image source folder: got no path; allowed the path of a folder with pictures")
    return load_pictures(Path(path), (size, size), channels)


def load_pictures(folder: Path, size: tuple[int, int], channels: int | None = None) -> ImageSet:
    """Read a folder of pictures, each cropped about its middle and resized to a height and width.

    Raises:
        ModelError: the folder holds no picture, or one cannot be read.
    """
    files, classes = picture_files(folder)
    height, width = size
    pictures = [_picture(file, (width, height)) for file in files]
    return image_set(_pixels(pictures, channels), classes, f"{folder.name} {height}x{width}")


def pictures_digest(folder: Path) -> str:
    """SHA-256 over the names and contents of a folder's pictures, in hexadecimal."""
    lines = [f"{file.relative_to(folder)} {file_digest(file)}\n" for file in picture_files(folder)[0]]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def image_set(pixels: NDArray[np.uint8], labels: NDArray[np.int64] | None, name: str) -> ImageSet:
    """Wrap pixels (N, C, H, W) and labels (N,) together with their digest."""
    pixels = np.ascontiguousarray(pixels)
    return ImageSet(
        images=torch.from_numpy(pixels),
        labels=None if labels is None else torch.from_numpy(labels),
        name=name,
        digest=hashlib.sha256(pixels.tobytes()).hexdigest(),
    )


def to_float(images: Tensor) -> Tensor:
    """Convert uint8 values 0 to 255 of any shape to float32 in [-1, 1], the range of the denoiser."""
    return images.to(torch.float32) / 127.5 - 1.0


def to_uint8(images: Tensor) -> Tensor:
    """Convert floating-point values in [-1, 1] of any shape to uint8, rounded to nearest and clamped.

    Raises:
        ModelError: a value is NaN or infinite.
    """
    if not bool(torch.isfinite(images).all()):
        raise ModelError(
            f"images: got {int((~torch.isfinite(images)).sum())} NaN or infinite values of {images.numel()}; allowed "
            "finite ones"
        )
    return ((images.to(torch.float32) + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)


def read_idx(path: Path, rank: int) -> NDArray[np.uint8]:
    """Read a gzip-compressed IDX file of unsigned bytes with `rank` dimensions.

    Raises:
        ModelError: the file is missing, damaged, or of another format.
    """
    try:
        with gzip.open(path, "rb") as file:
            header = file.read(4 + 4 * rank)
            expected = bytes((0, 0, _IDX_UNSIGNED_BYTE, rank))
            if len(header) != 4 + 4 * rank or header[:4] != expected:
                raise ModelError(
                    f"{path}: got a file that begins {header[:4].hex() or 'with nothing'}; allowed {expected.hex()}, "
                    f"IDX bytes of rank {rank}"
                )
            shape = struct.unpack(f">{rank}I", header[4:])
            count = math.prod(shape)
            # One byte more than expected reveals trailing bytes, and makes gzip verify the checksum of an exact file.
            data = file.read(count + 1)
    except FileNotFoundError as error:
        raise ModelError(f"{path}: got no such file; allowed {_FASHION_MNIST}") from error
    except (EOFError, zlib.error, OSError) as error:
        raise ModelError(f"{path}: got damaged data, or not gzip: {error}; allowed a gzip file") from error
    if len(data) != count:
        dimensions, got = " x ".join(map(str, shape)), "more" if len(data) > count else len(data)
        raise ModelError(f"{path}: got {got} bytes; allowed {dimensions} = {count}, as its header says")
    return np.frombuffer(data, dtype=np.uint8).reshape(shape).copy()


_FASHION_MNIST = "that of Debian's package dataset-fashion-mnist (apt-get install dataset-fashion-mnist)"


def _fashion_mnist(folder: Path, split: Split, size: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Read a split's images (N, 1, size, size) and labels (N,)."""
    if not folder.is_dir():
        raise ModelError(f"{folder}: got no such folder; allowed {_FASHION_MNIST}")
    images, labels = read_idx(folder / _FILES[split][0], rank=3), read_idx(folder / _FILES[split][1], rank=1)
    if len(images) != len(labels) or len(images) == 0:
        raise ModelError(
            f"{folder}: {split} split: got {len(images)} images and {len(labels)} labels; allowed equally many, and "
            "at least one"
        )
    return _resize_by_padding(images, size)[:, None], labels.astype(np.int64)


def _resize_by_padding(images: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Resize (N, h, w) to (N, size, size).

    A larger size pads with zeros. A smaller one pads to 32 pixels and averages over whole blocks.
    """
    if size >= max(images.shape[1:]):
        return _pad(images, size)
    if FASHION_MNIST_PADDED % size or max(images.shape[1:]) > FASHION_MNIST_PADDED:
        allowed = f"at least {max(images.shape[1:])}, or a divisor of {FASHION_MNIST_PADDED}"
        raise ModelError(f"size of {images.shape[1]}x{images.shape[2]} images: got {size}; allowed {allowed}")
    block = FASHION_MNIST_PADDED // size
    blocks = _pad(images, FASHION_MNIST_PADDED).reshape(len(images), size, block, size, block)
    return np.asarray(np.rint(blocks.mean(axis=(2, 4), dtype=np.float32)), dtype=np.uint8)


def _pad(images: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Pad (N, h, w) with zeros on all sides to (N, size, size)."""
    top, left = (size - images.shape[1]) // 2, (size - images.shape[2]) // 2
    padded = np.zeros((len(images), size, size), dtype=np.uint8)
    padded[:, top : top + images.shape[1], left : left + images.shape[2]] = images
    return padded


def _digits(size: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Read scikit-learn's digits, resized to (N, 1, size, size), and their labels (N,)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8), with values 0 to 16
    resized = [np.asarray(Image.fromarray(digit).resize((size, size), Image.Resampling.BICUBIC)) for digit in pixels]
    return np.stack(resized)[:, None], digits.target.astype(np.int64)


def picture_files(folder: Path) -> tuple[list[Path], NDArray[np.int64] | None]:
    """List the images of a folder in order of their names, or else those of its subfolders with labels.

    A label is the place of the subfolder in the order of their names.
    """
    if not folder.is_dir():
        raise ModelError(f"{folder}: got no such folder; allowed one of pictures")
    if files := _suffixed(folder):
        return files, None
    classes = [
        files for subfolder in sorted(folder.iterdir()) if subfolder.is_dir() and (files := _suffixed(subfolder))
    ]
    if not classes:
        deeper = next((path.parent for path in folder.rglob("*") if path.suffix.lower() in PICTURE_SUFFIXES), None)
        raise ModelError(
            f"{folder}: got no picture, in it or in its subfolders; allowed {', '.join(PICTURE_SUFFIXES)}"
            f"{'' if deeper is None else f', as in {deeper}'}"
        )
    labels = np.repeat(np.arange(len(classes)), [len(files) for files in classes])
    return [path for files in classes for path in files], labels


def _suffixed(folder: Path) -> list[Path]:
    """List the pictures of a folder by their endings, in order of their names."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURE_SUFFIXES)


def _emoji(font: Path, size: int) -> tuple[list[Image.Image], NDArray[np.int64]]:
    """Return the emoji over white, padded with white to a square and resized, in mode RGB."""
    listing = font.with_name(Path(EMOJI_LIST).name)
    pictures, groups = emoji_pictures(font, listing if listing.exists() else Path(EMOJI_LIST))
    padded = [
        ImageOps.pad(over_white(picture), (size, size), Image.Resampling.BICUBIC, color="white") for picture in pictures
    ]
    return padded, groups


def _pixels(pictures: Sequence[Image.Image], channels: int | None) -> NDArray[np.uint8]:
    """Return the pixels (N, C, H, W) of pictures of one size."""
    if channels not in (None, 1, 3):
        raise ModelError(f"channels of pictures: got {channels}; allowed 1, 3")
    mode = {None: _common_mode(pictures), 1: "L", 3: "RGB"}[channels]
    pixels = np.stack([np.asarray(picture.convert(mode), dtype=np.uint8) for picture in pictures])
    return pixels[:, None] if mode == "L" else pixels.transpose(0, 3, 1, 2)


def _picture(path: Path, size: tuple[int, int]) -> Image.Image:
    """Read an image upright, over white, cropped about its middle and resized to a width and height.

    Its mode is L or RGB.
    """
    try:
        with Image.open(path) as file:
            if file.mode.startswith(("I", "F")):
                raise ValueError(f"channels must have 8 bits, got mode {file.mode}")
            grey = file.mode in ("1", "L", "LA")
            over = upright(file)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ModelError(
            f"{path}: got no readable picture: {error}; allowed {', '.join(PICTURE_SUFFIXES)}, 8 bits a channel"
        ) from error
    return ImageOps.fit(over.convert("L") if grey else over, size, Image.Resampling.BICUBIC)


def _common_mode(pictures: Sequence[Image.Image]) -> str:
    """Return L if every picture is grey, else RGB."""
    return "L" if all(picture.mode == "L" for picture in pictures) else "RGB"
