"""Pictures that begin from a picture: those of diffusers' pipelines around the same denoiser. Several prompts, sizes,
and stopping.
"""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

import diffusers
from conditional_models import SCHEDULERS
from text_pipelines import DeployedPipeline, float_pipeline
from tiny_runs import SCHEDULER

from pqcad_qat.errors import ModelError
from pqcad_qat.models.families import latent_rows
from pqcad_qat.sampling.trajectory import initial_noise, noise_schedule
from pqcad_qat.serving.on_demand import OnDemand
from pqcad_qat.serving.picture_changes import Changes, beginning
from pqcad_qat.serving.runtime import OVUNet2DModel
from pqcad_qat.serving.text_to_image import TextToImage
from pqcad_qat.serving.transformer import OVTransformer2DModel

F32 = {"INFERENCE_PRECISION_HINT": "f32"}
SIZE = (24, 16)
ROWS, COLUMNS = np.mgrid[: SIZE[0], : SIZE[1]]
IMAGE = np.uint8(127.5 + 127.5 * np.stack([np.sin(ROWS / 3), np.cos(COLUMNS / 2), np.sin(ROWS / 5 + COLUMNS)], -1))
MASK = np.uint8(255 * (COLUMNS < 8))

CLASSES = {
    "stable-diffusion": ("StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline", OVUNet2DModel),
    "stable-diffusion-3": ("StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline", OVTransformer2DModel),
}


@pytest.fixture(scope="module", params=CLASSES)
def where(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> DeployedPipeline:
    return float_pipeline(request.param, tmp_path_factory)


@pytest.fixture(scope="module")
def ours(where: DeployedPipeline) -> TextToImage:
    return TextToImage.from_pretrained(where.folder, properties=F32)


def of_diffusers(
    where: DeployedPipeline, ours: TextToImage, monkeypatch: pytest.MonkeyPatch, *, masked: bool, **asked: Any
) -> np.ndarray:
    """Pictures (N, 3, H, W) from 0 to 255 of diffusers' pipeline, with the same latents, noise and text."""
    names = CLASSES["stable-diffusion-3" if where.source.has("text_encoder_3") else "stable-diffusion"]
    of_class = getattr(diffusers, names[masked])
    theirs = of_class.from_pretrained(where.source.folder)
    part = "transformer" if hasattr(theirs, "transformer") else "unet"
    theirs.register_modules(**{part: names[2].from_pretrained(where.folder, properties=F32)})
    theirs.set_progress_bar_config(disable=True)
    noise = torch.from_numpy(initial_noise(5, 0, 1, (4, 12, 8)))
    # the VAE's latents are their mean, the noise ours
    monkeypatch.setattr("diffusers.models.autoencoders.vae.randn_tensor", lambda shape, **_: torch.zeros(tuple(shape)))
    monkeypatch.setattr(f"{of_class.__module__}.randn_tensor", lambda *_, **__: noise)
    picture = torch.from_numpy(IMAGE.transpose(2, 0, 1)[None] / 127.5 - 1).float()
    given: dict[str, Any] = {"image": picture, "output_type": "np", "height": SIZE[0], "width": SIZE[1]}
    if masked:
        given["mask_image"] = torch.from_numpy(MASK[None, None] / 255.0).float()
    elif part == "unet":
        del given["height"], given["width"]
    if part == "transformer":
        given["max_sequence_length"] = 10
    found: Any = theirs("a cat", negative_prompt="a dog", guidance_scale=2.5, num_inference_steps=4, **given, **asked)
    return 255 * found.images.transpose(0, 3, 1, 2)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("masked", "strength"), [(False, 0.5), (False, 1.0), (True, 0.75), (True, 1.0)])
def test_it_is_the_picture_of_diffusers(
    where: DeployedPipeline, ours: TextToImage, monkeypatch: pytest.MonkeyPatch, masked: bool, strength: float
) -> None:
    if masked and where.source.has("text_encoder_3"):
        pytest.skip("diffusers' class takes latents of 16 channels alone; GenAI's pictures are compared")
    wanted = of_diffusers(where, ours, monkeypatch, masked=masked, strength=strength)
    mask = MASK if masked else None
    found = ours("a cat", "a dog", 2.5, 4, seed=5, image=IMAGE, mask=mask, strength=strength)
    assert found.shape == wanted.shape == (1, 3, *SIZE)
    assert found.std() > 10
    # text in float16 weights; INT8 values beside a rounding boundary fall to either side of it
    assert np.abs(found - wanted).mean() < 3


