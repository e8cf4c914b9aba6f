"""PSNR between the deployed parts of a pipeline and full precision, for pictures and text embeddings.

The deployed parts are loaded from the files that ship. The peak of the PSNR is the range of full precision's output.

Not here: the proofs of the denoiser (proof.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pqcad_qat.export.part_export import PartsToDeploy, deployed_name, encoder_format
from pqcad_qat.export.part_parity import PartParity
from pqcad_qat.export.proof import end_to_end_psnr
from pqcad_qat.models.model_folder import DECODERS
from pqcad_qat.models.pipeline_parts import T5, VAE
from pqcad_qat.models.vae import decoded
from pqcad_qat.serving.manifest import VAE_ENCODER
from pqcad_qat.serving.part_runtime import PromptEncoder
from pqcad_qat.serving.vae_runtime import PictureDecoder, PictureEncoder, unscaled_latents

PICTURES, TEXTS = 4, 8
"""Number of latents of the calibration set that are decoded, and number of rows of seeded random tokens that are
encoded.
"""


def part_parity(deployable: PartsToDeploy, folder: Path) -> tuple[PartParity, ...]:
    """Compare every pipeline part of a deployed folder with its source.

    Raises:
        ModelError: a part cannot be loaded.
    """
    parities = []
    for part, form in deployable.formats.items():
        decodes = part in DECODERS
        psnr = _picture_psnr(deployable, folder, part) if decodes else _text_psnr(deployable, part, folder)
        parities.append(PartParity(deployed_name(part), form, _size(folder / deployed_name(part)), psnr))
    if deployable.for_genai:
        form, psnr = encoder_format(deployable.formats[VAE]), _latent_psnr(deployable, folder)
        parities.append(PartParity(VAE_ENCODER, form, _size(folder / VAE_ENCODER), psnr))
    return tuple(parities)


def _size(folder: Path) -> int:
    """Size of all files below a folder, in bytes."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@torch.no_grad()
def _latent_psnr(deployable: PartsToDeploy, folder: Path) -> float:
    """PSNR in dB of the mean latents of the pictures that the calibration set's latents decode to."""
    latents = deployable.latents[:PICTURES]
    vae: Any = deployable.source.load(VAE)
    pictures = decoded(vae, latents)
    found = PictureEncoder(folder, latents.shape[1])(pictures.numpy())
    return end_to_end_psnr(found, unscaled_latents(dict(vae.config), vae.encode(pictures).latent_dist.mode().numpy()))


def _picture_psnr(deployable: PartsToDeploy, folder: Path, part: str) -> float:
    """PSNR in dB of the decoded pictures."""
    latents = deployable.latents[:PICTURES]
    _, channels, height, width = latents.shape
    pictures = PictureDecoder(folder, (channels, height, width))(latents.numpy())
    return end_to_end_psnr(pictures, decoded(deployable.source.load(part), latents).numpy())


@torch.no_grad()
def _text_psnr(deployable: PartsToDeploy, part: str, folder: Path) -> float:
    """PSNR in dB of a text encoder's last hidden state."""
    deployed, full = PromptEncoder(folder, part), deployable.source.load(part)
    texts = _random_texts(deployed, deployable.source.class_of(part) == T5)
    mask = np.broadcast_to(np.arange(deployed.tokens) < deployed.tokens // 2 + 1, texts.shape).astype(np.int64)
    rows = [
        deployed.encoded(text[None], ["last_hidden_state"], counted[None])
        for text, counted in zip(texts, mask, strict=True)
    ]
    reference: Any = full(
        input_ids=torch.from_numpy(texts), attention_mask=torch.from_numpy(mask) if deployed.masked else None
    )
    states = np.concatenate([row["last_hidden_state"] for row in rows])
    return end_to_end_psnr(states, reference.last_hidden_state.numpy())


def _random_texts(encoder: PromptEncoder, t5: bool) -> npt.NDArray[np.int64]:
    """Random prompts (TEXTS, tokens): the empty prompt with random tokens in place of all but the first and the last.

    CLIP's words have lower numbers than its first token; T5's words are any numbers of its vocabulary.
    """
    texts = np.repeat(encoder.ids(""), TEXTS, 0)
    words = int(encoder.config["vocab_size"] if t5 else texts[0, 0])
    texts[:, 1:-1] = np.random.default_rng(0).integers(words, size=texts[:, 1:-1].shape)
    return texts
