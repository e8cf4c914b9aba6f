"""Encoding of prompts into the conditions of a text-conditional model, by the text encoders in its pipeline's folder.

Not here: what is done with conditions (conditions.py). This file needs the library transformers, which the extra `text`
installs.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from torch import Tensor

from pqcad_qat.errors import ModelError
from pqcad_qat.machine.content_store import shared_folder
from pqcad_qat.machine.json_files import read_json
from pqcad_qat.machine.tensor_files import save_tensors
from pqcad_qat.models.config_values import with_defaults
from pqcad_qat.models.families.config_faults import sides_of
from pqcad_qat.models.families.family import TEXT_ENCODERS
from pqcad_qat.models.families.prompt_layouts import PromptLayout
from pqcad_qat.models.families.table import prompt_layouts
from pqcad_qat.models.model_folder import CONFIG, INDEX, TOKENIZERS, denoiser_folder, read_index
from pqcad_qat.models.pipeline_parts import PipelineParts, check_tokenizer, check_transformers
from pqcad_qat.models.prompt_cuts import LENGTH, cut_prompts

ENCODING_ARGUMENTS: Mapping[str, Any] = {
    "prompt_2": None,
    "prompt_3": None,
    "device": "cpu",
    "num_images_per_prompt": 1,
    "do_classifier_free_guidance": True,
}
"""Arguments of `encode_prompt`, as far as a pipeline's own version has them. Every encoder gets the same prompt, and
the empty prompt is encoded as well.
"""

HEAVY = ("unet", "transformer", "vae", "safety_checker", "feature_extractor", "image_encoder")
"""Pipeline parts that are not needed to encode prompts, and so are not loaded."""

LEVELS = range(4)
"""Stand-in for the levels of a missing VAE. Each level but the first halves an image's sides."""

BATCH = 16
"""Number of prompts encoded at a time."""

UNCONDITIONAL = "unconditional."
"""Prefix of the names of tensors for the unconditional pass of classifier-free guidance."""

EMBEDDINGS = "embeddings.safetensors"
"""Name of the file that holds the embeddings of encoded prompts."""


@dataclass(frozen=True)
class Encoding:
    """Settings of prompt encoding, where a pipeline leaves a choice.

    Attributes:
        tokens: number of tokens that T5's prompts are padded or cut to; None for the default of the pipeline's
            `encode_prompt`.
        guidance: guidance value for a denoiser that takes it as an input (FLUX.1 dev); None for the pipeline's own.
        sides: height and width of x_t; None for those of the denoiser's config.
    """

    tokens: int | None = None
    guidance: float | None = None
    sides: tuple[int, int] | None = None


OWN_WAY = Encoding()
"""Settings that leave every choice to the pipeline."""


def stored_embeddings(prompts: Path, folder: Path, store: Path, encoding: Encoding = OWN_WAY) -> Path:
    """Return the file of embeddings of these prompts, encoded on the first call and read back from the store
    afterwards.

    Args:
        prompts, folder, encoding: as for `encode_prompts`.
        store: folder of the content store. The file's place in it is the hash of the prompts, pipeline class, encoders,
            tokenizers, sizes and number of tokens.

    Raises:
        ModelError: as for `encode_prompts`.
    """
    lines, (pipeline, layout) = read_prompts(prompts), _layout(folder)
    decides = {
        "prompts": lines,
        "pipeline": pipeline,
        "encoders": PipelineParts(folder, {}).digest(*TEXT_ENCODERS, *TOKENIZERS),
        "sizes": {name: value.tolist() for name, value in _numbers(folder, 1, layout, encoding).items()},
        "tokens": encoding.tokens,
    }

    def make(draft: Path) -> None:
        save_tensors(encode_prompts(prompts, folder, encoding), draft / EMBEDDINGS)

    return shared_folder(store, decides, make) / EMBEDDINGS