@pytest.mark.parametrize("flow", [False, True])
def test_outside_the_mask_the_states_are_the_pictures_own(flow: bool) -> None:
    config = SCHEDULERS["sd3"] if flow else SCHEDULER
    start, schedule = beginning(IMAGE, MASK, None, factor=2), noise_schedule(config)
    assert start is not None
    latents, noise, x = (
        np.random.default_rng(seed).standard_normal((1, 4, 12, 8)).astype(np.float32) for seed in range(3)
    )
    changes = Changes(start, latents, noise, schedule)
    for time, own in ((500.0, schedule.noised(latents, noise, 500.0)), (None, latents)):
        kept = changes.kept(x, time)
        np.testing.assert_array_equal(kept[..., :4], x[..., :4])
        np.testing.assert_allclose(kept[..., 4:], own[..., 4:], rtol=1e-6)
    assert 0.1 < np.abs(schedule.noised(latents, noise, 500.0) - latents).mean() < 1


def test_pictures_of_several_prompts_are_those_of_each_alone(ours: TextToImage) -> None:
    both = ours(["a cat", "a dog"], ["a dog", ""], 2.0, 3, seed=3, count=2)
    assert both.shape == (4, 3, 16, 16)
    alone = ours("a cat", "a dog", 2.0, 3, seed=3, count=2)
    np.testing.assert_array_equal(both[:2], alone)
    assert (both[2:] != both[:2]).any()
    with pytest.raises(ModelError, match="prompts: got 2 and 1 negative ones; allowed one or more"):
        ours(["a cat", "a dog"], ["a dog"])


def test_a_size_is_that_of_the_pictures_and_the_folders_own_stays(ours: TextToImage) -> None:
    own = ours("a cat", seed=1)
    assert ours("a cat", seed=1, size=SIZE).shape == (1, 3, *SIZE)
    np.testing.assert_array_equal(ours("a cat", seed=1), own)
    assert ours("a cat", seed=1, size=list(SIZE)).shape == (1, 3, *SIZE)  # as JSON has it


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"size": (15, 16)}, "size: got 15x16 pixels; allowed multiples of "),
        ({"size": (17, 16)}, "size: got 17x16 pixels; allowed multiples of "),  # its latents would be the folder's own
        ({"size": (0, 16)}, "size: got 0x16 pixels; allowed multiples of "),
        ({"size": (16.0, 16.0)}, r"size: got .*; allowed height and width in pixels"),
        ({"size": "16x16"}, "size: got '16x16'; allowed height and width in pixels"),
        ({"image": IMAGE, "size": [16, 16]}, "image: got 24x16 pixels; allowed 16x16, the size that is asked for"),
        ({"count": 0}, "count: got 0; allowed 1 and more pictures of each prompt"),
    ],
)
def test_what_cannot_be_made_is_refused(ours: TextToImage, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        ours("a cat", **given)


def test_flux_takes_sizes_of_whole_patches(tmp_path_factory: pytest.TempPathFactory) -> None:
    flux = TextToImage.from_pretrained(float_pipeline("flux", tmp_path_factory).folder)
    for size in ((18, 16), (2, 2)):
        with pytest.raises(ModelError, match=f"size: got {size[0]}x{size[1]} pixels; allowed multiples of 4"):
            flux("a cat", size=size)
    with pytest.raises(ModelError, match=r"samples: got shape \(1, 4, 9, 8\); allowed .* multiples of 2"):
        flux.denoiser.predict(np.zeros((1, 4, 9, 8), np.float32), 500.0, flux.embeddings("a cat"))
    assert flux("a cat", size=(20, 16)).shape == (1, 3, 20, 16)
    rows, places = np.zeros((1, 20, 16), np.float32), latent_rows.places(10, 8)
    denoiser = OVTransformer2DModel.from_pretrained(flux.denoiser.folder)
    given = {"encoder_hidden_states": flux.embeddings("a cat")["encoder_hidden_states"]}
    given |= {name: flux.embeddings("a cat")[name] for name in ("pooled_projections", "guidance")}
    named = {"timestep": np.array([0.5]), "txt_ids": latent_rows.text_places(10), **given}
    assert denoiser(rows, img_ids=places, **named).sample.shape == rows.shape
    for wrong in (places[::-1].copy(), places * np.nan, places[:, :2], places[:0]):
        with pytest.raises(ModelError, match=r"latents: got shape .* with their img_ids"):
            denoiser(rows, img_ids=wrong, **named)


def held(pipeline: TextToImage) -> set[str]:
    """The parts of a pipeline that take memory now."""
    parts = {**pipeline.encoders, "vae": pipeline.decoder, "vae_encoder": pipeline.encoder, "unet": pipeline.denoiser}
    return {name for name, part in parts.items() for each in vars(part).values() if holds(each)}


def holds(attribute: object) -> bool:
    return isinstance(attribute, OnDemand) and attribute.held


def test_parts_may_take_memory_in_turn(where: DeployedPipeline, ours: TextToImage) -> None:
    in_turn = TextToImage.from_pretrained(where.folder, properties=F32, in_turn=True)
    sampling: list[set[str]] = []
    for _ in range(2):
        assert held(in_turn) == set()
        found = in_turn("a cat", seed=2, image=IMAGE, advance=lambda _: sampling.append(held(in_turn)))
        np.testing.assert_array_equal(found, ours("a cat", seed=2, image=IMAGE))
    assert sampling
    assert all(parts == {"unet"} for parts in sampling)
    in_turn("a cat", stop=lambda: True)
    assert held(in_turn) == set()
    assert held(ours) == {*ours.encoders, "vae", "vae_encoder", "unet"}


def test_a_dropped_part_is_freed_at_once(where: DeployedPipeline) -> None:
    pipeline = TextToImage.from_pretrained(where.folder, properties=F32)
    assert pipeline.encoder is not None
    parts = [*pipeline.encoders.values(), pipeline.denoiser, pipeline.decoder, pipeline.encoder]
    gc.collect()
    gc.disable()  # what holds itself is freed when Python next looks for such cycles, which may be many pictures later
    try:
        for part in parts:
            (kept,) = [weakref.ref(each()) for each in vars(part).values() if isinstance(each, OnDemand)]
            assert kept() is not None
            part.drop()
            assert kept() is None
    finally:
        gc.enable()


def test_a_folder_that_changed_is_not_read_again(where: DeployedPipeline, tmp_path: Path) -> None:
    folder = Path(copytree(where.folder, tmp_path / "openvino"))
    in_turn = TextToImage.from_pretrained(folder, properties=F32, in_turn=True)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"comment": "another export"}))
    with pytest.raises(ModelError, match=r"got another export than was loaded; allowed the same: load it anew"):
        in_turn("a cat")


