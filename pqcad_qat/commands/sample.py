"""The command `sample`: images of a folder as a grid, of a prompt too; or latents as a safetensors file.

Not here: how a folder is opened (opened.py) and sampled (stages/samplers.py, serving/text_to_image.py). What is made
of a prompt needs no PyTorch, so nothing here imports it before it is used.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
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


def sample_prompt(
    folder: str,
    prompt: str,
    *,
    negative: str | None,
    count: int,
    seed: int,
    steps: int | None,
    guidance: float | None,
    out: Path,
    console: Console,
) -> Sampled:
    """Pictures of a prompt, without PyTorch.

    Args:
        folder: a run or deployed folder that holds a whole text-to-image pipeline.
        steps: sampling steps; by default those the folder was made for.
        guidance: likewise.

    Raises:
        UsageError: a file of another kind than pictures.
        ModelError: a folder without such a pipeline.
    """
    from pqcad_qat.serving.text_to_image import TextToImage

    if out.suffix.lower() != PICTURES:
        raise UsageError(f"--out: got {str(out)!r}; allowed a name in .png, for a prompt makes pictures")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)
        pipeline = TextToImage.from_pretrained(folder)
        walked = steps or pipeline.steps
        with progress_bar(console) as bar:
            task = bar.add_task("sample", total=walked, note=prompt)
            pictures = pipeline(
                prompt, negative, guidance, steps, seed=seed, count=count, advance=lambda _: bar.advance(task)
            )
    save_grid(pictures, out)
    scale = pipeline.guidance if guidance is None else guidance
    text = f"{count} images of {prompt!r}, {walked} steps, guidance {scale:g}, openvino"
    return Sampled(out, text, tuple(str(warning.message) for warning in told))


def sample(
    folder: str,
    *,
    count: int,
    seed: int,
    steps: int | None,
    conditions: str | None,
    guidance: float | None,
    out: Path,
    console: Console,
) -> Sampled:
    """Images or latents of what the folder's policy says, or of the choices that are given.

    Args:
        folder, steps, conditions, guidance: as `opened.opened_folder`.

    Raises:
        UsageError: a file of a kind that the folder's model does not make.
        ModelError, PolicyError: as `opened.opened_folder`.
    """
    import torch
    from safetensors.torch import save_file

    from pqcad_qat.commands.opened import opened_folder
    from pqcad_qat.data.images import to_uint8
    from pqcad_qat.stages.samplers import sample_states

    variant = opened_folder(folder, steps, conditions, guidance)
    allowed = [PICTURES] * (not variant.latent or variant.decode is not None) + [LATENTS] * variant.latent
    if out.suffix.lower() not in allowed:
        makes = "images" if not variant.latent else "latents" if variant.decode else "latents, and has no VAE"
        raise UsageError(
            f"--out: got {str(out)!r}; allowed a name in {' or '.join(allowed)}, for {folder} makes {makes}"
        )
    with progress_bar(console) as bar:
        task = bar.add_task("sample", total=count * variant.steps, note=variant.runtime)
        states = sample_states(
            variant, count, seed, min(count, BATCH), advance=lambda done: bar.update(task, advance=done)
        )
    if out.suffix.lower() == LATENTS:
        save_file({"latents": states.contiguous()}, out)
    else:
        pictures = states if variant.decode is None else torch.from_numpy(variant.decode(states.numpy()))
        save_grid(to_uint8(pictures).numpy(), out)
    kind = "latents" if out.suffix.lower() == LATENTS else "images"
    return Sampled(out, f"{count} {kind}, {variant.steps} steps, {variant.runtime}")
