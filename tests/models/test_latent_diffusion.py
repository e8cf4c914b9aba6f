"""Unconditional latent models with a vector-quantized decoder: what diffusers' LDMPipeline makes of them, we make too.

Not here: their deployed folders (test_part_export.py), and runs of them (test_paper_runs.py).
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import LDMPipeline
from paper_models import FACTOR, SIDE, latent_diffusion

from pqcad_qat.errors import ModelError
from pqcad_qat.models.denoiser import predict
from pqcad_qat.models.model_loading import load_model
from pqcad_qat.models.part_fit import check_decoder, picture_shape
from pqcad_qat.models.pipeline_parts import VQ, PipelineParts, pipeline_parts
from pqcad_qat.models.vae import decoded
from pqcad_qat.sampling.trajectory import noise_schedule, trajectory
from pqcad_qat.stages.kept_images import decoder_of

STEPS = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose latents are scaled."""
    return latent_diffusion(tmp_path_factory.mktemp("ldm") / "model", scaling_factor=0.7)


def parts_of(folder: Path) -> PipelineParts:
    parts = pipeline_parts(folder)
    assert parts is not None
    return parts


def changed(folder: Path, **values: object) -> None:
    file = folder / "vqvae" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@torch.no_grad()
def test_pictures_are_those_of_diffusers_pipeline(folder: Path) -> None:
    pipeline = LDMPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    wanted = pipeline(
        2, generator=torch.Generator().manual_seed(3), num_inference_steps=STEPS, output_type="np"
    ).images  # (N, H, W, 3), in [0, 1]
    model = load_model(str(folder))
    assert model.latent
    x = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(3))
    schedule = noise_schedule(model.scheduler_config)
    for step in trajectory(partial(predict, model.denoiser), x, schedule, STEPS):
        x = step.x_s
    decode = decoder_of(model)
    assert decode is not None
    found = (decode(x.numpy()) / 2 + 0.5).clip(0, 1).transpose(0, 2, 3, 1)
    assert np.ptp(wanted) > 0.5
    np.testing.assert_allclose(found, wanted, atol=1e-4)


@torch.no_grad()
def test_latents_are_not_scaled_where_the_config_names_no_factor(tmp_path: Path) -> None:
    model = parts_of(latent_diffusion(tmp_path)).load(VQ)
    latents = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(decoded(model, latents), model.decode(latents).sample)


def test_pictures_are_larger_by_the_decoders_levels(folder: Path) -> None:
    assert picture_shape(parts_of(folder), (3, SIDE, SIDE)) == (3, FACTOR * SIDE, FACTOR * SIDE)
    assert picture_shape(None, (3, SIDE, SIDE)) is None


@pytest.mark.parametrize("key", ["latent_channels", "vq_embed_dim"])
def test_latents_of_other_channels_than_the_denoisers_are_refused(key: str, tmp_path: Path) -> None:
    changed(latent_diffusion(tmp_path), **{key: 4})
    with pytest.raises(ModelError, match=r"vqvae/config\.json: latent_channels: got 4; allowed 3, as its denoiser has"):
        check_decoder(parts_of(tmp_path), 3)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_vq_embeddings", 0, r"num_vq_embeddings: got 0; allowed a whole number from 1"),
        ("block_out_channels", "many", r"block_out_channels: got 'many'; allowed a list"),
        ("out_channels", 1, r"out_channels: got 1; allowed 3: pictures"),
    ],
)
def test_a_config_that_no_such_decoder_has_is_refused(key: str, value: object, message: str, tmp_path: Path) -> None:
    changed(latent_diffusion(tmp_path), **{key: value})
    with pytest.raises(ModelError, match=r"vqvae/config\.json: " + message):
        parts_of(tmp_path).check(VQ)


def test_weights_of_the_decoder_are_checked(tmp_path: Path) -> None:
    (latent_diffusion(tmp_path) / "vqvae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"vqvae/.*: got no such file; allowed weights in safetensors, or pipeline"):
        parts_of(tmp_path).check_weights(VQ)