def test_it_stops_when_it_is_told_and_tells_each_step(ours: TextToImage) -> None:
    told: list[int] = []
    found = ours("a cat", steps=4, count=2, advance=told.append, stop=lambda: len(told) == 2)
    assert (found.shape, told) == ((0, 3, 16, 16), [2, 2])


def test_pictures_come_as_pils_too(ours: TextToImage) -> None:
    found = ours("a cat", steps=2)
    (image,) = ours.pil(found)
    np.testing.assert_array_equal(np.asarray(image).transpose(2, 0, 1), found[0])
    again = ours("a cat", steps=2, image=image, strength=0.5)  # and go in as such
    assert again.shape == found.shape


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mask": MASK}, "mask: got it alone; allowed beside an image"),
        ({"strength": 0.5}, "strength: got it alone; allowed beside an image"),
        ({"image": IMAGE[..., :1]}, r"image: got uint8 of shape \(24, 16, 1\); allowed uint8 of shape \(H, W, 3\)"),
        ({"image": IMAGE / 255}, "image: got float64 of shape"),
        ({"image": IMAGE[:23]}, "image: got 23x16 pixels; allowed multiples of 2"),
        ({"image": IMAGE[:0]}, r"image: got uint8 of shape \(0, 16, 3\)"),
        ({"image": [[1], [1, 2]]}, "image: got what numpy makes no array of"),
        ({"image": IMAGE, "mask": MASK[:20]}, r"mask: got shape \(20, 16\); allowed \(24, 16\), that of the image"),
        ({"image": IMAGE, "strength": 0.0}, r"strength: got 0\.0; allowed over 0 to 1"),
        ({"image": IMAGE, "strength": float("nan")}, "strength: got nan; allowed over 0 to 1"),
        ({"image": IMAGE, "strength": "0.5"}, "strength: got '0.5'; allowed over 0 to 1"),
        ({"image": IMAGE, "mask": np.ones(SIZE, np.int64)}, "mask: got int64; allowed bool, uint8, or floats"),
        ({"image": IMAGE, "mask": 255.0 * np.ones(SIZE)}, "mask: got float64; allowed bool, uint8, or floats"),
        ({"image": IMAGE, "mask": np.zeros(SIZE, bool)}, "mask: got one that is nowhere above half"),
    ],
)
def test_what_does_not_fit_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        beginning(*(given.get(name) for name in ("image", "mask", "strength")), factor=2)


def test_a_strength_of_no_step_is_refused() -> None:
    start = beginning(IMAGE, None, 0.2, factor=2)
    assert start is not None
    assert start.first_step(10, flow=False) == 8
    with pytest.raises(ModelError, match=r"strength: got 0\.2, none of 4 steps; allowed 1/4 and more"):
        start.first_step(4, flow=False)
    assert start.first_step(4, flow=True) == 3  # diffusers' pipelines of flow matching round up


def test_a_folder_without_an_encoder_says_so(tmp_path_factory: pytest.TempPathFactory) -> None:
    pixart = TextToImage.from_pretrained(float_pipeline("pixart", tmp_path_factory).folder)
    with pytest.raises(ModelError, match="image: got one; allowed with a folder that holds vae_encoder"):
        pixart("a cat", image=np.zeros((16, 16, 3), np.uint8))
    with pytest.raises(ModelError, match="size: got 24x24 pixels; allowed 16x16, the folder's own"):
        pixart("a cat", size=(24, 24))