def check_prompts(prompts: Path, folder: Path, encoding: Encoding = OWN_WAY) -> set[str]:
    """Return the names of the tensors that `encode_prompts` would make, without those of the unconditional pass.
    Nothing is encoded.

    Raises:
        ModelError: as for `encode_prompts`, as far as configs show it.
    """
    read_prompts(prompts)
    check_transformers("conditions.prompts")
    pipeline, layout = _layout(folder)
    _arguments(getattr(diffusers, pipeline), pipeline, encoding)  # for the fault that it may raise
    names = (*layout.gives, *_numbers(folder, 1, layout, encoding))
    return {name for name in names if name and not name.startswith(UNCONDITIONAL)}


@torch.no_grad()
def encode_prompts(prompts: Path, folder: Path, encoding: Encoding = OWN_WAY) -> dict[str, Tensor]:
    """Return the tensors of an embeddings file (conditions.py): those of every prompt, and those of the empty prompt as
    the unconditional ones.

    Args:
        prompts: file with one prompt per line; empty lines are skipped.
        folder: a local pipeline's folder, with its text encoders (safetensors) and tokenizers.
        encoding: settings where the pipeline leaves a choice.

    Raises:
        ModelError: transformers is not installed, the file holds no prompts, the pipeline's class is unknown or has no
            text encoders, or it does not offer the chosen setting.
    """
    lines = read_prompts(prompts)
    check_transformers("conditions.prompts")
    name, layout = _layout(folder)
    names = layout.gives
    numbers = _numbers(folder, len(lines), layout, encoding)
    pipeline = _text_pipeline(name, layout, folder)
    arguments = _arguments(pipeline, name, encoding)
    batches = [lines[first : first + BATCH] for first in range(0, len(lines), BATCH)]
    encoded = [dict(zip(names, pipeline.encode_prompt(batch, **arguments), strict=True)) for batch in batches]
    tensors = {name: torch.cat([batch[name] for batch in encoded]).float() for name in names if name}
    # Pipelines with classifier-free guidance return the empty prompt's embeddings with every batch, so one row is kept.
    # For others the empty prompt is encoded as a prompt of its own.
    tensors |= {name: value[:1] for name, value in tensors.items() if name.startswith(UNCONDITIONAL)}
    if not any(name.startswith(UNCONDITIONAL) for name in names):
        empty = dict(zip(names, pipeline.encode_prompt([""], **arguments), strict=True))
        tensors |= {UNCONDITIONAL + name: value.float() for name, value in empty.items() if name}
    return tensors | numbers


def _arguments(pipeline: Any, name: str, encoding: Encoding) -> dict[str, Any]:
    """Return the keyword arguments for the `encode_prompt` of a pipeline or of its class."""
    known = inspect.signature(pipeline.encode_prompt).parameters
    arguments = {key: value for key, value in ENCODING_ARGUMENTS.items() if key in known}
    if encoding.tokens is None:
        return arguments
    if LENGTH not in known:
        raise ModelError(
            f"conditions.tokens: got {encoding.tokens}; allowed null: {name} has no T5, and CLIP's texts "
            "are of one length"
        )
    return arguments | {LENGTH: encoding.tokens}


def too_long_prompts(prompts: Path, folder: Path, tokens: int | None) -> tuple[str, ...]:
    """Return a sentence for each prompt of the file that a tokenizer cuts (prompt_cuts.py); () where the folder is no
    pipeline's.
    """
    return cut_prompts(_numbered(prompts), prompts, folder, tokens) if (folder / INDEX).is_file() else ()


def read_prompts(prompts: Path) -> list[str]:
    """Return the prompts of a file, without empty lines."""
    return [prompt for _, prompt in _numbered(prompts)]


