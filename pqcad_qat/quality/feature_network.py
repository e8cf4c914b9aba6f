"""The feature network behind FID: its architecture, its files, and statistics of its features.

Not here: how it is trained (quality/feature_training.py), distances between statistics (quality/fidelity.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pqcad_qat.data.images import ImageSet, to_float
from pqcad_qat.errors import ModelError
from pqcad_qat.machine.files import file_digest, write_json
from pqcad_qat.machine.json_files import read_json, shown
from pqcad_qat.policy.schema import EMBEDDED, NO_FEATURES

FORMAT = "pqcad_qat.features/1"
_MODEL, _CONFIG, _REFERENCE, _REFERENCE_RECORD = (
    "model.safetensors",
    "config.json",
    "reference.safetensors",
    "reference.json",
)


@dataclass(frozen=True)
class FeatureConfig:
    """Architecture of the network, needed to build it before its weights are loaded."""

    channels: int = 1
    size: int = 32
    classes: int = 10
    widths: tuple[int, ...] = (32, 32, 64, 64, 96, 64)  # the last is the number of features
    strides: tuple[int, ...] = (2, 1, 2, 1, 2, 1)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of the images that it accepts."""
        return self.channels, self.size, self.size


@dataclass(frozen=True)
class FeatureStatistics:
    """Sums over features f (N, D), named like the states of torchmetrics' FrechetInceptionDistance."""

    features_sum: Tensor  # float64 (D,)       sum of f
    features_cov_sum: Tensor  # float64 (D, D) sum of f f^T, not centred
    num_samples: int


@dataclass(frozen=True)
class Features:
    """A trained feature network, its identity, and statistics of real images if there are any."""

    network: FeatureNetwork
    source: str
    sha256: str  # SHA-256 of model.safetensors
    reference: FeatureStatistics | None
    reference_name: str | None  # data set of the statistics and its number of images


