"""Inception against torch-fidelity's features of random weights; which file is taken, and what is said of any other.

Not here: that a policy's file is checked before anything is trained (tests/stages/test_feature_choice.py).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from inception_reference import EXPECTED, PLACES, fill, pictures
from PIL import Image

from pqcad_qat import cli
from pqcad_qat.errors import ModelError
from pqcad_qat.machine.files import file_digest
from pqcad_qat.quality import feature_network, fid_protocol, fidelity, inception
from pqcad_qat.quality.feature_network import check_shape, load_features
from pqcad_qat.quality.image_features import image_features
from pqcad_qat.quality.inception import INCEPTION_FILE, INCEPTION_SHA256, Inception, resized


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of random weights in the format of the standard one, with the last layer that features do not pass."""
    tensors = Inception().state_dict()
    fill(tensors)
    file = tmp_path_factory.mktemp("inception") / INCEPTION_FILE
    last = {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
    torch.save(tensors | last, file, _use_new_zipfile_serialization=False)
    return file


def take(file: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Take a file for the standard one, and return its path."""
    for module in (fid_protocol, inception, feature_network):
        monkeypatch.setattr(module, "INCEPTION_SHA256", file_digest(file))
    return str(file)


@pytest.mark.slow
def test_features_are_those_of_torch_fidelity_at_any_size_and_grey_is_repeated(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = load_features(take(weights, monkeypatch)).network
    for name, images in pictures().items():
        features = image_features(network, images)
        assert features.shape == (len(images), network.num_features)
        torch.testing.assert_close(features[0, PLACES], torch.tensor(EXPECTED[name]), atol=1e-4, rtol=1e-4)


def test_pictures_are_resized_from_the_corner() -> None:
    """Two pixels become four at the places 0, 0.5, 1 and 1.5, of which the last lies behind the last pixel."""
    grid = torch.tensor([[0.0, 8.0], [16.0, 24.0]])[None, None]
    rows = torch.tensor([0.0, 8.0, 16.0, 16.0])
    assert torch.equal(resized(grid, 4)[0, 0], rows[:, None] + torch.tensor([0.0, 4.0, 8.0, 8.0]))
    picture = torch.rand(1, 3, 299, 299)
    assert torch.equal(resized(picture, 299), picture)


def test_the_digest_begins_with_the_digits_in_the_name_of_the_file() -> None:
    assert re.fullmatch(r"[0-9a-f]{64}", INCEPTION_SHA256)
    assert INCEPTION_FILE.endswith(f"-{INCEPTION_SHA256[:8]}.pth")


class Bomb:
    """Writes a file where it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.trace), "w")


def test_another_file_is_refused_and_no_code_of_it_runs_whatever_its_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / INCEPTION_FILE
    torch.save({"weight": Bomb(tmp_path / "trace")}, file)
    with pytest.raises(ModelError, match=rf"{INCEPTION_FILE}: got SHA-256 {file_digest(file)}; allowed 6726825d"):
        load_features(str(file))
    with pytest.raises(Exception, match="Weights only load failed"):
        load_features(take(file, monkeypatch))
    assert not (tmp_path / "trace").exists()


def test_a_missing_file_is_told_with_the_name_of_the_right_one(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=rf"mine\.pth: got no readable file \(No such.*\); allowed {INCEPTION_FILE}"):
        load_features(str(tmp_path / "mine.pth"))


def test_grey_and_colour_are_read_and_other_channels_are_refused(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = take(weights, monkeypatch)
    check_shape(source, (1, 8, 8))
    check_shape(source, (3, 64, 48))
    with pytest.raises(ModelError, match="which reads images of 1 or 3xHxW; the model makes 4x8x8; allowed a folder"):
        check_shape(source, (4, 8, 8))


def test_its_distance_alone_is_called_fid(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = load_features(take(weights, monkeypatch))
    assert fidelity.fid_protocol(network, 8, "ddim", 20, seed=0).distance == "FID"
    for name in feature_network.embedded_features():
        assert fidelity.fid_protocol(load_features(name), 8, "ddim", 20, seed=0).distance == "FD"


def evaluated(folder: Path, *arguments: str) -> int:
    try:
        cli.main(["evaluate", str(folder), "--images", "2", "--steps", "1", *arguments])
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def test_evaluate_takes_the_file_with_pictures_and_refuses_it_without(
    weights: Path,
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for index in range(4):
        Image.effect_noise((32, 32), 10 + 40 * index).save(tmp_path / f"{index}.png")
    source = take(weights, monkeypatch)
    # a distance of 2,048 features takes many seconds, and is tested in test_fidelity.py
    monkeypatch.setattr(fidelity, "frechet_distance", lambda a, b: float((a.features_sum - b.features_sum).norm()))
    assert evaluated(tiny_folder, "--features", source) == 2
    assert re.search("--reference: got none, and .* knows no real pictures", " ".join(capsys.readouterr().err.split()))
    assert evaluated(tiny_folder, "--features", source, "--reference", str(tmp_path)) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fid_real"] > 0
    assert found["fid_protocol"]["features_sha256"] == file_digest(weights)
