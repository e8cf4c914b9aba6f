"""Inception v3 with the weights behind the name FID (Heusel et al. 2017), from a file that the user gives.

The file is the one that pytorch-fid and torch-fidelity download. Their own networks need torchvision, whose builds fit
one build of torch only, so the network stands here; features equal theirs (tests/quality/test_inception.py). It is that
of Szegedy et al. 2015 (arXiv 1512.00567) as TensorFlow ran it: bilinear resizing from the corner, averages that leave
out the padding, and a maximum in the place of the last average.

Not here: feature networks that need no such file (feature_network.py, efficientnet_lite.py).
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pqcad_qat.errors import ModelError
from pqcad_qat.machine.files import file_digest
from pqcad_qat.quality.fid_protocol import INCEPTION_SHA256

INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"
"""Name under which pytorch-fid publishes the weights; torch-fidelity's weights-inception-2015-12-05-6726825d.pth has
the same bytes.
"""

SIDE = 299
"""Height and width in pixels of the network's input."""

Level = tuple[tuple[str, int, tuple[int, int]], ...]
"""Convolutions that read the same: name in the file, number of outputs, and height and width of the kernel."""

Pool = Literal["average", "max", "halve"]
"""Pooling beside a block's branches; `halve` takes maxima at every second place, as the branches then do."""


class Inception(nn.Module):
    """The convolutions of Inception v3; the global average of the last ones gives 2,048 features."""

    num_features = 2048
    axes = ("1 or 3", "H", "W")
    batch_size = 32

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Convolution(3, 32, (3, 3), stride=2, padded=False)
        self.Conv2d_2a_3x3 = _Convolution(32, 32, (3, 3), padded=False)
        self.Conv2d_2b_3x3 = _Convolution(32, 64, (3, 3))
        self.Conv2d_3b_1x1 = _Convolution(64, 80, (1, 1))
        self.Conv2d_4a_3x3 = _Convolution(80, 192, (3, 3), padded=False)
        for name, inputs, pooled in (("5b", 192, 32), ("5c", 256, 64), ("5d", 288, 64)):
            self.add_module(f"Mixed_{name}", _Block(inputs, _square_kernels(), "average", pooled))
        self.Mixed_6a = _Block(288, _halving_kernels(), "halve")
        for name, width in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
            self.add_module(f"Mixed_{name}", _Block(768, _long_kernels(width), "average", 192))
        self.Mixed_7a = _Block(768, _long_halving_kernels(), "halve")
        self.Mixed_7b = _Block(1280, _forked_kernels(), "average", 192)
        self.Mixed_7c = _Block(2048, _forked_kernels(), "max", 192)

    def reads(self, shape: tuple[int, ...]) -> bool:
        """Tell whether images of this shape (C, H, W) are grey or RGB; they may have any size."""
        return len(shape) == 3 and shape[0] in (1, 3)

    def features(self, x: Tensor) -> Tensor:
        """Map images in [-1, 1] (N, C, H, W) to features (N, 2048); grey is repeated."""
        pixels = resized((x + 1) * 127.5, SIDE)
        x = (pixels.expand(-1, 3, -1, -1) - 128) / 128
        for name, layer in self.named_children():  # in the order in which they were added
            if name in ("Conv2d_3b_1x1", "Mixed_5b"):
                x = F.max_pool2d(x, 3, stride=2)
            x = layer(x)
        return x.mean(dim=(2, 3))


def resized(images: Tensor, side: int) -> Tensor:
    """Resize images (N, C, H, W) to a square by TensorFlow 1's bilinear interpolation, which starts at the corner.

    torch's own takes pixels by their centres, and features would differ.
    """
    for axis in (2, 3):
        length = images.shape[axis]
        place = torch.arange(side) * (length / side)
        low = place.long()
        share = (place - low).reshape(-1, *(1,) * (3 - axis))
        first = images.index_select(axis, low)
        images = first + (images.index_select(axis, (low + 1).clamp(max=length - 1)) - first) * share
    return images


def is_inception(source: str) -> bool:
    """Tell whether a feature network is named by a file, and not by a word or a folder."""
    return os.path.isfile(source) or (source.endswith(Path(INCEPTION_FILE).suffix) and not os.path.isdir(source))


