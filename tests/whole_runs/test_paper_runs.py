"""The study of the paper's protocols on tiny models of the same layouts, from folders and pictures to its table.

Not here: the policies at full size (tests/policy/test_paper_policies.py).
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import LDMPipeline
from paper_models import FACTOR, SIDE, ddpm, latent_diffusion
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from tiny_runs import POLICIES, without_trials

from pqcad_qat.commands.evaluate import evaluate
from pqcad_qat.commands.sweep import STUDY_PAGE, sweep
from pqcad_qat.data.images import image_set, pictures_digest
from pqcad_qat.policy.study_cells import load_study
from pqcad_qat.policy.variants import (
    FIXED_BIT,
    FP32,
    FP32_HALF,
    OV_BF16,
    PQ,
    PQ_DISTILLED,
    PQ_HALF,
    PQCAD,
    PQCAD_OPENVINO,
)
from pqcad_qat.quality.feature_network import FeatureConfig, FeatureNetwork, save_features
from pqcad_qat.timing.hardware import hardware

pytestmark = pytest.mark.long

PIXELS = FACTOR * SIDE
TINY = (
    "sampler.steps=4",
    "distillation.student_steps=2",
    "calibration.trajectories=4",
    "calibration.batch_size=4",
    "progressive.steps=2",
    "distillation.steps=2",
    "training.batch_size=4",
    "training.learning_rate=0.0001",
    "training.gradient_accumulation=1",
    "training.precision=fp32",
    "evaluation.images=6",
    "evaluation.batch_size=4",
    "export.latency_runs=1",
)
MODELS = {"ddpm-cifar10-32": lambda folder: ddpm(folder, PIXELS), "ldm-celebahq-256": latent_diffusion}
"""One policy for each layout, with what makes a stand-in of its model."""


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the study, whose policies say nothing but where the stand-ins are. The paper's table has no row of
    NNCF.
    """
    root = tmp_path_factory.mktemp("paper")
    torch.manual_seed(0)
    dice = np.random.default_rng(0)
    pictures = dice.integers(0, 256, (12, 3, PIXELS, PIXELS), dtype=np.uint8)
    network = FeatureNetwork(FeatureConfig(channels=3, size=PIXELS, classes=2, widths=(8, 4), strides=(2, 2))).eval()
    save_features(root / "features", network, image_set(pictures, None, "noise"), {})
    (root / "pictures").mkdir()
    for index, picture in enumerate(pictures):
        Image.fromarray(picture.transpose(1, 2, 0)).save(root / "pictures" / f"{index:02}.png")
    for name, make in MODELS.items():
        make(root / "models" / name)
        keys = (
            f"extends: {POLICIES / 'paper' / name}.yaml",
            f"name: {name}",
            f"model: {{source: models/{name}}}",
            "evaluation: {features: features, reference: pictures}",
        )
        (root / f"{name}.yaml").write_text("\n".join(keys))
    text = (POLICIES / "studies" / "paper.yaml").read_text()
    head = text[: text.index("  - ")]
    (root / "study.yaml").write_text(head + "".join(f"  - {name}.yaml\n" for name in MODELS))
    with without_trials(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("pqcad_qat.timing.latency.usable_cores", lambda: 1)
        sweep(load_study(root / "study.yaml", TINY), root / "runs", "command", Console(quiet=True))
    return root / "runs"


def rows_of(swept: Path, name: str) -> dict[str, dict[str, float]]:
    report = json.loads((swept / f"{name}-seed0" / "report.json").read_text())
    return {row["name"]: row for row in report["variants"]}


@pytest.mark.parametrize("name", MODELS)
def test_the_table_has_the_papers_rows_with_distance_steps_time_and_size(swept: Path, name: str) -> None:
    comparison = json.loads((swept / STUDY_PAGE).with_suffix(".json").read_text())
    (part,) = [part for part in comparison["parts"] if part["model"].endswith(name)]
    steps = {FP32: 4, FP32_HALF: 2, OV_BF16: 4, FIXED_BIT: 4, PQ: 4, PQ_HALF: 2, PQ_DISTILLED: 2, PQCAD: 2}
    found = {row["variant"]: row for row in part["rows"] if not row["did_not_run"]}
    made = {**steps, PQCAD_OPENVINO: 2}
    if hardware().native_bf16 is False:
        del made[OV_BF16]
    assert {row: found[row]["steps"] for row in found} == made
    for variant, row in found.items():
        assert ("fid_real" in row["figures"]) == (variant != OV_BF16)
        assert {"latency_ms_per_image", "size_bytes"} <= row["figures"].keys() or variant not in (FP32, PQCAD_OPENVINO)
    page = (swept / STUDY_PAGE).with_suffix(".md").read_text()
    (heading,) = {line for line in page.splitlines() if "ms an image" in line}
    assert all(f"| {column} |" in heading for column in ("variant", "steps", "FD to real", "ms an image", "MB"))


def test_latents_are_compared_by_the_pictures_that_diffusers_decodes(swept: Path) -> None:
    run = swept / "ldm-celebahq-256-seed0"
    report = json.loads((run / "report.json").read_text())
    assert "all figures are of the pictures that the full-precision VAE decodes" in report["quality_note"]
    pipeline = LDMPipeline.from_pretrained(swept.parent / "models" / "ldm-celebahq-256")
    for name in (FP32, PQCAD_OPENVINO):
        found = load_file(run / "samples" / f"{name}.safetensors")
        with torch.no_grad():
            wanted = (pipeline.vqvae.decode(found["latents"]).sample.clamp(-1, 1) + 1) * 127.5
        assert found["pictures"].shape == (6, 3, PIXELS, PIXELS)
        assert (found["pictures"].float() - wanted).abs().max() <= 1
        assert np.isfinite(rows_of(swept, "ldm-celebahq-256")[name]["fid_real"])


def test_a_run_of_latents_is_evaluated_again_by_what_its_deployed_folder_decodes(swept: Path) -> None:
    run = swept / "ldm-celebahq-256-seed0"
    given = {"steps": None, "features": None, "reference": None, "conditions": None, "guidance": None}
    found = evaluate(str(run), images=6, seed=1234, console=Console(quiet=True), **given)
    wanted = rows_of(swept, "ldm-celebahq-256")[PQCAD_OPENVINO]
    # the deployed decoder rounds to 16 bits, and a latent between two vectors of the codebook may take the other one
    assert found.figures.fid_real == pytest.approx(wanted["fid_real"], rel=0.3)
    assert found.fid_protocol.reference == f"pictures {PIXELS}x{PIXELS}, 12 images, sha256 " + pictures_digest(
        swept.parent / "pictures"
    )


def test_the_deployed_folder_of_latents_decodes_too(swept: Path) -> None:
    folder = swept / "ldm-celebahq-256-seed0" / "openvino"
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "LDMPipeline"
    assert json.loads((folder / "vae_decoder" / "config.json").read_text())["scaling_factor"] == 1.0
    assert json.loads((folder / "manifest.json").read_text())["parts"] == {
        "vae_decoder": {"class": "VQModel", "format": "float"}
    }
