"""A whole run of a text-to-image pipeline by a policy that ships, from prompts to a folder that takes prompts; and what
the commands make of it.

Not here: what the parts compute (test_part_export.py), and other conditional models (test_conditional_runs.py).
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_runs import POLICIES, TINY, without_page

from pqcad_qat.policy.variants import FP32, PQCAD_OPENVINO, PTQ

pytest.importorskip("transformers")

import torch
from clip_folder import clip_folder
from rich.console import Console
from safetensors.torch import load_file
from shipped_runs import GUIDANCE, ShippedRun, shipped_run
from text_pipelines import T5_TOKENS, TOKENS, WIDTH
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from pqcad_qat import cli
from pqcad_qat.commands.run import run
from pqcad_qat.errors import ModelError, PolicyError
from pqcad_qat.models.model_loading import load_model
from pqcad_qat.models.pipeline_parts import VAE, pipeline_parts
from pqcad_qat.models.prompts import read_prompts
from pqcad_qat.policy.loading import dump_policy, load_policy
from pqcad_qat.policy.schema import Policy
from pqcad_qat.quality.clip_score import clip_digest
from pqcad_qat.serving.deployed_folder import read_manifest
from pqcad_qat.serving.text_to_image import TextToImage
from pqcad_qat.stages.kept_images import decoder_of

SHORT = (
    "progressive.steps=2",
    "distillation.steps=2",
    "calibration.refinement=1",
    "evaluation.images=4",
    "export.latency_runs=1",
)


def policy_of(folder: Path, *more: str) -> Policy:
    """Of the pipeline in the folder, guided, with the prompts there."""
    source = [f"model.source={folder / 'pipeline'}", f"conditions.prompts={folder / 'prompts.txt'}"]
    variants = ["evaluation.features=none", f"evaluation.variants=[{PQCAD_OPENVINO}]", "sampler.guidance_scale=3.0"]
    return load_policy(POLICIES / "smoke.yaml", [*TINY, *SHORT, *source, *variants, *more])


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> ShippedRun:
    """Guided in two passes, by its student too."""
    return shipped_run("w8a8-sd15", tmp_path_factory)


@pytest.fixture(scope="module")
def made(shipped: ShippedRun) -> Path:
    return shipped.path


def test_the_folder_of_a_run_holds_the_whole_pipeline_and_takes_prompts(made: Path) -> None:
    manifest = read_manifest(made / "openvino")
    assert manifest["parts"] == {
        "vae_decoder": {"class": "AutoencoderKL", "format": "float"},
        "vae_encoder": {"class": "AutoencoderKL", "format": "float"},
        "text_encoder": {"class": "CLIPTextModel", "format": "int8-weights"},
    }
    scheduler = json.loads((made / "openvino" / "scheduler" / "scheduler_config.json").read_text())
    assert (scheduler["_class_name"], scheduler["num_inference_steps"], scheduler["guidance_scale"]) == (
        "DDIMScheduler",
        2,
        3.0,
    )
    pipeline = TextToImage.from_pretrained(made)
    assert (pipeline.steps, pipeline.guidance) == (2, 3.0)
    assert pipeline("a cat").shape == (1, 3, 16, 16)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_a_run_of_flux_ends_in_a_folder_that_takes_prompts_through_t5(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """By the policy that ships, of a FLUX.1 dev: its guidance is an input, and the folder knows which it was trained
    with.
    """
    made = shipped_run("w8a8-flux", tmp_path_factory)
    assert {name: part["format"] for name, part in read_manifest(made.path / "openvino")["parts"].items()} == {
        "vae_decoder": "float",
        "vae_encoder": "float",
        "text_encoder": "int8-weights",
        "text_encoder_2": "int8-weights",
    }
    assert all(row["psnr"] > 30 for row in made.report["parts"])
    pipeline = TextToImage.from_pretrained(made.path)
    told = pipeline.embeddings("a cat")
    assert (pipeline.steps, pipeline.guidance, float(told["guidance"][0])) == (2, 1.0, GUIDANCE)
    assert told["encoder_hidden_states"].shape == (1, T5_TOKENS, WIDTH)
    cli.main(["sample", str(made.path), "--prompt", "a cat", "--out", str(tmp_path / "cat.png")])
    with Image.open(tmp_path / "cat.png") as picture:
        assert picture.size == (96, 96)


def test_a_report_says_how_near_the_other_parts_are_and_how_large(made: Path) -> None:
    rows = json.loads((made / "report.json").read_text())["parts"]
    assert [(row["part"], row["format"]) for row in rows] == [
        ("vae_decoder", "float"),
        ("text_encoder", "int8-weights"),
        ("vae_encoder", "float"),
    ]
    for row in rows:
        files = (made / "openvino" / row["part"]).iterdir()
        assert row["size_bytes"] == sum(file.stat().st_size for file in files)
        assert 30 < row["psnr"] < 100
    page = (made / "report.html").read_text()
    assert "Other parts of the deployed pipeline" in page
    assert f"{rows[1]['psnr']:.1f}" in page


def test_the_denoisers_row_is_of_the_denoiser_alone(made: Path) -> None:
    rows = {row["name"]: row for row in json.loads((made / "report.json").read_text())["variants"]}
    files = read_manifest(made / "openvino")["files"]
    parts = sum(entry["bytes"] for name, entry in files.items() if name.startswith(("vae", "text", "token")))
    assert rows[PQCAD_OPENVINO]["size_bytes"] < sum(entry["bytes"] for entry in files.values()) - parts + 200_000
    assert parts > 0


def test_a_report_shows_pictures_that_the_full_precision_vae_decodes(made: Path) -> None:
    report = json.loads((made / "report.json").read_text())
    assert "pictures are decoded by the full-precision VAE" in report["quality_note"]
    model = load_model(str(made.parents[1] / "pipeline"))
    decode = decoder_of(model)
    assert decode is not None
    for name in (FP32, PQCAD_OPENVINO):
        found = load_file(made / "samples" / f"{name}.safetensors")
        wanted = (decode(found["latents"].numpy()).clip(-1, 1) + 1) * 127.5
        assert found["pictures"].shape == (4, 3, 16, 16)
        assert np.abs(found["pictures"].numpy() - wanted).max() <= 1


def test_embeddings_are_kept_beside_the_run_and_in_it(shipped: ShippedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    made, prompts = shipped.path, shipped.policy.conditions.prompts
    assert prompts is not None
    tensors = load_file(made / "conditions.safetensors")
    assert tensors["encoder_hidden_states"].shape == (len(read_prompts(Path(prompts))), TOKENS, WIDTH)
    kept = list((made.parent / ".shared").glob("*/embeddings.safetensors"))
    assert len(kept) == 1
    again = shutil.copytree(made, made.with_name("again"), symlinks=True)
    monkeypatch.setattr("pqcad_qat.models.prompts.encode_prompts", None)  # nothing is encoded again
    with without_page():
        run(shipped.policy, again, "command", Console(quiet=True), resume=True)


def test_latents_of_a_run_are_sampled_as_pictures_or_as_they_are(made: Path, tmp_path: Path) -> None:
    pictures, latents, source = tmp_path / "grid.png", tmp_path / "latents.safetensors", made.parents[1] / "pipeline"
    for folder, out in ((made, pictures), (made / "openvino", latents)):
        cli.main(
            [
                "sample",
                str(folder),
                "--count",
                "4",
                "--out",
                str(out),
                "--conditions",
                str(made / "conditions.safetensors"),
            ]
        )
    with Image.open(pictures) as grid:
        assert grid.size == (2 * 6 * 16 + 6, 2 * 6 * 16 + 6)  # two by two, enlarged sixfold
    assert load_file(latents)["latents"].shape == (4, 4, 8, 8)
    cli.main(["sample", str(made), "--count", "1", "--out", str(tmp_path / "one.png")])  # of the run's own conditions
    given = ["--conditions", str(made / "conditions.safetensors"), "--steps", "2", "--guidance", "1"]
    cli.main(["sample", str(source), "--count", "1", "--out", str(tmp_path / "full.png"), *given])
    with Image.open(tmp_path / "full.png") as full:
        assert full.size == (96, 96)


def test_a_student_without_a_vae_makes_latents(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--conditions", str(made / "conditions.safetensors"), "--out", str(tmp_path / "grid.png")]
    with pytest.raises(SystemExit):
        cli.main(["sample", str(made / "student"), "--count", "1", *given])
    assert "makes latents, and has no VAE" in " ".join(capsys.readouterr().err.split())


MISTAKES = {
    "an output that is no picture": (
        ["--prompt", "a cat", "--out", "x.safetensors"],
        "allowed a name in .png, for a prompt makes pictures",
    ),
    "two conditions": (
        ["--prompt", "a cat", "--conditions", "all"],
        "--conditions: got a second condition; allowed none beside --prompt",
    ),
    "a negative prompt alone": (["--negative", "a dog"], "--negative: got it alone; allowed beside --prompt"),
    "a size alone": (["--size", "16"], "--size: got it alone; allowed beside --prompt"),
    "guidance under 1": (["--prompt", "a cat", "--guidance", "0.5"], "--guidance: got 0.5; allowed a number from 1"),
}


@pytest.mark.parametrize("name", list(MISTAKES))
def test_mistakes_with_prompts_say_what_is_allowed(made: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, fault = MISTAKES[name]
    with pytest.raises(SystemExit) as end:
        cli.main(["sample", str(made), *arguments])
    assert end.value.code == 2
    assert fault in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        (
            "pipeline.text_encoder=float",
            r"pipeline\.text_encoder: got float; allowed auto or none: .* has no text_encoder",
        ),
        ("pipeline.vae=int8", r"pipeline\.vae: got int8; allowed auto or none: .* has no vae"),
    ],
)
def test_parts_that_are_not_there_end_a_run_before_anything_is_made(
    made: Path, tmp_path: Path, override: str, fault: str
) -> None:
    for part in ("unet", "scheduler"):
        shutil.copytree(made.parents[1] / "pipeline" / part, tmp_path / "pipeline" / part)
    embeddings = ["conditions.prompts=null", f"conditions.embeddings={made / 'conditions.safetensors'}"]
    policy = policy_of(tmp_path, *embeddings, override)
    with pytest.raises(ModelError, match=fault):
        run(policy, tmp_path / "runs" / "tiny", "command", Console(quiet=True))
    assert not (tmp_path / "runs").exists()


@pytest.fixture(scope="module")
def scored(made: Path) -> Path:
    """A run of the same pipeline without training, with two prompts, scored by a CLIP model that lies beside the
    pipeline.
    """
    (made.parents[1] / "prompts.txt").write_text("a cat\ntwo dogs\n")
    clip = f"evaluation.clip={clip_folder(made.parents[1])}"
    policy = policy_of(made.parents[1], f"evaluation.variants=[{PTQ}]", clip)
    return run(policy, made.with_name("scored"), "command", Console(quiet=True)).parent


def test_a_clip_model_scores_every_variants_pictures_against_their_prompts(scored: Path) -> None:
    report = json.loads((scored / "report.json").read_text())
    folder = scored.parents[1] / "clip"
    model, tokenizer = CLIPModel.from_pretrained(folder).eval(), CLIPTokenizer.from_pretrained(folder)
    for row in report["variants"]:
        pictures = load_file(scored / "samples" / f"{row['name']}.safetensors")["pictures"]
        pixels = CLIPImageProcessorPil.from_pretrained(folder)(images=list(pictures), return_tensors="pt")
        # image k is made for a prompt that its seed and k choose
        chosen = [int(np.random.default_rng((1234, image, 1)).integers(2)) for image in range(4)]
        tokens = tokenizer(["a cat", "two dogs"], padding=True, return_tensors="pt")
        with torch.no_grad():
            result = model(**tokens, **pixels)
        cosines = result.logits_per_image[range(4), chosen] / model.logit_scale.exp()
        scores = (100 * cosines).clamp(min=0)
        assert row["clip_score"] == pytest.approx(float(scores.mean()), abs=1e-3)
        assert row["clip_score_error"] == pytest.approx(float(scores.std()) / 2, abs=1e-3)
        assert row["psnr_fp"] is None or row["psnr_fp"] > 0
    assert report["clip"] == f"clip, sha256 {clip_digest(folder)}"
    page = (scored / "report.html").read_text()
    assert f"<dd>clip, sha256 {clip_digest(folder)}</dd>" in page
    assert f"{row['clip_score']:.2f}±{row['clip_score_error']:.2f}" in page


def test_another_clip_model_repeats_the_evaluation_alone(scored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(scored.parents[1] / "clip", scored.parents[1] / "other")
    (scored.parents[1] / "other" / "notes.txt").write_text("another folder")
    clip = f"evaluation.clip={scored.parents[1] / 'other'}"
    policy = policy_of(scored.parents[1], f"evaluation.variants=[{PTQ}]", clip)
    (scored.parents[1] / "policy.yaml").write_text(dump_policy(policy))
    cli.main(["run", str(scored.parents[1] / "policy.yaml"), "--out", str(scored), "--resume", "--dry-run"])
    output = " ".join(capsys.readouterr().out.split())
    assert re.search(r"\b1 of \d+ stages to do", output)


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        (["conditions.prompts=null"], r"evaluation\.clip: got '.*clip'; allowed null, as no prompts are given"),
        (
            ["evaluation.clip=nowhere"],
            r"evaluation\.clip: .*nowhere/config\.json: got no such file; allowed the",
        ),
        (
            ["pipeline.vae=none", "model.source={alone}"],
            r"evaluation\.clip: got '.*clip'; .* has no decoder; allowed",
        ),
    ],
)
def test_a_clip_model_without_use_is_told_before_anything_is_made(
    scored: Path, tmp_path: Path, overrides: list[str], fault: str
) -> None:
    alone = tmp_path / "pipeline"
    shutil.copytree(scored.parents[1] / "pipeline", alone)
    shutil.rmtree(alone / "vae")
    index = json.loads((alone / "model_index.json").read_text())
    (alone / "model_index.json").write_text(json.dumps({**index, "vae": [None, None]}))
    settings = [f"evaluation.clip={scored.parents[1] / 'clip'}", *(each.format(alone=alone) for each in overrides)]
    with pytest.raises((ModelError, PolicyError), match=fault):
        run(policy_of(scored.parents[1], *settings), tmp_path / "runs" / "tiny", "command", Console(quiet=True))
    assert not (tmp_path / "runs" / "tiny").exists()


def test_a_pipelines_vae_is_read_where_its_index_names_one(made: Path) -> None:
    parts = pipeline_parts(made.parents[1] / "pipeline")
    assert parts is not None
    assert parts.has(VAE)
    assert not parts.has("safety_checker")