@cache
def load_inception(file: Path) -> Inception:
    """Load the network in evaluation mode from the file of its weights, which is read after its digest is known.

    Raises:
        ModelError: the file cannot be read, or is another one.
    """
    try:
        digest = file_digest(file)
    except OSError as error:
        raise ModelError(f"{file}: got no readable file ({error.strerror}); allowed {INCEPTION_FILE}") from error
    if digest != INCEPTION_SHA256:
        raise ModelError(f"{file}: got SHA-256 {digest}; allowed {INCEPTION_SHA256}, the file {INCEPTION_FILE}")
    weights = torch.load(file, weights_only=True)
    network = Inception()
    network.load_state_dict({name: value for name, value in weights.items() if not name.startswith("fc.")})
    return network.eval().requires_grad_(False)


class _Convolution(nn.Module):
    """A convolution with batch normalization and ReLU; without padding its output is smaller than its input."""

    def __init__(
        self, inputs: int, outputs: int, kernel: tuple[int, int], *, stride: int = 1, padded: bool = True
    ) -> None:
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2) if padded else (0, 0)
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class _Block(nn.Module):
    """Branches of convolutions and a pooling side by side, whose outputs are concatenated."""

    def __init__(self, inputs: int, branches: tuple[tuple[Level, ...], ...], pool: Pool, pooled: int = 0) -> None:
        super().__init__()
        self.branches, self.pool = branches, pool
        for branch in branches:
            channels = inputs
            for level in branch:
                halves = pool == "halve" and level is branch[-1]
                for name, outputs, kernel in level:
                    stride = 2 if halves else 1
                    self.add_module(name, _Convolution(channels, outputs, kernel, stride=stride, padded=not halves))
                channels = level[-1][1]
        self.branch_pool = _Convolution(inputs, pooled, (1, 1)) if pooled else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for *chain, ends in self.branches:
            hidden = x
            for ((name, _, _),) in chain:
                hidden = self.get_submodule(name)(hidden)
            found += [self.get_submodule(name)(hidden) for name, _, _ in ends]
        return torch.cat([*found, self.branch_pool(self._pool(x))], dim=1)

    def _pool(self, x: Tensor) -> Tensor:
        if self.pool == "average":
            return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        return F.max_pool2d(x, 3, stride=2) if self.pool == "halve" else F.max_pool2d(x, 3, stride=1, padding=1)


def _branch(name: str, *shapes: tuple[int, int, int]) -> tuple[Level, ...]:
    """A chain of convolutions (outputs, height, width); the file numbers them where there are several."""
    names = [f"{name}_{place}" for place in range(1, len(shapes) + 1)] if len(shapes) > 1 else [name]
    return tuple(
        ((each, outputs, (height, width)),) for each, (outputs, height, width) in zip(names, shapes, strict=True)
    )


def _forked(name: str, *shapes: tuple[int, int, int]) -> tuple[Level, ...]:
    """A chain that ends in two convolutions of 384 outputs side by side, a row and a column."""
    place = len(shapes) + 1
    chain = tuple(_branch(f"{name}_{number}", shape)[0] for number, shape in enumerate(shapes, 1))
    return (*chain, ((f"{name}_{place}a", 384, (1, 3)), (f"{name}_{place}b", 384, (3, 1))))


def _square_kernels() -> tuple[tuple[Level, ...], ...]:
    return (
        _branch("branch1x1", (64, 1, 1)),
        _branch("branch5x5", (48, 1, 1), (64, 5, 5)),
        _branch("branch3x3dbl", (64, 1, 1), (96, 3, 3), (96, 3, 3)),
    )


def _halving_kernels() -> tuple[tuple[Level, ...], ...]:
    return _branch("branch3x3", (384, 3, 3)), _branch("branch3x3dbl", (64, 1, 1), (96, 3, 3), (96, 3, 3))


def _long_kernels(width: int) -> tuple[tuple[Level, ...], ...]:
    return (
        _branch("branch1x1", (192, 1, 1)),
        _branch("branch7x7", (width, 1, 1), (width, 1, 7), (192, 7, 1)),
        _branch("branch7x7dbl", (width, 1, 1), (width, 7, 1), (width, 1, 7), (width, 7, 1), (192, 1, 7)),
    )


def _long_halving_kernels() -> tuple[tuple[Level, ...], ...]:
    return (
        _branch("branch3x3", (192, 1, 1), (320, 3, 3)),
        _branch("branch7x7x3", (192, 1, 1), (192, 1, 7), (192, 7, 1), (192, 3, 3)),
    )


def _forked_kernels() -> tuple[tuple[Level, ...], ...]:
    return (
        _branch("branch1x1", (320, 1, 1)),
        _forked("branch3x3", (384, 1, 1)),
        _forked("branch3x3dbl", (448, 1, 1), (384, 3, 3)),
    )
