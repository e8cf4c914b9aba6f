"""Random weights and pictures for Inception, and the features that torch-fidelity and pytorch-fid compute of them.

Run as a program it computes them again and compares (`tox -e inception`). It needs both libraries, and torchvision of
the same build as torch. Not here: the same comparison with our network (tests/quality/test_inception.py).
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

EXPECTED = {
    "colour 299x299": [0.90968, 0.42786, 0.15662, 0.05225, 3.11511, 0.00523, 0.23593],
    "colour 20x31": [0.57583, 0.19235, 0.12903, 0.04068, 2.07435, 0.00571, 0.01082],
    "grey 32x32": [0.71768, 0.30734, 0.14012, 0.03131, 2.42883, 0.00462, 0.02551],
}
"""Every 300th feature of each picture, by torch-fidelity 0.4.0."""

PLACES = slice(100, None, 300)


def pictures() -> Mapping[str, Tensor]:
    """A uint8 picture (1, C, H, W) of each kind."""
    noise = torch.randint(0, 256, (1, 3, 299, 299), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    return {
        "colour 299x299": noise,
        "colour 20x31": noise[:, :, :20, :31].contiguous(),
        "grey 32x32": noise[:, :1, :32, :32].contiguous(),
    }


def fill(weights: Mapping[str, Tensor]) -> None:
    """Fill a network's tensors with random values under which activations keep their size."""
    dice = torch.Generator().manual_seed(1)
    for name, tensor in sorted(weights.items()):
        if tensor.ndim > 1:
            tensor.normal_(0, (2 / tensor[0].numel()) ** 0.5, generator=dice)
        elif name.endswith("running_var"):
            tensor.uniform_(0.8, 1.2, generator=dice)
        elif name.endswith(("running_mean", "bias")):
            tensor.normal_(0, 0.1, generator=dice)


def main() -> None:
    from pytorch_fid import inception
    from torch_fidelity import FeatureExtractorInceptionV3
    from torchvision.models import inception_v3

    weights = inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False).state_dict()
    fill({name: tensor for name, tensor in weights.items() if not name.startswith("fc.")})
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "weights.pth"
        torch.save(weights, file)
        one = FeatureExtractorInceptionV3("one", ["2048"], feature_extractor_weights_path=str(file))
    inception.load_state_dict_from_url = lambda *_, **__: weights
    # pytorch-fid resizes by another rule and scales pixels a little differently, so it is handed what is left alone
    other = inception.InceptionV3(resize_input=False, normalize_input=False).eval()
    for name, images in pictures().items():
        features = one(images.expand(-1, 3, -1, -1))[0]
        print(f'    "{name}": {[round(value, 5) for value in features[0, PLACES].tolist()]},')
        torch.testing.assert_close(features[0, PLACES], torch.tensor(EXPECTED[name]), atol=1e-4, rtol=1e-4)
        if images.shape[1:] == (3, 299, 299):
            with torch.no_grad():
                again = other((images.float() - 128) / 128)[0].flatten(1)
            torch.testing.assert_close(again, features, atol=1e-4, rtol=1e-4)


if __name__ == "__main__":
    sys.exit(main())
