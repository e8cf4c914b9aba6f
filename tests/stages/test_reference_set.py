"""Runs whose images are compared with a folder of pictures, or with full precision's own samples of another seed.

Not here: the distances (tests/quality/), and the choice of a feature network (test_feature_choice.py).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from tiny_runs import POLICIES, tiny_overrides, without_page

from pqcad_qat import cli
from pqcad_qat.commands.run import run
from pqcad_qat.data.images import load_images, pictures_digest
from pqcad_qat.policy.loading import load_policy
from pqcad_qat.policy.variants import PTQ
from pqcad_qat.stages import reference_set

SHORT = (f"evaluation.variants=[{PTQ}]", "evaluation.images=8")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty digits without labels, in three sizes and both formats."""
    folder = tmp_path_factory.mktemp("pictures") / "digits"
    folder.mkdir()
    for index, digit in enumerate(load_images("digits", size=32).images[:30].numpy()):
        side = (32, 48, 24)[index % 3]
        file = folder / f"{index:02}.{('png', 'jpg')[index % 2]}"
        Image.fromarray(digit[0]).resize((side, 2 * side)).save(file)
    return folder


def finished(tiny_folder: Path, folder: Path, *more: str) -> dict[str, Any]:
    """Make a short run and return its report."""
    policy = load_policy(POLICIES / "smoke.yaml", tiny_overrides(tiny_folder, *SHORT, *more))
    run(policy, folder, "command", Console(quiet=True))
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return report


@pytest.fixture(scope="module")
def compared(tiny_folder: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is compared with the pictures, through a network that ships."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    finished(tiny_folder, folder, f"evaluation.reference={pictures}")
    return folder


def test_a_folder_is_the_reference_with_every_measure_and_a_floor(compared: Path, pictures: Path) -> None:
    report = json.loads((compared / "report.json").read_text())
    protocol = report["fid_protocol"]
    assert protocol["reference"] == f"digits 32x32, 30 images, sha256 {pictures_digest(pictures)}"
    assert protocol["reference_kind"] == "real"
    assert protocol["floor"]["images"] == [8, 15]
    for row in report["variants"]:
        measured = [row[key] for key in ("fid_real", "kid_real", "kid_real_error", "precision", "recall")]
        assert all(np.isfinite(measured))
        assert row["fid_real"] > protocol["floor"]["distance"]
        assert row["kid_real"] > protocol["floor"]["kid"]


def test_a_network_that_was_made_for_other_pictures_is_said_to_be(compared: Path) -> None:
    note = json.loads((compared / "report.json").read_text())["quality_note"]
    assert "The feature network embedded:fashion-mnist was made for the pictures of the model" in note


def test_runs_side_by_side_compute_the_references_features_once(
    compared: Path, tiny_folder: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference_set, "load_pictures", None)  # so that reading them again would fail
    with without_page():
        again = finished(tiny_folder, compared.with_name("second"), f"evaluation.reference={pictures}")
    first = json.loads((compared / "report.json").read_text())
    assert again["fid_protocol"] == first["fid_protocol"]
    assert [row["kid_real"] for row in again["variants"]] == [row["kid_real"] for row in first["variants"]]


def test_other_pictures_repeat_the_comparison_alone(
    compared: Path, tiny_folder: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in sorted(pictures.iterdir())[:20]:
        (tmp_path / file.name).write_bytes(file.read_bytes())
    flags = [item for value in tiny_overrides(tiny_folder, *SHORT) for item in ("--set", value)]
    arguments = ["run", str(POLICIES / "smoke.yaml"), *flags, "--set", f"evaluation.reference={tmp_path}"]
    cli.main([*arguments, "--out", str(compared), "--resume", "--dry-run"])
    output = " ".join(capsys.readouterr().out.split())
    assert "1 of 6 stages to do" in output


def test_without_pictures_a_network_of_others_compares_with_full_precisions_other_samples(
    tiny_folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip("efficientnet_lite_pytorch", reason="the extra `features` is not installed")
    report = finished(tiny_folder, tmp_path / "run", "evaluation.features=efficientnet-lite0")
    protocol = report["fid_protocol"]
    assert protocol["reference"] == "full precision's own samples, 8 images of seed 1235, 4 steps"
    assert protocol["reference_kind"] == "full-precision"
    full = report["variants"][0]
    assert full["fid_fp"] == 0
    assert full["fid_real"] > 0  # images of other seeds
    assert protocol["floor"] == {
        "images": [8, 8],
        "distance": full["fid_real"],
        "kid": full["kid_real"],
        "kid_error": full["kid_real_error"],
    }
    assert "FID" not in (tmp_path / "run" / "report.html").read_text().replace("FD-EffNetLite0", "")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["evaluation.features=none", "evaluation.reference={pictures}"],
            "evaluation.reference: got '.*' and no feature",
        ),
        (["evaluation.reference={empty}"], "evaluation.reference: .*: got no picture, in it or in its subfolders"),
        (["evaluation.reference={three}"], "evaluation.reference: .*: got 3 pictures; allowed at least 4"),
        (["evaluation.reference=nowhere"], "evaluation.reference: .*nowhere: got no such folder; allowed one of"),
    ],
)
def test_a_reference_that_cannot_be_used_is_told_before_anything_is_done(
    settings: list[str], message: str, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    three, empty = tmp_path / "three", tmp_path / "empty"
    for folder in (three, empty):
        folder.mkdir()
    for file in sorted(pictures.iterdir())[:3]:
        (three / file.name).write_bytes(file.read_bytes())
    values = [value.format(pictures=pictures, three=three, empty=empty) for value in settings]
    flags = [item for value in values for item in ("--set", value)]
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", str(POLICIES / "smoke.yaml"), *flags])
    assert ended.value.code == 2
    assert re.search(message, " ".join(capsys.readouterr().err.split()))


def evaluated(folder: Path, features: str, *more: str) -> None:
    cli.main(["evaluate", str(folder), "--images", "4", "--steps", "1", "--features", features, *more])


def test_evaluate_compares_with_the_pictures_that_it_is_given(
    tiny_folder: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluated(tiny_folder, "embedded:fashion-mnist", "--reference", str(pictures))
    found = json.loads(capsys.readouterr().out)
    assert found["fid_protocol"]["reference"].startswith("digits 32x32, 30 images")
    assert found["kid_real"] > 0
    evaluated(tiny_folder, "embedded:fashion-mnist")
    assert json.loads(capsys.readouterr().out)["kid_real"] is None


def test_evaluate_refuses_a_folder_without_pictures(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        evaluated(tiny_folder, "embedded:fashion-mnist", "--reference", str(tmp_path))
    assert ended.value.code == 2
    assert re.search("--reference: .*: got no picture", " ".join(capsys.readouterr().err.split()))


def test_evaluate_asks_for_the_pictures_that_a_network_of_others_does_not_bring_along(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("efficientnet_lite_pytorch", reason="the extra `features` is not installed")
    with pytest.raises(SystemExit) as ended:
        evaluated(tiny_folder, "efficientnet-lite0")
    assert ended.value.code == 2
    assert "--reference: got none, and efficientnet-lite0 knows no real pictures" in capsys.readouterr().err
