"""The parts of a pipeline's folder beside its denoiser: which are there, of which class, and how each is loaded.

Not here: the denoiser and its scheduler (denoiser.py), what prompts become (prompts.py), or how parts are deployed (deployment/parts.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
from torch import Tensor, nn

from pqcad_qat.diffusion.model_folder import INDEX, STEM, TEXT_ENCODERS, read_index
from pqcad_qat.diffusion.weight_files import weight_files
from pqcad_qat.errors import ModelError

VAE = "vae"

T5 = "T5EncoderModel"
"""Of text: the third encoder of Stable Diffusion 3, the second of Flux, the only one of PixArt."""

TOKENIZER = "tokenizer.json"

CLASSES: Mapping[str, tuple[str, ...]] = {
    VAE: ("AutoencoderKL",),
    **dict.fromkeys(TEXT_ENCODERS, ("CLIPTextModel", "CLIPTextModelWithProjection", T5)),
}
"""Part -> its classes that can be deployed."""


@dataclass(frozen=True)
class PipelineParts:
    """What a pipeline's folder holds beside its denoiser.

    Attributes:
        folder: in diffusers' layout.
        index: content of its model_index.json.
    """

    folder: Path
    index: Mapping[str, Any]

    def has(self, part: str) -> bool:
        """Whether the index names a class for the part and its files are there."""
        entry = self.index.get(part)
        return isinstance(entry, list) and entry[-1] is not None and (self.folder / part).is_dir()

    def class_of(self, part: str) -> str:
        """The class of a part that is there.

        Raises:
            ModelError: one that cannot be taken.
        """
        found = str(self.index[part][-1])
        if found not in CLASSES[part]:
            raise ModelError(
                f"{self.folder / 'model_index.json'}: {part}: got {found!r}; allowed {', '.join(CLASSES[part])}, or "
                f"pipeline.{part.rstrip('_23')}: none, which leaves {'it' if part == VAE else 'all text encoders'} out"
            )
        return found

    def check_weights(self, part: str) -> None:
        """Raise ModelError for a part that is there without safetensors."""
        weight_files(self.folder / part, STEM if part == VAE else "model", f", and pipeline.{part.rstrip('_23')}: none takes none")

    @property
    def text_encoders(self) -> tuple[str, ...]:
        return tuple(part for part in TEXT_ENCODERS if self.has(part))

    def load(self, part: str) -> nn.Module:
        """A part in float32, in evaluation mode; weights from safetensors alone.

        Raises:
            ModelError: of another class, damaged, or of a library that is not installed.
        """
        name = self.class_of(part)
        if part != VAE:
            check_transformers(f"{self.folder / part}")
            import transformers

            transformers.utils.logging.disable_progress_bar()
        try:
            more = {} if part == VAE else {"attn_implementation": "eager"}
            library: Any = diffusers if part == VAE else transformers
            module: nn.Module = getattr(library, name).from_pretrained(
                self.folder / part, use_safetensors=True, local_files_only=True, torch_dtype=torch.float32, **more
            )
        except Exception as error:  # both libraries raise anything from OSError to KeyError on a damaged folder
            raise ModelError(f"{self.folder / part}: cannot load this {name}: {error}") from error
        return module.float().eval().requires_grad_(False)

    def digest(self, *parts: str) -> str:
        """SHA-256 of every file of the parts that are there."""
        found = hashlib.sha256()
        for part in parts:
            for path in sorted(path for path in (self.folder / part).rglob("*") if path.is_file()):
                with path.open("rb") as file:
                    found.update(f"{path.relative_to(self.folder).as_posix()} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
        return found.hexdigest()


def pipeline_parts(folder: Path | None) -> PipelineParts | None:
    """The parts of a model's folder; None where there is no folder, or one without model_index.json.

    Raises:
        ModelError: model_index.json cannot be read.
    """
    if folder is None or not (folder / INDEX).is_file():
        return None
    return PipelineParts(folder, read_index(folder))


def check_transformers(what: str) -> None:
    """Raise ModelError where the library of text encoders is not installed."""
    if find_spec("transformers") is None:
        raise ModelError(f"{what}: takes the library transformers, which is not installed: pip install 'pqcad-qat[text]'")


def check_tokenizer(folder: Path) -> None:
    """Raise ModelError for a tokenizer that transformers cannot read: SentencePiece's file alone takes two libraries more."""
    if (folder / TOKENIZER).is_file() or not (folder / "spiece.model").is_file():
        return
    if missing := [name for name, module in (("sentencepiece", "sentencepiece"), ("protobuf", "google.protobuf")) if not _found(module)]:
        raise ModelError(
            f"{folder}: has spiece.model and no {TOKENIZER}, which takes {' and '.join(missing)}, not installed: pip install "
            f"{' '.join(missing)}; or put the {TOKENIZER} of another T5 of the same vocabulary there"
        )


def _found(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of its parent
        return False


def to_decoder(config: Mapping[str, Any], latents: Tensor) -> Tensor:
    """Latents (N, C, h, w) of a denoiser as its VAE's decoder takes them."""
    scaled: Tensor = latents.float() / config["scaling_factor"] + (config.get("shift_factor") or 0.0)
    return scaled


@torch.no_grad()
def decoded(vae: nn.Module, latents: Tensor) -> Tensor:
    """float32 pictures (N, 3, H, W), about in [-1, 1], of a denoiser's latents; one at a time."""
    model = cast(Any, vae)
    parts = [model.decode(one, return_dict=False)[0] for one in to_decoder(model.config, latents)[:, None]]
    return torch.cat(parts)
