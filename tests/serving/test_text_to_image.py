"""Prompts of a deployed folder: the pictures of diffusers' own pipeline, without PyTorch; and what a folder must hold
for them.
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from tiny_runs import REPOSITORY, environment

pytest.importorskip("transformers")

import diffusers
import serving
from diffusers.schedulers import scheduling_lcm
from text_pipelines import SCALE, T5_TOKENS, TOKENS, DeployedPipeline, float_pipeline
from torch import Tensor

from pqcad_qat import cli
from pqcad_qat.errors import ModelError
from pqcad_qat.machine.files import file_digest
from pqcad_qat.models.families.latent_rows import packed
from pqcad_qat.report.grid import save_grid
from pqcad_qat.sampling.precision_by_time import StepsInFloat
from pqcad_qat.sampling.trajectory import initial_noise, later_noise, noise_schedule
from pqcad_qat.serving.deployed_folder import MANIFEST, MODEL_INDEX, read_manifest
from pqcad_qat.serving.runtime import OVUNet2DModel
from pqcad_qat.serving.text_to_image import TextToImage
from pqcad_qat.serving.transformer import OVTransformer2DModel

F32 = {"INFERENCE_PRECISION_HINT": "f32"}
LONG = "a cat, a dog, and a cat on a dog"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> DeployedPipeline:
    return float_pipeline("stable-diffusion", tmp_path_factory)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> DeployedPipeline:
    return float_pipeline("stable-diffusion-xl", tmp_path_factory)


@pytest.fixture(scope="module")
def ours(plain: DeployedPipeline) -> TextToImage:
    return TextToImage.from_pretrained(plain.folder, properties=F32)


@pytest.fixture(scope="module")
def ours_large(large: DeployedPipeline) -> TextToImage:
    return TextToImage.from_pretrained(large.folder, properties=F32)


def pipeline_of(where: DeployedPipeline) -> Any:
    """diffusers' own pipeline of the source, with DDIM as the deployed folder has it."""
    name = json.loads((where.source.folder / MODEL_INDEX).read_text())["_class_name"]
    found = getattr(diffusers, name).from_pretrained(where.source.folder)
    found.set_progress_bar_config(disable=True)
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("prompt", "negative", "scale"), [("a cat", None, SCALE), (LONG, "two dogs", 2.0), ("", None, 1.0)]
)
def test_a_prompt_gives_the_picture_of_diffusers_around_the_same_denoiser(
    plain: DeployedPipeline, ours: TextToImage, prompt: str, negative: str | None, scale: float
) -> None:
    """From embeddings that differ as float16 weights do the denoiser's roundings part, so its picture is compared from
    the same ones.
    """
    texts = [ours.embeddings(text)["encoder_hidden_states"] for text in (prompt, negative or "")]
    for text, of_diffusers in zip(texts, encoded(plain, prompt, negative), strict=True):
        np.testing.assert_allclose(text, of_diffusers.numpy(), atol=5e-3)
    theirs = pipeline_of(plain)
    theirs.register_modules(unet=OVUNet2DModel.from_pretrained(plain.folder, properties=F32))
    given = {
        name: torch.from_numpy(text)
        for name, text in zip(("prompt_embeds", "negative_prompt_embeds"), texts, strict=True)
    }
    latents = torch.from_numpy(initial_noise(5, 0, 1, (4, 8, 8)))
    wanted = theirs(
        latents=latents, num_inference_steps=3, guidance_scale=scale, output_type="np", **given
    ).images.transpose(0, 3, 1, 2)
    found = ours(prompt, negative, scale, seed=5)
    assert found.shape == (1, 3, 16, 16)
    assert found.std() > 10
    # of 255: half a one is the rounding to bytes, and the decoder's weights are in float16
    assert np.abs(found - 255 * wanted).max() < 1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("solver", "name"),
    [
        ("euler", "EulerDiscreteScheduler"),
        ("dpm++2m", "DPMSolverMultistepScheduler"),
        ("unipc", "UniPCMultistepScheduler"),
        ("lcm", "LCMScheduler"),
    ],
)
def test_another_solver_gives_the_picture_of_diffusers(
    plain: DeployedPipeline, ours: TextToImage, solver: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = itertools.count(1)
    added = lambda *_, **__: torch.from_numpy(later_noise(5, next(steps), 1, (4, 8, 8)))  # noqa: E731
    monkeypatch.setattr(scheduling_lcm, "randn_tensor", added)
    theirs = pipeline_of(plain)
    theirs.register_modules(unet=OVUNet2DModel.from_pretrained(plain.folder, properties=F32))
    theirs.scheduler = getattr(diffusers, name).from_config(theirs.scheduler.config)
    text = torch.from_numpy(ours.embeddings("a cat")["encoder_hidden_states"])
    latents = torch.from_numpy(initial_noise(5, 0, 1, (4, 8, 8)))
    given = {"prompt_embeds": text, "latents": latents, "guidance_scale": 1.0, "num_inference_steps": 4}
    wanted = 255 * theirs(output_type="np", **given).images.transpose(0, 3, 1, 2)
    found = ours("a cat", None, 1.0, 4, seed=5, solver=solver)
    # INT8 values beside a rounding boundary fall to either side of it
    assert np.abs(found - wanted).mean() < 2
    if solver != "euler":  # which is DDIM where sampling begins with noise alone
        assert np.abs(found.astype(float) - ours("a cat", None, 1.0, 4, seed=5)).mean() > 2


@torch.no_grad()
def encoded(where: DeployedPipeline, prompt: str, negative: str | None) -> tuple[Tensor, ...]:
    found: tuple[Tensor, ...] = pipeline_of(where).encode_prompt(
        prompt, negative_prompt=negative, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True
    )
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("negative", [None, "", "a dog"])
def test_two_encoders_give_the_embeddings_of_diffusers(
    large: DeployedPipeline, ours_large: TextToImage, negative: str | None
) -> None:
    states, other_states, pooled, other_pooled = encoded(large, LONG, negative)
    found = ours_large.embeddings(LONG)
    other = ours_large._unconditional(found, [negative], (8, 8), 1)
    for name, one, two in (("encoder_hidden_states", states, other_states), ("text_embeds", pooled, other_pooled)):
        np.testing.assert_allclose(found[name], one.numpy(), atol=5e-3, err_msg=name)
        np.testing.assert_allclose(other[name], two.numpy(), atol=5e-3, err_msg=name)
    assert found["time_ids"].tolist() == other["time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]]
    assert other["text_embeds"].any() != (negative is None)
    assert ours_large("a cat", negative).std() > 10


WITH_T5 = {
    "stable-diffusion-3": {"max_sequence_length": T5_TOKENS, "height": 16, "width": 16},
    "flux": {"max_sequence_length": T5_TOKENS, "height": 16, "width": 16, "guidance_scale": 3.5},
    "pixart": {"max_sequence_length": T5_TOKENS, "use_resolution_binning": False},
}
"""What diffusers' pipelines with T5 are asked besides."""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", list(WITH_T5))
def test_a_pipeline_with_t5_gives_the_picture_of_diffusers_around_the_same_denoiser(
    kind: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    where = float_pipeline(kind, tmp_path_factory)
    ours, theirs = TextToImage.from_pretrained(where.folder, properties=F32), pipeline_of(where)
    kept = (OVUNet2DModel if kind == "pixart" else OVTransformer2DModel).from_pretrained(where.folder, properties=F32)
    theirs.register_modules(
        transformer=kept, scheduler=type(theirs.scheduler).from_pretrained(where.folder, subfolder="scheduler")
    )
    noise = initial_noise(5, 0, 1, (4, 8, 8))
    for prompt, negative, scale in ((LONG, "two dogs", 2.0), ("A cat", None, 1.0)):
        guided = {"true_cfg_scale" if kind == "flux" else "guidance_scale": scale, "negative_prompt": negative or ""}
        asked = {**guided, **WITH_T5[kind], "latents": torch.from_numpy(packed(noise) if kind == "flux" else noise)}
        wanted = theirs(prompt, num_inference_steps=3, output_type="np", **asked).images.transpose(0, 3, 1, 2)
        found = ours(prompt, negative, scale, seed=5)
        assert found.shape == (1, 3, 16, 16)
        assert found.std() > 10
        off = np.abs(found - 255 * wanted)
        # of 255: weights of the parts are in float16, and a value may be rounded to either side of a boundary
        assert off.mean() < 1
        assert off.max() < 12


@pytest.mark.filterwarnings("ignore")
def test_stable_diffusion_3_without_t5_makes_pictures_with_zeros_for_it(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    where = float_pipeline("stable-diffusion-3", tmp_path_factory)
    parts = {part: entry for part, entry in read_manifest(where.folder)["parts"].items() if part != "text_encoder_3"}
    full = TextToImage.from_pretrained(where.folder, properties=F32)
    less = TextToImage.from_pretrained(changed(where.folder, tmp_path / "it", MANIFEST, parts=parts), properties=F32)
    with_it, without = (pipeline.embeddings("a cat") for pipeline in (full, less))
    np.testing.assert_array_equal(with_it["pooled_projections"], without["pooled_projections"])
    np.testing.assert_array_equal(
        with_it["encoder_hidden_states"][:, :TOKENS], without["encoder_hidden_states"][:, :TOKENS]
    )
    assert with_it["encoder_hidden_states"][:, TOKENS:].any()
    assert not without["encoder_hidden_states"][:, TOKENS:].any()
    assert less("a cat").std() > 10


@pytest.mark.parametrize(
    "kind", ["stable-diffusion", "stable-diffusion-xl", "stable-diffusion-3", "flux", "pixart", "dit"]
)
def test_a_pipeline_of_the_source_takes_the_deployed_model_and_is_told_its_steps(
    kind: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    where = float_pipeline(kind, tmp_path_factory)
    part = "transformer" if (where.folder / "transformer").is_dir() else "unet"
    name = json.loads((where.source.folder / MODEL_INDEX).read_text())["_class_name"]
    ours = (OVTransformer2DModel if kind in ("stable-diffusion-3", "flux") else OVUNet2DModel).from_pretrained(
        where.folder, properties=F32
    )
    made = getattr(diffusers, name).from_pretrained(where.source.folder, **{part: ours})
    assert getattr(made, part) is ours
    made.set_progress_bar_config(disable=True)
    asked = (
        {"class_labels": [1], "guidance_scale": 1.0} if kind == "dit" else {"prompt": "a cat", **WITH_T5.get(kind, {})}
    )
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        made(**asked, num_inference_steps=3, output_type="np")
        assert not [warning for warning in told if "called at time" in str(warning.message)]
        made(**asked, num_inference_steps=7, output_type="np")
        made(**asked, num_inference_steps=7, output_type="np")
    (warning,) = [str(warning.message) for warning in told if "called at time" in str(warning.message)]
    assert "it has 3 steps. Write num_inference_steps=3 in the pipeline's call" in warning
    with pytest.raises(ModelError, match="to: got torch"):
        made.to(torch.float16)


@pytest.mark.parametrize("kind", ["stable-diffusion", "flux"])
def test_sixteen_threads_on_one_pipeline_get_the_pictures_of_one(
    kind: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    pipeline = TextToImage.from_pretrained(float_pipeline(kind, tmp_path_factory).folder)
    words = ("a cat", "a dog", "dogs and a cat", "")

    def picture(seed: int) -> np.ndarray:
        return pipeline(words[seed % 4], guidance=(1.0, 3.0)[seed % 2], seed=seed, count=1 + seed % 3)

    alone = [picture(seed) for seed in range(16)]
    with ThreadPoolExecutor(16) as pool:
        for together, one in zip(pool.map(picture, range(16)), alone, strict=True):
            np.testing.assert_array_equal(together, one)


def test_prompts_are_cut_and_filled_as_the_pipelines_own_tokenizer_does(
    large: DeployedPipeline, ours_large: TextToImage
) -> None:
    pipeline, full = ours_large, pipeline_of(large)
    for encoder, tokenizer in zip(pipeline.encoders.values(), (full.tokenizer, full.tokenizer_2), strict=True):
        for prompt in ("", "A Cat!", "ein Hündchen  läuft", LONG):
            wanted = tokenizer(prompt, padding="max_length", max_length=TOKENS, truncation=True).input_ids
            assert encoder.ids(prompt)[0].tolist() == wanted
    # they fill up with other tokens
    assert len({encoder.ids("")[0, -1] for encoder in pipeline.encoders.values()}) == 2


def test_a_picture_of_a_seed_is_the_same_in_any_count(ours: TextToImage) -> None:
    steps: list[int] = []
    three = ours("a cat", count=3, seed=2, steps=4, advance=steps.append)
    one = ours("a cat", count=1, seed=2, steps=4)
    assert np.abs(three[:1].astype(int) - one).max() <= 1
    assert (three[0] != three[1]).any()
    assert steps == [3] * 4


@pytest.mark.parametrize("kind", ["stable-diffusion", "flux"])
def test_the_command_writes_a_picture_without_pytorch(
    kind: str, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    folder = float_pipeline(kind, tmp_path_factory).folder
    absent = "('torch', 'diffusers', 'transformers', 'nncf', 'brevitas', 'accelerate')"
    script = (
        f"import sys; sys.modules.update(dict.fromkeys({absent})); from pqcad_qat.cli import main; main(sys.argv[1:])"
    )
    asked = [
        "sample",
        str(folder),
        "--prompt",
        "a cat",
        "--negative",
        "a dog",
        "--guidance",
        "2",
        "--out",
        str(tmp_path / "cat.png"),
    ]
    done = subprocess.run(
        [sys.executable, "-c", script, *asked], env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "1 images of 'a cat', 3 steps, guidance 2, openvino" in done.stdout
    with Image.open(tmp_path / "cat.png") as picture:
        assert (picture.width, picture.height, picture.mode) == (96, 96, "RGB")


def test_the_command_changes_a_picture_by_a_prompt(plain: DeployedPipeline, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(255, size=(24, 16, 3), dtype=np.uint8)
    mask = np.uint8(255 * (np.mgrid[:24, :16][1] < 8))
    lying = Image.Exif()
    lying[ExifTags.Base.Orientation] = 6  # the camera was turned: a viewer turns the picture clockwise
    Image.fromarray(np.rot90(pixels).copy()).save(tmp_path / "image.png", exif=lying)
    Image.fromarray(mask).save(tmp_path / "mask.png")
    files = ["--image", str(tmp_path / "image.png"), "--mask", str(tmp_path / "mask.png"), "--strength", "0.7"]
    asked = ["sample", str(plain.folder), "--prompt", "a cat", "--guidance", "1", "--seed", "3", "--size", "24,16"]
    cli.main([*asked, *files, "--solver", "dpm++2m", "--out", str(tmp_path / "found.png")])
    wanted = TextToImage.from_pretrained(plain.folder)(
        "a cat", None, 1.0, seed=3, image=pixels, mask=mask, strength=0.7, solver="dpm++2m"
    )
    save_grid(wanted, tmp_path / "wanted.png")
    assert (tmp_path / "found.png").read_bytes() == (tmp_path / "wanted.png").read_bytes()
    assert wanted.shape == (1, 3, 24, 16)


FILES = {
    "no file": ("absent.png", r"--image: got .*absent\.png, which does not exist; allowed a picture, such as a PNG"),
    "no picture": ("text.png", r"--image: got .*text\.png, which is no picture: .*; allowed a picture"),
}


@pytest.mark.parametrize("name", list(FILES))
def test_a_file_that_is_no_picture_is_refused(
    name: str, plain: DeployedPipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, fault = FILES[name]
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(SystemExit) as end:
        cli.main(["sample", str(plain.folder), "--prompt", "a cat", "--image", str(tmp_path / file)])
    assert end.value.code == 2
    assert re.search(fault, " ".join(capsys.readouterr().err.split()))


def test_the_readmes_program_makes_pictures_without_pytorch(plain: DeployedPipeline, tmp_path: Path) -> None:
    shutil.copytree(plain.folder, tmp_path / "text" / "openvino")
    np.save(
        tmp_path / "text.npy",
        TextToImage.from_pretrained(plain.folder)("a lighthouse at dusk", "people", 5.0, seed=3, count=2),
    )
    absent = f"import sys; sys.modules.update(dict.fromkeys({serving.ABSENT!r})); "
    program = absent + "import runpy; runpy.run_path('tests/support/serving.py', run_name='__main__')"
    command = [sys.executable, "-c", program, str(tmp_path), "prompt"]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "prompt: 2 images" in done.stdout


# ---- what a prompt cannot do without
# ---------------------------------------------------------------------------------------------


def changed(source: Path, folder: Path, name: str, **changes: Any) -> Path:
    """A copy of a deployed folder with a JSON file changed, its digest noted."""
    shutil.copytree(source, folder)
    for path, changing in ((folder / name, changes), (folder / MANIFEST, {})):
        content = json.loads(path.read_text()) | changing
        if path.name == MANIFEST and name != MANIFEST:
            content["files"][name] = {"bytes": (folder / name).stat().st_size, "sha256": file_digest(folder / name)}
        path.write_text(json.dumps(content))
    return folder


def test_a_folder_of_another_pipeline_takes_no_prompt(plain: DeployedPipeline, tmp_path: Path) -> None:
    folder = changed(plain.folder, tmp_path / "it", MODEL_INDEX, _class_name="DiTPipeline")
    with pytest.raises(
        ModelError, match=r"_class_name: got .DiTPipeline.; allowed for a prompt StableDiffusionPipeline"
    ):
        TextToImage.from_pretrained(folder)


def test_a_folder_without_its_text_encoder_takes_no_prompt(plain: DeployedPipeline, tmp_path: Path) -> None:
    folder = changed(plain.folder, tmp_path / "it", MANIFEST, parts={})
    with pytest.raises(ModelError, match=r"got no text_encoder, vae_decoder; .*exported with them"):
        TextToImage.from_pretrained(folder)


def test_without_the_library_of_tokenizers_it_is_named(
    plain: DeployedPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pqcad_qat.serving.part_runtime.find_spec", lambda _: None)
    with pytest.raises(
        ModelError, match=r"got no library tokenizers to read it; allowed once .*: pip install tokenizers"
    ):
        TextToImage.from_pretrained(plain.folder)


def test_a_padding_token_that_is_no_word_is_refused(plain: DeployedPipeline, tmp_path: Path) -> None:
    folder = changed(plain.folder, tmp_path / "it", "tokenizer/tokenizer_config.json", pad_token="nothing")
    with pytest.raises(ModelError, match=r"pad_token: got 'nothing'; allowed a token of the vocabulary"):
        TextToImage.from_pretrained(folder)


def test_a_negative_prompt_takes_guidance(ours: TextToImage) -> None:
    with pytest.raises(ModelError, match="guidance: got a scale of 1, at which there is no pass"):
        ours("a cat", "a dog", 1.0)


def test_float_steps_are_taken_in_parts_where_nothing_is_guided(
    ours: TextToImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they were measured; another number of steps has no such step."""
    (t, s), *_ = noise_schedule(ours.denoiser.scheduler_config).walk(ours.steps)
    in_float, taken = StepsInFloat(t, ((int(t), int(t + s) // 2, int(s)),)), list[StepsInFloat]()

    def predicted(x_t: Any, _t: float, _condition: Any, *, in_float: StepsInFloat) -> Any:
        taken.append(in_float)
        return np.zeros_like(x_t)

    monkeypatch.setattr(ours.denoiser, "in_float", in_float)
    monkeypatch.setattr(ours.denoiser, "predict", predicted)
    for guidance, steps in ((1.0, ours.steps), (SCALE, ours.steps), (1.0, 2 * ours.steps)):
        ours("a cat", guidance=guidance, steps=steps)
    assert list(dict.fromkeys(taken)) == [in_float, StepsInFloat(t)]
    assert taken.count(in_float) == ours.steps
