"""The command `sample`: images of a folder as a grid, of a prompt too; or latents as a safetensors file.

Not here: how a folder is opened (opened.py) and sampled (stages/samplers.py, serving/text_to_image.py). What is made
of a prompt needs no PyTorch, so nothing here imports it before it is used.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console

from pqcad_qat.errors import UsageError
from pqcad_qat.machine.progress import progress_bar
from pqcad_qat.report.grid import save_grid

PICTURES, LATENTS = ".png", ".safetensors"
BATCH = 64


@dataclass(frozen=True)
class Sampled:
    """What was made.

    Attributes:
        file: that it was written to.
        text: what it holds, in a line.
        warnings: about the prompt, such as words that no encoder reads.
    """

    file: Path
    text: str
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class SampleRequest:
    """What is to be made.

    Attributes:
        folder: a run, a deployed folder, a quantized student, or a full-precision diffusers folder.
        count: number of images; None: 64, or 1 of a prompt.
        seed: of their noise.
        steps: sampling steps; None: those the folder was made for.
        out: PNG file, or a safetensors file of latents.
        conditions: of a conditional model, as `opened.opened_folder` takes them.
        guidance: scale of classifier-free guidance; None: what the folder was made for.
        prompt: what is to be seen, of a folder that holds a whole text-to-image pipeline.
        negative: what is not to be seen.
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


def sample(request: SampleRequest, console: Console) -> Sampled:
    """Make what is asked for and write it to its file.

    Raises:
        UsageError: a file of a kind that is not made here, or options that do not go together.
        ModelError, PolicyError: as `opened.opened_folder`; a folder without a pipeline for a prompt.
    """
    if request.out.suffix.lower() not in (PICTURES, LATENTS):
        raise UsageError(f"--out: got {str(request.out)!r}; allowed a name in .png, or of latents in .safetensors")
    if request.prompt is None and request.negative is not None:
        raise UsageError("--negative: got it alone; allowed beside --prompt")
    if request.prompt is None:
        return _of_choices(request, console)
    if request.conditions is not None:
        raise UsageError("--conditions: got a second condition; allowed none beside --prompt")
    return _of_prompt(request, request.prompt, console)


def _of_prompt(request: SampleRequest, prompt: str, console: Console) -> Sampled:
    """Pictures of a prompt, without PyTorch."""
    from pqcad_qat.serving.text_to_image import TextToImage

    out, count, guidance = request.out, request.count or 1, request.guidance
    if out.suffix.lower() != PICTURES:
        raise UsageError(f"--out: got {str(out)!r}; allowed a name in .png, for a prompt makes pictures")
    with warnings.catch_warnings(record=True) as told:
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
                advance=lambda _: bar.advance(task),
            )
    save_grid(pictures, out)
    scale = pipeline.guidance if guidance is None else guidance
    text = f"{count} images of {prompt!r}, {walked} steps, guidance {scale:g}, openvino"
    return Sampled(out, text, tuple(str(warning.message) for warning in told))


def _of_choices(request: SampleRequest, console: Console) -> Sampled:
    """Images or latents of what the folder's policy says, or of the choices that are given."""
    import torch
    from safetensors.torch import save_file

    from pqcad_qat.commands.opened import opened_folder
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
