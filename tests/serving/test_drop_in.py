"""The deployed model where diffusers expects a UNet2DModel: its pipelines and schedulers give the images of the same
model in PyTorch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from deployed_fixture import BATCH, SHAPE, Quantized, deployed_unet
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline
from tiny_runs import SCHEDULER, tiny_unet

from pqcad_qat.errors import ModelError
from pqcad_qat.serving.runtime import OVUNet2DModel

TOLERANCE = 0.05
"""Largest difference of images in [0, 1] between OpenVINO and the quantized PyTorch model: inputs next to a rounding
boundary fall to either side of it, which no two orders of summation decide alike."""

NEAR_DB = 40.0
"""PSNR between the two; the same network in full precision is at 29."""


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Quantized:
    return deployed_unet(tmp_path_factory).quantized


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return deployed_unet(tmp_path_factory).packed


@pytest.fixture(scope="module")
def deployed(folder: Path) -> OVUNet2DModel:
    return OVUNet2DModel.from_pretrained(folder, properties={"INFERENCE_PRECISION_HINT": "f32"})


def in_pipeline(pipeline: str, scheduler: str, steps: int = 5, **more: Any) -> Callable[[Any], np.ndarray]:
    """Images (B, H, W, C) in [0, 1] of a diffusers pipeline."""

    def sample(unet: Any) -> np.ndarray:
        made = getattr(diffusers, pipeline)(
            unet=unet, scheduler=getattr(diffusers, scheduler).from_config({**SCHEDULER, **more})
        )
        made.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(1)
        images: np.ndarray = made(
            batch_size=BATCH, num_inference_steps=steps, generator=generator, output_type="np"
        ).images
        return images

    return sample


def in_loop(scheduler: str, steps: int = 5, **more: Any) -> Callable[[Any], np.ndarray]:
    """The same of diffusers' own denoising loop, which scales the inputs of samplers over sigma as no unconditional
    pipeline does.
    """

    @torch.no_grad()
    def sample(unet: Any) -> np.ndarray:
        made = getattr(diffusers, scheduler).from_config({**SCHEDULER, **more})
        made.set_timesteps(steps)
        x = torch.randn(BATCH, *SHAPE, generator=torch.Generator().manual_seed(1)) * made.init_noise_sigma
        generator = (
            {"generator": torch.Generator().manual_seed(2)}
            if "generator" in inspect.signature(made.step).parameters
            else {}
        )
        for t in made.timesteps:
            x = made.step(unet(made.scale_model_input(x, t), t).sample, t, x, **generator).prev_sample
        images: np.ndarray = (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
        return images

    return sample


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    return float(-10 * np.log10(np.mean((one - other) ** 2)))


@pytest.mark.parametrize(
    "sample",
    [
        in_pipeline("DDIMPipeline", "DDIMScheduler"),
        in_pipeline("DDIMPipeline", "DDIMScheduler", timestep_spacing="leading"),
        in_pipeline("DDPMPipeline", "DDPMScheduler"),
        in_pipeline("DDPMPipeline", "DPMSolverMultistepScheduler"),
        in_pipeline("DDPMPipeline", "DPMSolverMultistepScheduler", timestep_spacing="linspace"),
        in_pipeline("PNDMPipeline", "PNDMScheduler", skip_prk_steps=True),
        in_loop("EulerDiscreteScheduler"),
        in_loop("EulerAncestralDiscreteScheduler", timestep_spacing="leading"),
        in_loop("LMSDiscreteScheduler"),
        in_loop("UniPCMultistepScheduler"),
        in_loop("DEISMultistepScheduler"),
    ],
    ids=[
        "ddim",
        "ddim-leading",
        "ddpm",
        "dpm",
        "dpm-linspace",
        "pndm",
        "euler",
        "euler-ancestral",
        "lms",
        "unipc",
        "deis",
    ],
)
def test_with_any_scheduler_the_images_are_those_of_the_quantized_model(
    quantized: Quantized, deployed: OVUNet2DModel, sample: Callable[[Any], np.ndarray]
) -> None:
    images, expected = sample(deployed), sample(quantized.model)
    assert expected.std() > 0.1
    np.testing.assert_allclose(images, expected, atol=TOLERANCE, rtol=0)
    assert psnr(images, expected) > NEAR_DB


def test_full_precision_lies_outside_that_tolerance(quantized: Quantized) -> None:
    torch.manual_seed(0)
    sample = in_pipeline("DDIMPipeline", "DDIMScheduler")
    assert psnr(sample(tiny_unet().eval()), sample(quantized.model)) < NEAR_DB - 5


@pytest.mark.parametrize("more", [{"timestep_spacing": "linspace"}, {"use_karras_sigmas": True}])
def test_fractional_time_steps_are_refused_with_what_to_change(deployed: OVUNet2DModel, more: dict[str, Any]) -> None:
    with pytest.raises(
        ModelError,
        match=r"time steps: got .*; allowed whole numbers in \[0, 1000\); .*leading or trailing, and without Karras",
    ):
        in_loop("EulerDiscreteScheduler", **more)(deployed)


def test_a_pipeline_loads_from_the_folder_alone(folder: Path, deployed: OVUNet2DModel) -> None:
    pipeline = DDIMPipeline.from_pretrained(folder)
    assert isinstance(pipeline.unet, OVUNet2DModel)
    assert pipeline.unet.folder == folder
    assert isinstance(pipeline.scheduler, DDIMScheduler)
    given = DDPMPipeline.from_pretrained(folder, unet=deployed)
    assert given.unet is deployed
    assert pipeline.to("cpu").unet is pipeline.unet


def test_it_loads_from_the_unet_part_of_its_folder(folder: Path) -> None:
    assert OVUNet2DModel.from_pretrained(folder / "unet").folder == folder


def test_it_is_called_as_a_unet2dmodel_is(quantized: Quantized, deployed: OVUNet2DModel) -> None:
    x, t = quantized.states, torch.tensor(500)
    (expected,) = deployed(x, t, None, False)
    output: Any = deployed(x, t)
    for read in (output.sample, output[0], output["sample"], *output.to_tuple(), deployed(sample=x, timestep=t).sample):
        assert torch.equal(read, expected)
    with pytest.raises(ModelError, match="got class_labels; allowed none: the model has no classes: leave them out"):
        deployed(x, t, torch.zeros(BATCH))


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16])
def test_time_steps_may_be_floats_that_are_whole(
    deployed: OVUNet2DModel, quantized: Quantized, kind: torch.dtype
) -> None:
    expected = deployed(quantized.states, 500).sample
    assert torch.equal(deployed(quantized.states, torch.tensor(500, dtype=kind)).sample, expected)


def test_it_answers_what_users_ask_of_a_module(deployed: OVUNet2DModel) -> None:
    assert deployed.eval() is deployed
    assert not deployed.training
    assert deployed.requires_grad_(False) is deployed
    for same in (
        deployed.to("cpu"),
        deployed.to(torch.device("cpu"), torch.float32),
        deployed.to(device="cpu", dtype=torch.float32),
    ):
        assert same is deployed
    for other in ("cuda", torch.float16, torch.device("meta")):
        with pytest.raises(ModelError, match=r"to: got .*; allowed cpu and float32: it runs on CPU"):
            deployed.to(other)
    for refused in (deployed.half, deployed.cuda, deployed.double, deployed.bfloat16):
        with pytest.raises(ModelError, match="; allowed cpu and float32"):
            refused()
    assert deployed.cpu() is deployed.float() is deployed.train(False) is deployed
    for refused in (deployed.requires_grad_, deployed.train):
        with pytest.raises(ModelError, match="no gradients"):
            refused()
    with pytest.raises(ModelError, match=r"allowed save_pretrained\(FOLDER\), which writes the folder"):
        deployed.state_dict()
    with pytest.raises(ModelError, match="got a request for 'set_attn_processor'; allowed what one compiled graph has"):
        deployed.set_attn_processor(None)
    assert not hasattr(deployed, "set_attn_processor")
    assert repr(deployed) == f"OVUNet2DModel({str(deployed.folder)!r})"
