"""Which feature network a policy looks through, and what is refused before anything is trained.

Not here: the network itself (test_feature_network.py).
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel
from tiny_runs import POLICIES, SCHEDULER, tiny_unet

from pqcad_qat import cli
from pqcad_qat.data.images import image_set
from pqcad_qat.models.model_loading import save_model
from pqcad_qat.policy.loading import load_policy
from pqcad_qat.quality.efficientnet_lite import load_efficientnet_lite0
from pqcad_qat.quality.feature_training import FeatureRecipe, make_features


def small_unet(channels: int, pixels: int) -> UNet2DModel:
    sizes = {
        "block_out_channels": (8,),
        "down_block_types": ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",),
        "norm_num_groups": 4,
    }
    return UNet2DModel(sample_size=pixels, in_channels=channels, out_channels=channels, layers_per_block=1, **sizes)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three channels of 16 pixels: the shape of no network that ships."""
    torch.manual_seed(0)
    save_model(small_unet(3, 16).eval(), SCHEDULER, tmp_path_factory.mktemp("model") / "rgb")
    return next(tmp_path_factory.getbasetemp().glob("model*/rgb"))


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A feature network of one's own, for three channels of 16 pixels."""
    folder = tmp_path_factory.mktemp("network")
    labels = torch.arange(100) % 2
    pictures = (labels * 200 + 20).to(torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 3, 16, 16).contiguous()
    make_features(
        folder,
        image_set(pictures.numpy(), labels.numpy(), "dark and bright"),
        recipe=FeatureRecipe(batch_size=8),
    )
    return folder


@pytest.mark.parametrize(
    ("source", "listed", "chosen"),
    [
        ("embedded:digits", "null", "embedded:digits"),
        ("embedded:noto-emoji", "null", "embedded:noto-emoji"),
        ("embedded:digits", "none", None),
        ("my-model", "null", None),
        ("my-model", "none", None),
        ("my-model", "embedded:fashion-mnist", "embedded:fashion-mnist"),
    ],
)
def test_an_embedded_model_has_its_own_features_and_any_other_has_those_that_the_policy_names(
    source: str, listed: str, chosen: str | None
) -> None:
    policy = load_policy(POLICIES / "w4a8.yaml", [f"model.source={source}", f"evaluation.features={listed}"])
    assert policy.features == chosen


@pytest.mark.parametrize(
    "name", sorted(path.stem for path in POLICIES.glob("w*.yaml") if path.stem != "w4a8-digits-classes")
)
def test_a_shipped_policy_on_ones_own_model_compares_with_no_data_of_others(name: str) -> None:
    assert load_policy(POLICIES / f"{name}.yaml", ["model.source=my-model"]).features is None


def call(arguments: list[str]) -> int:
    try:
        cli.main(arguments)
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


@pytest.mark.parametrize("command", ["plan", "run"])
@pytest.mark.parametrize(
    ("features", "message"),
    [
        (
            "embedded:fashion-mnist",
            r"got 'embedded:fashion-mnist', which reads images of 1x32x32; the model makes 3x16x16; allowed eff",
        ),
        (
            "embedded:cifar",
            r"got 'embedded:cifar'; allowed embedded:digits, embedded:fashion-mnist, embedded:noto-emoji, eff",
        ),
        ("no-such-folder", r"no-such-folder/config\.json: got no such file"),
        ("no-such-file.pth", r"no-such-file\.pth: got no readable file \(No such.*\); allowed pt_inception-2015-12"),
        (__file__, r"test_feature_choice\.py: got SHA-256 [0-9a-f]{64}; allowed 6726825d0af5f729"),
    ],
)
def test_features_that_do_not_fit_are_told_with_their_key_before_anything_is_written(
    command: str,
    features: str,
    message: str,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert (
        call([command, str(POLICIES / "smoke.yaml"), "--model", str(model), "--set", f"evaluation.features={features}"])
        == 2
    )
    assert re.search(rf"evaluation\.features: .*{message}", capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


def test_what_is_allowed_names_the_networks_that_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    save_model(tiny_unet().eval(), SCHEDULER, tmp_path / "grey")
    flags = ["--model", str(tmp_path / "grey"), "--set", "evaluation.features=embedded:digits"]
    assert call(["plan", str(POLICIES / "smoke.yaml"), *flags]) == 2
    assert (
        "the model makes 1x32x32; allowed embedded:fashion-mnist, efficientnet-lite0, the file pt_inception"
        in capsys.readouterr().err
    )


def test_a_network_of_ones_own_is_taken_where_it_fits_and_refused_where_not(
    model: Path, network: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--set", f"evaluation.features={network}"]
    assert call(["plan", str(POLICIES / "smoke.yaml"), "--model", str(model), *flags]) == 0
    assert call(["plan", str(POLICIES / "smoke.yaml"), *flags]) == 2
    assert (
        "which reads images of 3x16x16; the model makes 1x32x32; allowed embedded:fashion-mnist"
        in capsys.readouterr().err
    )


def test_a_damaged_network_is_told_before_anything_is_trained(
    network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in network.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "sha256": "0" * 64}))
    assert call(["plan", str(POLICIES / "smoke.yaml"), "--set", f"evaluation.features={tmp_path}"]) == 2
    assert re.search(r"evaluation\.features: .*model\.safetensors: got a damaged or exchanged", capsys.readouterr().err)


@pytest.mark.parametrize("command", ["plan", "run"])
def test_a_network_of_an_extra_that_is_not_installed_is_told_with_the_extra(
    command: str, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    load_efficientnet_lite0.cache_clear()
    flags = ["--model", str(model), "--set", "evaluation.features=efficientnet-lite0"]
    assert call([command, str(POLICIES / "smoke.yaml"), *flags]) == 2
    found = " ".join(capsys.readouterr().err.split())
    assert re.search(
        r"evaluation\.features: got efficientnet-lite0, .*; allowed with pip install '\.\[features\]'", found
    )


def test_evaluate_asks_for_the_features_of_a_model_that_has_none(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(["evaluate", str(model), "--images", "2", "--steps", "1"]) == 2
    assert "--features: got none, and" in capsys.readouterr().err
    assert call(["evaluate", str(model), "--images", "2", "--steps", "1", "--features", "embedded:digits"]) == 2
    assert (
        "--features: got 'embedded:digits', which reads images of 1x16x16; the model makes 3x16x16"
        in capsys.readouterr().err
    )
