"""Prompts become the conditions of a text-conditional model: through the text encoders of its own pipeline's folder.

Not here: what is done with conditions (conditions.py). Takes the library transformers, which the extra `text` installs.
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
from pqcad_qat.machine.content_store import kept
from pqcad_qat.machine.json_files import read_json
from pqcad_qat.machine.tensor_files import save_tensors
from pqcad_qat.models.config_values import with_defaults
from pqcad_qat.models.families.config_faults import sides_of
from pqcad_qat.models.families.prompt_layouts import PromptLayout
from pqcad_qat.models.families.table import prompt_layouts
from pqcad_qat.models.model_folder import TEXT_ENCODERS, TOKENIZERS, denoiser_folder, read_index
from pqcad_qat.models.pipeline_parts import PipelineParts, check_tokenizer, check_transformers
from pqcad_qat.models.prompt_cuts import LENGTH, cut_prompts

ASKED: Mapping[str, Any] = {
    "prompt_2": None,
    "prompt_3": None,
    "device": "cpu",
    "num_images_per_prompt": 1,
    "do_classifier_free_guidance": True,
}
"""What `encode_prompt` is asked, as far as the pipeline's own has a word for it: the same prompt for every encoder, and
the empty one.
"""

HEAVY = ("unet", "transformer", "vae", "safety_checker", "feature_extractor", "image_encoder")
"""Parts of a pipeline that prompts are not encoded with."""

LEVELS = range(4)
"""Of a VAE that is not there: each but the first halves a picture's sides."""

BATCH = 16
"""Prompts encoded at a time."""

UNCONDITIONAL = "unconditional."
"""Before the name of a tensor that belongs to the unconditional pass of classifier-free guidance."""

EMBEDDINGS = "embeddings.safetensors"
"""What is kept of prompts once they are encoded."""


@dataclass(frozen=True)
class Encoding:
    """How prompts are to be encoded, where a pipeline leaves a choice.

    Attributes:
        tokens: that T5's prompts are filled up or cut to; None for as many as the pipeline's own `encode_prompt` asks
            for.
        guidance: of a denoiser that takes it as an input (FLUX.1 dev); None for what its pipeline tells it.
        sides: height and width of x_t, where they are others than the denoiser's config says.
    """

    tokens: int | None = None
    guidance: float | None = None
    sides: tuple[int, int] | None = None


OWN_WAY = Encoding()


def kept_prompts(prompts: Path, folder: Path, store: Path, encoding: Encoding = OWN_WAY) -> Path:
    """The file of embeddings of these prompts by the encoders of this folder: made once, and read back from the store
    from then on.

    Args:
        prompts, folder, encoding: as of `encode_prompts`.
        store: beside the runs; the file's place in it is named by the hash of the prompts, encoders, tokenizers and
            sizes.

    Raises:
        ModelError: as `encode_prompts`.
    """
    lines, (pipeline, layout) = _lines(prompts), _layout(folder)
    decides = {
        "prompts": lines,
        "pipeline": pipeline,
        "encoders": PipelineParts(folder, {}).digest(*TEXT_ENCODERS, *TOKENIZERS),
        "sizes": {name: value.tolist() for name, value in _numbers(folder, 1, layout, encoding).items()},
        "tokens": encoding.tokens,
    }

    def make(draft: Path) -> None:
        save_tensors(encode_prompts(prompts, folder, encoding), draft / EMBEDDINGS)

    return kept(store, decides, make) / EMBEDDINGS


def check_prompts(prompts: Path, folder: Path, encoding: Encoding = OWN_WAY) -> set[str]:
    """The names of the tensors that `encode_prompts` makes, those of the unconditional pass aside; nothing is encoded.

    Raises:
        ModelError: as `encode_prompts`, as far as configs tell.
    """
    _lines(prompts)
    check_transformers("conditions.prompts")
    pipeline, layout = _layout(folder)
    _asked(getattr(diffusers, pipeline), pipeline, encoding)
    names = (*layout.gives, *_numbers(folder, 1, layout, encoding))
    return {name for name in names if name and not name.startswith(UNCONDITIONAL)}


