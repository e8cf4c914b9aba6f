"""The command `sample`: images from a folder as a grid, also from a prompt; or latents as a safetensors file.

Not here: how a folder is opened (open_folder.py) and sampled (stages/samplers.py, serving/text_to_image.py). Sampling
from a prompt needs no PyTorch, so this file imports PyTorch only where it is used.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from rich.console import Console

from pqcad_qat.data.upright import upright
from pqcad_qat.errors import UsageError
from pqcad_qat.machine.progress import progress_bar
from pqcad_qat.report.grid import save_grid

PICTURES, LATENTS = ".png", ".safetensors"
"""Suffixes of the files for pictures and for latents."""

BATCH = 64
"""Largest number of images sampled together."""


@dataclass(frozen=True)
class Sampled:
    """Result of the command.

    Attributes:
        file: file that it was written to.
        text: one line on the content of the file.
        warnings: warnings about the prompt, such as words that no text encoder reads.
    """

    file: Path
    text: str
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class SampleRequest:
    """Request of the command.

    Attributes:
        folder: a run, a deployed folder, a quantized student, or a full-precision diffusers folder.
        count: number of images; None for 64, or for 1 if there is a prompt.
        seed: seed of their noise.
        steps: number of sampling steps; None for the number that the folder was made for.
        out: PNG file, or a safetensors file for latents.
        conditions: conditions of a conditional model, in the form that `opened.opened_folder` takes.
        guidance: scale of classifier-free guidance; None for the one that the folder was made for.
        prompt: what the image shows, for a folder that holds a whole text-to-image pipeline.
        negative: what the image does not show.
        size: height and width in pixels, of an image from a prompt.
        image: file of a picture that the prompt changes.
        mask: file of a picture that is bright where the image is painted anew.
        strength: share of the sampling steps that change the image.
        solver: name of another sampler than the folder's own.
    """

    folder: str
    count: int | None
    seed: int
    steps: int | None
    out: Path
    conditions: str | None = None
    guidance: float | None = None
    prompt: str | None = None
    negative: str | None = None
    size: tuple[int, int] | None = None
    image: Path | None = None
    mask: Path | None = None
    strength: float | None = None
    solver: str | None = None


def sample(request: SampleRequest, console: Console) -> Sampled:
    """Make what the request asks for and write it to its file.

    Raises:
        UsageError: the kind of file is not supported, or options contradict each other.
        ModelError, PolicyError: as for `opened.opened_folder`, or the folder has no pipeline for a prompt.
    """
    if request.out.suffix.lower() not in (PICTURES, LATENTS):
        raise UsageError(f"--out: got {str(request.out)!r}; allowed a name in .png, or of latents in .safetensors")
    of_prompts = ("negative", "size", "image", "mask", "strength", "solver")
    alone = [name for name in of_prompts if getattr(request, name) is not None]
    if request.prompt is None and alone:
        raise UsageError(f"--{alone[0]}: got it alone; allowed beside --prompt")
    if request.prompt is None:
        return _of_choices(request, console)
    if request.conditions is not None:
        raise UsageError("--conditions: got a second condition; allowed none beside --prompt")
    return _of_prompt(request, request.prompt, console)


def _of_prompt(request: SampleRequest, prompt: str, console: Console) -> Sampled:
    """Make pictures from a prompt, without PyTorch."""
    from pqcad_qat.serving.text_to_image import TextToImage

    out, count, guidance = request.out, request.count or 1, request.guidance
    if out.suffix.lower() != PICTURES:
        raise UsageError(f"--out: got {str(out)!r}; allowed a name in .png, for a prompt makes pictures")
    image = None if request.image is None else _pixels("image", request.image, "RGB")
    mask = None if request.mask is None else _pixels("mask", request.mask, "L")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)
        pipeline = TextToImage.from_pretrained(request.folder)
        walked = request.steps or pipeline.steps
        with progress_bar(console) as bar:
            task = bar.add_task("sample", total=walked, note=prompt)
            pictures = pipeline(
                prompt,
                request.negative,
                guidance,
                request.steps,
                seed=request.seed,
                count=count,
                size=request.size,
                image=image,
                mask=mask,
                strength=request.strength,
                solver=request.solver,
                advance=lambda _: bar.advance(task),
            )
    save_grid(pictures, out)
    scale = pipeline.guidance if guidance is None else guidance
    by = "" if request.solver is None else f" of {request.solver}"
    text = f"{count} images of {prompt!r}, {walked} steps{by}, guidance {scale:g}, openvino"
    return Sampled(out, text, tuple(str(warning.message) for warning in caught))


def _pixels(flag: str, file: Path, mode: str) -> npt.NDArray[np.uint8]:
    """The pixels of a picture's file, upright, in a mode of PIL.

    Raises:
        UsageError: it is no picture.
    """
    try:
        with Image.open(file) as opened:
            return np.asarray(upright(opened).convert(mode), np.uint8)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        why = "which does not exist" if not file.is_file() else f"which is no picture: {error}"
        raise UsageError(f"--{flag}: got {file}, {why}; allowed a picture, such as a PNG") from error


def _of_choices(request: SampleRequest, console: Console) -> Sampled:
    """Make images or latents under the conditions of the folder's policy, or under those of the request."""
    import torch
    from safetensors.torch import save_file

    from pqcad_qat.commands.open_folder import opened_folder
    from pqcad_qat.data.images import to_uint8
    from pqcad_qat.stages.samplers import sample_states

    out, count = request.out, request.count or 64
    variant = opened_folder(request.folder, request.steps, request.conditions, request.guidance)
    allowed = [PICTURES] * (not variant.latent or variant.decode is not None) + [LATENTS] * variant.latent
    if out.suffix.lower() not in allowed:
        makes = "images" if not variant.latent else "latents" if variant.decode else "latents, and has no VAE"
        raise UsageError(
            f"--out: got {str(out)!r}; allowed a name in {' or '.join(allowed)}, for {request.folder} makes {makes}"
        )
    with progress_bar(console) as bar:
        task = bar.add_task("sample", total=count * variant.steps, note=variant.runtime)
        states = sample_states(variant, count, request.seed, min(count, BATCH), advance=partial(bar.advance, task))
    if out.suffix.lower() == LATENTS:
        save_file({"latents": states.contiguous()}, out)
    else:
        pictures = states if variant.decode is None else torch.from_numpy(variant.decode(states.numpy()))
        save_grid(to_uint8(pictures).numpy(), out)
    kind = "latents" if out.suffix.lower() == LATENTS else "images"
    return Sampled(out, f"{count} {kind}, {variant.steps} steps, {variant.runtime}")
