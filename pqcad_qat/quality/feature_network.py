"""The feature networks that this package trains: their architecture and files, and the choice among all networks.

Not here: how they are trained (feature_training.py), networks that others trained (efficientnet_lite.py, inception.py),
features of images (image_features.py), distances between them (fidelity.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pqcad_qat.data.images import ImageSet
from pqcad_qat.errors import ModelError
from pqcad_qat.machine.files import file_digest, write_json
from pqcad_qat.machine.json_files import read_json, shown
from pqcad_qat.policy.evaluation import EFFICIENTNET_LITE0, EMBEDDED, NO_FEATURES
from pqcad_qat.quality.efficientnet_lite import CHANNELS, WEIGHTS_SHA256, load_efficientnet_lite0
from pqcad_qat.quality.fid_protocol import INCEPTION_SHA256, ReferenceKind
from pqcad_qat.quality.image_features import FeatureExtractor, FeatureStatistics, feature_statistics, image_statistics
from pqcad_qat.quality.inception import INCEPTION_FILE, is_inception, load_inception

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
class Features:
    """A trained feature network, its identity, and what images are compared with, if there is anything.

    Attributes:
        network: the network.
        source: its name, as a policy names it.
        sha256: SHA-256 of its weights' file.
        reference: statistics of the images of the reference.
        reference_name: what these images are, and their number.
        reference_features: their features (N, D) one by one, in random order; None where only statistics are stored.
        reference_kind: whether they are real, or made by full precision from other seeds.
    """

    network: FeatureExtractor
    source: str
    sha256: str
    reference: FeatureStatistics | None
    reference_name: str | None
    reference_features: Tensor | None = None
    reference_kind: ReferenceKind = "real"


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

    @property
    def axes(self) -> tuple[str, str, str]:
        channels, height, width = map(str, self.config.shape)
        return channels, height, width

    @property
    def batch_size(self) -> int:
        return 500

    def reads(self, shape: tuple[int, ...]) -> bool:
        """Tell whether the network was trained on images of this shape (C, H, W)."""
        return shape == self.config.shape

    def features(self, x: Tensor) -> Tensor:
        """Map images in [-1, 1] (N, C, H, W) to features (N, D)."""
        hidden: Tensor = self.blocks(x.contiguous(memory_format=torch.channels_last))
        return hidden.mean(dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Map images in [-1, 1] (N, C, H, W) to logits (N, classes)."""
        logits: Tensor = self.classifier(self.features(x))
        return logits


def check_shape(source: str, sample_shape: tuple[int, int, int]) -> None:
    """Check that the feature network accepts images of this shape (C, H, W).

    Raises:
        ModelError: it does not, or it is missing or damaged.
    """
    network = load_features(source).network
    if not network.reads(sample_shape):
        fitting = [name for name in embedded_features() if load_features(name).network.reads(sample_shape)]
        made = "x".join(map(str, sample_shape))
        fitting += [EFFICIENTNET_LITE0, f"the file {INCEPTION_FILE}"] if sample_shape[0] in CHANNELS else []
        allowed = [*fitting, f"a folder with a network for {made}", NO_FEATURES]
        raise ModelError(
            f"got {source!r}, which reads images of {'x'.join(network.axes)}; the model makes {made}; allowed "
            f"{', '.join(allowed)}"
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
    """Load `embedded:NAME`, `efficientnet-lite0`, the file of Inception, or a folder that `save_features` wrote.

    Raises:
        ModelError: a file or a package is missing, or a digest differs.
    """
    if source == EFFICIENTNET_LITE0:
        return Features(load_efficientnet_lite0(), source, WEIGHTS_SHA256, None, None)
    if is_inception(source):
        return Features(load_inception(Path(source)), source, INCEPTION_SHA256, None, None)
    folder = _folder(source)
    network, sha256 = _load_network(folder)
    reference, name = _load_reference(folder, sha256, network.num_features)
    return Features(network, source, sha256, reference, name)


def with_reference(features: Features, reference: Tensor, name: str, kind: ReferenceKind = "real") -> Features:
    """The same network with another reference, whose features (N, D) are given in random order."""
    return replace(
        features,
        reference=feature_statistics(reference),
        reference_name=name,
        reference_features=reference,
        reference_kind=kind,
    )


def made_by_others(source: str) -> bool:
    """Tell whether a feature network was trained by others, and so brings no statistics of real images along."""
    return source == EFFICIENTNET_LITE0 or is_inception(source)


def embedded_features() -> list[str]:
    """Names of the feature networks that ship with the package."""
    assets = Path(str(resources.files("pqcad_qat.assets")))
    return sorted(EMBEDDED + path.name.removeprefix("features-") for path in assets.glob("features-*"))


def all_features() -> str:
    """Names of all feature networks, for messages."""
    return f"{', '.join(embedded_features())}, {EFFICIENTNET_LITE0}, the file {INCEPTION_FILE}, or a folder"


def _block(inputs: int, outputs: int, stride: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


def _folder(source: str) -> Path:
    """Return the folder of a network, which may ship with the package."""
    if not source.startswith(EMBEDDED):
        return Path(source)
    if source not in embedded_features():
        raise ModelError(f"got {source!r}; allowed {all_features()}")
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