@torch.no_grad()
def encode_prompts(prompts: Path, folder: Path, encoding: Encoding = OWN_WAY) -> dict[str, Tensor]:
    """The tensors of a file of embeddings (conditions.py): of every prompt, and of the empty one as the unconditional.

    Args:
        prompts: a prompt a line; empty lines are passed over.
        folder: a local pipeline's, with its text encoders (safetensors) and tokenizers.
        encoding: where the pipeline leaves a choice.

    Raises:
        ModelError: transformers is not installed, there are no prompts, no pipeline of a known class with text
            encoders, or one that leaves no such choice.
    """
    lines = _lines(prompts)
    check_transformers("conditions.prompts")
    name, layout = _layout(folder)
    names = layout.gives
    numbers = _numbers(folder, len(lines), layout, encoding)
    pipeline = _text_parts(name, layout, folder)
    asked = _asked(pipeline, name, encoding)
    parts = [lines[first : first + BATCH] for first in range(0, len(lines), BATCH)]
    encoded = [dict(zip(names, pipeline.encode_prompt(part, **asked), strict=True)) for part in parts]
    found = {name: torch.cat([part[name] for part in encoded]).float() for name in names if name}
    found |= {name: value[:1] for name, value in found.items() if name.startswith(UNCONDITIONAL)}
    if not any(name.startswith(UNCONDITIONAL) for name in names):
        other = dict(zip(names, pipeline.encode_prompt([""], **asked), strict=True))
        found |= {UNCONDITIONAL + name: value.float() for name, value in other.items() if name}
    return found | numbers


def _asked(pipeline: Any, name: str, encoding: Encoding) -> dict[str, Any]:
    """The keyword arguments of the `encode_prompt` of a pipeline or its class."""
    known = inspect.signature(pipeline.encode_prompt).parameters
    if encoding.tokens is None:
        return {key: value for key, value in ASKED.items() if key in known}
    if LENGTH not in known:
        raise ModelError(
            f"conditions.tokens: got {encoding.tokens}; allowed null: {name} has no T5, and CLIP's texts "
            "are of one length"
        )
    return {key: value for key, value in ASKED.items() if key in known} | {LENGTH: encoding.tokens}


def prompts_cut(prompts: Path, folder: Path, tokens: int | None) -> tuple[str, ...]:
    """A sentence for every prompt of the file that a tokenizer of the pipeline's folder, if it is one, cuts
    (prompt_cuts.py).
    """
    return (
        () if not (folder / "model_index.json").is_file() else cut_prompts(_numbered(prompts), prompts, folder, tokens)
    )


def _lines(prompts: Path) -> list[str]:
    return [prompt for _, prompt in _numbered(prompts)]


def _numbered(prompts: Path) -> list[tuple[int, str]]:
    """(line, prompt) of the file; a byte-order mark before the first is none of it."""
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
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise ModelError(f"conditions.prompts: got no prompt in {prompts}; allowed one or more, a line each")
    return lines


def _layout(folder: Path) -> tuple[str, PromptLayout]:
    """The class of the pipeline, and what it makes of a prompt."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise ModelError(
            f"conditions.prompts: {folder} is no pipeline's folder with a text encoder; "
            "conditions.embeddings takes a file"
        )
    name = str(read_json(index).get("_class_name"))
    if (layout := prompt_layouts().get(name)) is None:
        raise ModelError(
            f"{index}: _class_name: got {name!r}; allowed for prompts {', '.join(prompt_layouts())}; "
            "conditions.embeddings takes a file of what the "
            "pipeline's own encode_prompt gives (pqcad_qat/models/README.md)"
        )
    return name, layout


def _text_parts(name: str, layout: PromptLayout, folder: Path) -> Any:
    """The pipeline with its text encoders alone, in float32."""
    index = read_index(folder)
    parts = PipelineParts(folder, index)
    parts.check_there((*TEXT_ENCODERS, *TOKENIZERS))
    for part in TOKENIZERS:
        if parts.has(part):
            check_tokenizer(folder / part)
    null = (part for part, entry in index.items() if isinstance(entry, list) and entry[-1] is None)
    given: dict[str, Any] = dict.fromkeys((*(part for part in HEAVY if part in index), *null))
    given |= {part: parts.load(part, attention="sdpa") for part in parts.text_encoders}
    try:
        made = getattr(diffusers, name).from_pretrained(folder, use_safetensors=True, local_files_only=True, **given)
    except Exception as error:  # diffusers and transformers raise anything from OSError to KeyError on a damaged folder
        raise ModelError(f"{folder}: cannot load its text encoders: {error}") from error
    if layout.reads_denoiser:
        made.transformer = SimpleNamespace(config=SimpleNamespace(**read_json(folder / "transformer" / "config.json")))
    return made.to(dtype=torch.float32)


def _numbers(folder: Path, count: int, layout: PromptLayout, encoding: Encoding) -> dict[str, Tensor]:
    """What is no text: SDXL's sizes, an original and a target of the size of x_t, not cropped; the guidance that FLUX.1
    dev reads.
    """
    part = denoiser_folder(folder)
    config = read_json(part / "config.json") if (part / "config.json").is_file() else {}
    if "text_embeds" in layout.gives:
        vae = folder / "vae" / "config.json"
        levels = with_defaults("AutoencoderKL", read_json(vae))["block_out_channels"] if vae.is_file() else LEVELS
        sides = encoding.sides or sides_of(config)
        if sides is None:
            raise ModelError(f"{part / 'config.json'}: sample_size: got null; allowed the height and width of x_t")
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
