"""A folder in diffusers' layout, made of what people have: a checkpoint in a single file, LoRA files, and words that
textual inversion has taught.

diffusers reads single files and textual inversions (`from_single_file`, `load_textual_inversion`). What LoRA adds is
inside the weights before anything is quantized.

Not here: the sum (lora.py), or loading the folder (model_loading.py). Needs transformers.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from pqcad_qat.errors import ModelError
from pqcad_qat.machine.files import room_for
from pqcad_qat.machine.json_files import shown
from pqcad_qat.models.config_values import class_of, silent
from pqcad_qat.models.families.table import pipelines
from pqcad_qat.models.lora import Lora, add_lora
from pqcad_qat.models.model_folder import (
    ARCHITECTURE,
    INDEX,
    STEM,
    denoiser_folder,
    downloaded,
    downloaded_pipeline,
    local,
    read_index,
)
from pqcad_qat.models.model_loading import folder_shapes
from pqcad_qat.models.pipeline_parts import check_transformers
from pqcad_qat.models.weight_files import SAFETENSORS, variant_of, weight_files

ENCODERS = {"clip_l": "", "clip_g": "_2"}
"""Tensor of a textual inversion of SDXL -> ending in the names of the tokenizer and text encoder that it is for."""

ALONE = "emb_params"
"""Tensor of a textual inversion for one text encoder."""


@dataclass(frozen=True)
class Assembled:
    """What was made of the parts.

    Attributes:
        pipeline: diffusers' class.
        loras: LoRA file -> its number of layers.
        words: textual inversion -> the words by which prompts call it.
    """

    pipeline: str
    loras: Mapping[Path, int]
    words: Mapping[Path, str]


def assemble(source: str, out: Path, *, config: str | None, loras: Sequence[Lora], words: Sequence[Path]) -> Assembled:
    """Write the pipeline of a source, with all that is added to it, as a folder in float32.

    Args:
        source: a .safetensors file with a whole pipeline, a folder in diffusers' layout, or a hub id.
        out: folder to write, which must not exist or be empty.
        config: for a single file, a folder in diffusers' layout or a hub id of the same architecture, whose configs
            and tokenizers are taken; its weights are not.
        loras: added one after another.
        words: textual inversions, each called by the name of its file, as <NAME>.

    Raises:
        ModelError: a file is missing, damaged, or not for this pipeline, or the folder is not empty.
        DiskError: the disk is full; nothing is left of the folder.
    """
    check_transformers("assemble")
    for file in (*(lora.file for lora in loras), *words):
        _check_file(file)
    if out.is_dir() and any(out.iterdir()):
        raise ModelError(f"{out}: got a folder that holds files; allowed an empty or a new one")
    pipeline = _loaded(source, config)
    fused = {lora.file: _added(pipeline, lora) for lora in loras}
    taught = {file: _teach(pipeline, file) for file in words}
    draft = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        with room_for(out), silent("diffusers"):
            pipeline.save_pretrained(draft, safe_serialization=True)
        folder_shapes(draft, str(draft))
        out.mkdir(parents=True, exist_ok=True)
        draft.replace(out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return Assembled(type(pipeline).__name__, fused, taught)


def _check_file(file: Path) -> None:
    """Raise ModelError for a file that is no readable safetensors."""
    if not file.is_file() or file.suffix != SAFETENSORS:
        got = "a file of another kind" if file.is_file() else "no such file"
        raise ModelError(f"{file}: got {got}; allowed {SAFETENSORS}, which holds nothing but tensors")
    try:
        with safe_open(file, "pt"):  # reads the header
            pass
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file}: got a file that cannot be read ({error}); allowed whole safetensors") from error


def _loaded(source: str, config: str | None) -> Any:
    """Return diffusers' pipeline of a source, in float32.

    Raises:
        ModelError: as for `assemble`.
    """
    path = local(source)
    if path is None and source.endswith(SAFETENSORS):
        raise ModelError(
            f"{source}: got no such file; allowed a checkpoint, a folder in diffusers' layout, or a hub id"
        )
    if path is None or path.is_dir():
        if config is not None:
            raise ModelError(f"--config: got {shown(config)} for {source}; allowed for a single file alone")
        folder = downloaded_pipeline(source) if path is None else path
        kind = _pipeline_class(folder, source)
        variant = variant_of(weight_files(denoiser_folder(folder), STEM)[0])
        with _of_diffusers(source):
            return kind.from_pretrained(
                folder, use_safetensors=True, local_files_only=True, variant=variant, dtype=torch.float32
            )
    _check_file(path)
    if config is None:
        raise ModelError(
            f"{path}: got a checkpoint in a single file; allowed with --config, a folder in diffusers' layout or a hub "
            "id of the same architecture, such as stable-diffusion-v1-5/stable-diffusion-v1-5"
        )
    beside = local(config)
    try:
        folder = downloaded(config, ARCHITECTURE) if beside is None else beside
    except ModelError as error:
        reason = str(error).partition(": ")[2] or str(error)
        raise ModelError(f"--config: {reason}") from error
    kind = _pipeline_class(folder, config)
    # a safety checker judges pictures, and gives the denoiser nothing
    unread = {"safety_checker": None} if "safety_checker" in read_index(folder) else {}
    with _of_diffusers(source):
        return kind.from_single_file(
            str(path), config=str(folder), local_files_only=True, dtype=torch.float32, **unread
        )


def _pipeline_class(folder: Path, source: str) -> Any:
    """Diffusers' class of a folder's pipeline.

    Raises:
        ModelError: there is no index, or its class is not supported.
    """
    name = read_index(folder).get("_class_name")
    if name not in pipelines():
        raise ModelError(f"{source}: {INDEX}: _class_name: got {shown(name)}; allowed {', '.join(pipelines())}")
    return class_of(str(name))


@contextmanager
def _of_diffusers(where: object) -> Iterator[None]:
    """Turn what diffusers raises on a file that it cannot use into a ModelError: it has many kinds of exceptions."""
    diffusers.utils.logging.disable_progress_bar()
    try:
        with silent("diffusers"), silent("transformers"):
            yield
    except ModelError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:500]
        raise ModelError(
            f"{where}: got a file or folder that diffusers cannot use ({type(error).__name__}: {reason}); allowed one "
            "of this pipeline's architecture"
        ) from error


def _added(pipeline: Any, lora: Lora) -> int:
    with _of_diffusers(lora.file):
        return add_lora(pipeline, lora)


def _teach(pipeline: Any, file: Path) -> str:
    """Add the word of a textual inversion to the tokenizers, and return what prompts write for it.

    Raises:
        ModelError: the file is no textual inversion, or one for other text encoders.
    """
    tensors, word = load_file(file), f"<{file.stem}>"
    parts = {ENCODERS[name]: value for name, value in tensors.items() if name in ENCODERS}
    if ALONE in tensors or len(tensors) == 1:
        parts = {"": tensors.get(ALONE, next(iter(tensors.values())))}
    encoders = {ending for ending in ENCODERS.values() if hasattr(pipeline, f"text_encoder{ending}")}
    if not hasattr(pipeline, "load_textual_inversion") or parts.keys() != encoders:
        raise ModelError(
            f"{file}: got {shown(sorted(tensors))}; allowed a textual inversion for a {type(pipeline).__name__}: "
            f"{ALONE} for one text encoder of CLIP, {' and '.join(ENCODERS)} for two"
        )
    with _of_diffusers(file):
        for ending, value in parts.items():
            pipeline.load_textual_inversion(
                {ALONE: _rows(value)},
                token=word,
                text_encoder=getattr(pipeline, f"text_encoder{ending}"),
                tokenizer=getattr(pipeline, f"tokenizer{ending}"),
            )
    count = len(_rows(next(iter(parts.values()))))
    return " ".join([word, *(f"{word}_{row}" for row in range(1, count))])


def _rows(value: Tensor) -> Tensor:
    """The vectors (N, width) of a word, of which some files hold one alone, (width)."""
    return value.reshape(-1, value.shape[-1])