def _numbered(prompts: Path) -> list[tuple[int, str]]:
    """Return pairs (line number, prompt) of the file, without a leading byte-order mark."""
    try:
        text = prompts.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        place = f"line {line}: no UTF-8"
        raise ModelError(
            f"conditions.prompts: got {prompts}, which cannot be read as text ({place}); allowed a prompt a line"
        ) from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ModelError(
            f"conditions.prompts: got {prompts}, which cannot be read as text ({reason}); allowed a prompt a line"
        ) from error
    lines = [(place, line.strip()) for place, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise ModelError(f"conditions.prompts: got no prompt in {prompts}; allowed one or more, a line each")
    return lines


def _layout(folder: Path) -> tuple[str, PromptLayout]:
    """Return the class of the folder's pipeline, and how it turns a prompt into conditions."""
    index = folder / INDEX
    if not index.is_file():
        raise ModelError(
            f"conditions.prompts: got a model at {folder}, which is no pipeline's folder with a text encoder; "
            "allowed null, with a file as conditions.embeddings"
        )
    name = str(read_json(index).get("_class_name"))
    if (layout := prompt_layouts().get(name)) is None:
        raise ModelError(
            f"{index}: _class_name: got {name!r}; allowed for prompts {', '.join(prompt_layouts())}; "
            "for any other, conditions.embeddings takes a file of what the "
            "pipeline's own encode_prompt gives (pqcad_qat/models/README.md)"
        )
    return name, layout


def _text_pipeline(name: str, layout: PromptLayout, folder: Path) -> Any:
    """Load the pipeline with only its text encoders and tokenizers, in float32."""
    index = read_index(folder)
    pipeline_parts = PipelineParts(folder, index)
    pipeline_parts.check_there((*TEXT_ENCODERS, *TOKENIZERS))
    for part in TOKENIZERS:
        if pipeline_parts.has(part):
            check_tokenizer(folder / part)
    null = (part for part, entry in index.items() if isinstance(entry, list) and entry[-1] is None)
    modules: dict[str, Any] = dict.fromkeys((*(part for part in HEAVY if part in index), *null))
    modules |= {part: pipeline_parts.load(part, attention="sdpa") for part in pipeline_parts.text_encoders}
    pipeline_class = getattr(diffusers, name)
    try:
        pipeline = pipeline_class.from_pretrained(folder, use_safetensors=True, local_files_only=True, **modules)
    except Exception as error:  # diffusers and transformers raise many kinds of exceptions on a damaged folder
        raise ModelError(
            f"{folder}: got text encoders that cannot be loaded ({error}); allowed those that diffusers can load"
        ) from error
    if layout.reads_denoiser:
        config = read_json(folder / "transformer" / CONFIG)
        pipeline.transformer = SimpleNamespace(config=SimpleNamespace(**config))
    return pipeline.to(dtype=torch.float32)


def _numbers(folder: Path, count: int, layout: PromptLayout, encoding: Encoding) -> dict[str, Tensor]:
    """Return the conditions that do not come from text: SDXL's sizes, and the guidance input of FLUX.1 dev.

    SDXL's original and target sizes are those of the image that x_t decodes to, without a crop.
    """
    part = denoiser_folder(folder)
    config = read_json(part / CONFIG) if (part / CONFIG).is_file() else {}
    if "text_embeds" in layout.gives:
        vae = folder / "vae" / CONFIG
        levels = with_defaults("AutoencoderKL", read_json(vae))["block_out_channels"] if vae.is_file() else LEVELS
        sides = encoding.sides or sides_of(config)
        if sides is None:
            raise ModelError(f"{part / CONFIG}: sample_size: got null; allowed the height and width of x_t")
        height, width = (2 ** (len(levels) - 1) * side for side in sides)
        sizes = torch.tensor([[height, width, 0, 0, height, width]])
        return {"time_ids": sizes.expand(count, -1).clone(), "unconditional.time_ids": sizes}
    if config.get("guidance_embeds"):
        guidance = layout.guidance if encoding.guidance is None else encoding.guidance
        return {"guidance": torch.full((count,), guidance), "unconditional.guidance": torch.full((1,), guidance)}
    if encoding.guidance is not None:
        raise ModelError(
            f"conditions.guidance: got {encoding.guidance:g}; allowed null: {folder} takes no guidance as an input"
        )
    return {}