class FeatureNetwork(nn.Module):
    """A small convolutional classifier, whose last hidden layer gives the features.

    It has 3x3 convolutions with batch normalization and ReLU. The global average of the last one gives the features,
    and a linear layer gives the classes.
    """

    def __init__(self, config: FeatureConfig) -> None:
        super().__init__()
        self.config = config
        inputs = (config.channels, *config.widths[:-1])
        self.blocks = nn.Sequential(
            *(_block(i, o, stride) for i, o, stride in zip(inputs, config.widths, config.strides, strict=True))
        )
        self.classifier = nn.Linear(config.widths[-1], config.classes)

    @property
    def num_features(self) -> int:
        return self.config.widths[-1]

    def features(self, x: Tensor) -> Tensor:
        """Map images in [-1, 1] (N, C, H, W) to features (N, D)."""
        hidden: Tensor = self.blocks(x.contiguous(memory_format=torch.channels_last))
        return hidden.mean(dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Map images in [-1, 1] (N, C, H, W) to logits (N, classes)."""
        logits: Tensor = self.classifier(self.features(x))
        return logits


def image_statistics(network: FeatureNetwork, images: Tensor, batch_size: int = 500) -> FeatureStatistics:
    """Compute statistics of uint8 images (N, C, H, W), by the same code for reference and generated images."""
    from torchmetrics.image.fid import FrechetInceptionDistance  # here, since that takes two seconds

    check_images(network.config, images)
    metric = FrechetInceptionDistance(feature=_FeatureExtractor(network), normalize=False)
    with torch.no_grad():
        for batch in torch.split(images, batch_size):
            metric.update(batch, real=True)
    return FeatureStatistics(
        metric.real_features_sum, metric.real_features_cov_sum, int(metric.real_features_num_samples)
    )


def check_shape(source: str, sample_shape: tuple[int, int, int]) -> None:
    """Check that the feature network accepts images of this shape (C, H, W).

    Raises:
        ModelError: it does not, or it is missing or damaged.
    """
    shape = load_features(source).network.config.shape
    if shape != sample_shape:
        fitting = [name for name in embedded_features() if load_features(name).network.config.shape == sample_shape]
        allowed = [*fitting, f"a folder with a network for {_sizes(sample_shape)}", NO_FEATURES]
        raise ModelError(
            f"got {source!r}, which reads images of {_sizes(shape)}; the model makes "
            f"{_sizes(sample_shape)}; allowed {', '.join(allowed)}"
        )


def _sizes(shape: tuple[int, int, int]) -> str:
    """Return a shape (C, H, W) as messages show it."""
    return "x".join(map(str, shape))


def check_images(config: FeatureConfig, images: Tensor) -> None:
    """Check that `images` are uint8 (N, C, H, W) with the size and channels that the network was trained on.

    Raises:
        ModelError: they are not.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or tuple(images.shape[1:]) != config.shape:
        got = f"{images.dtype} {tuple(images.shape)}"
        raise ModelError(
            f"images for this feature network: got {got}; allowed torch.uint8 (N, {', '.join(map(str, config.shape))})"
        )


def save_features(folder: Path, network: FeatureNetwork, real: ImageSet, provenance: Mapping[str, Any]) -> Features:
    """Write the network, its provenance and the statistics of the `real` images; return what `load_features` would."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, folder / _MODEL)
    record = {
        "format": FORMAT,
        "network": asdict(network.config),
        "sha256": file_digest(folder / _MODEL),
        "provenance": dict(provenance),
    }
    write_json(folder / _CONFIG, record)
    # Compute the statistics with the network as others will load it, since training may leave another memory layout.
    loaded, sha256 = _load_network(folder)
    save_reference(
        folder, image_statistics(loaded, real.images), f"{real.name}, {len(real)} images, sha256 {real.digest}", sha256
    )
    return load_features(str(folder))


def save_reference(folder: Path, statistics: FeatureStatistics, name: str, features_sha256: str) -> None:
    """Write statistics of real images, together with the digest of the network that computed them."""
    count = torch.tensor(statistics.num_samples, dtype=torch.int64)
    tensors = {
        "real_features_sum": statistics.features_sum,
        "real_features_cov_sum": statistics.features_cov_sum,
        "real_features_num_samples": count,
    }
    save_file(tensors, folder / _REFERENCE)
    record = {
        "format": FORMAT,
        "name": name,
        "features_sha256": features_sha256,
        "sha256": file_digest(folder / _REFERENCE),
    }
    write_json(folder / _REFERENCE_RECORD, record)


def load_features(source: str) -> Features:
    """Load `embedded:NAME` or a folder that `save_features` wrote.

    Raises:
        ModelError: a file is missing, or its digest differs.
    """
    folder = _folder(source)
    network, sha256 = _load_network(folder)
    reference, name = _load_reference(folder, sha256, network.num_features)
    return Features(network, source, sha256, reference, name)


def embedded_features() -> list[str]:
    """Names of the feature networks that ship with the package."""
    assets = Path(str(resources.files("pqcad_qat.assets")))
    return sorted(EMBEDDED + path.name.removeprefix("features-") for path in assets.glob("features-*"))


class _FeatureExtractor(nn.Module):
    """Feature extractor for torchmetrics: it takes uint8 images and returns float64 features.

    In float64, the sums and the result of torchmetrics are in double precision too.
    """

    def __init__(self, network: FeatureNetwork) -> None:
        super().__init__()
        self.network = network
        self.num_features = network.num_features

    def forward(self, images: Tensor) -> Tensor:
        return self.network.features(to_float(images)).double()


def _block(inputs: int, outputs: int, stride: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


def _folder(source: str) -> Path:
    """Return the folder of a network, which may ship with the package."""
    if not source.startswith(EMBEDDED):
        return Path(source)
    if source not in embedded_features():
        raise ModelError(f"got {source!r}; allowed {', '.join(embedded_features())}, or a folder")
    return Path(str(resources.files("pqcad_qat.assets"))) / f"features-{source.removeprefix(EMBEDDED)}"


def _load_network(folder: Path) -> tuple[FeatureNetwork, str]:
    """Load the network in evaluation mode, and the digest of its weights."""
    config = _read_record(folder / _CONFIG)
    sha256 = _verified(folder / _MODEL, config)
    try:
        fields: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in config["network"].items()
        }
        network = FeatureNetwork(FeatureConfig(**fields))
        network.load_state_dict(load_file(folder / _MODEL))
    except (AttributeError, KeyError, RuntimeError, SafetensorError, TypeError, ValueError) as error:
        raise ModelError(
            f"{folder}: got no feature network of this format: {error}; allowed a folder that `features` wrote"
        ) from error
    network.eval().requires_grad_(False)
    return network, sha256


def _load_reference(folder: Path, features_sha256: str, dimensions: int) -> tuple[FeatureStatistics | None, str | None]:
    """Load the statistics of real images and their name, or None twice if the folder has none."""
    if not (folder / _REFERENCE_RECORD).exists():
        return None, None
    record = _read_record(folder / _REFERENCE_RECORD)
    _verified(folder / _REFERENCE, record)
    if record.get("features_sha256") != features_sha256:
        raise ModelError(
            f"{folder / _REFERENCE}: got statistics of the feature network {record.get('features_sha256')}; allowed "
            f"those of {features_sha256}, which the folder holds"
        )
    try:
        tensors = load_file(folder / _REFERENCE)
        total, outer, count = (tensors[f"real_features_{name}"] for name in ("sum", "cov_sum", "num_samples"))
    except (KeyError, SafetensorError) as error:
        raise ModelError(
            f"{folder / _REFERENCE}: got no statistics of features: {error}; allowed the file that `features` wrote"
        ) from error
    if total.shape != (dimensions,) or outer.shape != (dimensions, dimensions):
        raise ModelError(
            f"{folder / _REFERENCE}: got sums of shape {tuple(total.shape)} and {tuple(outer.shape)}; allowed "
            f"({dimensions},) and ({dimensions}, {dimensions})"
        )
    return FeatureStatistics(total, outer, int(count)), str(record.get("name"))


def _verified(path: Path, record: dict[str, Any]) -> str:
    """Check a file against the digest in its record, and return the digest."""
    if not path.is_file():
        raise ModelError(f"{path}: got no such file; allowed the one that `features` wrote")
    digest = file_digest(path)
    if digest != record.get("sha256"):
        raise ModelError(
            f"{path}: got a damaged or exchanged file with SHA-256 {digest}; allowed {record.get('sha256')}"
        )
    return digest


def _read_record(path: Path) -> dict[str, Any]:
    """Read a JSON file of this format."""
    record = read_json(path, f"a folder of a feature network, with {_CONFIG} and {_MODEL}")
    if record.get("format") != FORMAT:
        raise ModelError(f"{path}: format: got {shown(record.get('format'))}; allowed {FORMAT!r}")
    return record
