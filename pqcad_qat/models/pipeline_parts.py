"""The parts of a pipeline's folder beside its denoiser: which are there, of which class, and how each is loaded.

Not here: the denoiser and its scheduler (denoiser.py), how parts fit it (part_fit.py), what prompts become
(prompts.py), or how parts are deployed (export/part_export.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.models.modeling_utils import no_init_weights
from torch import nn

from pqcad_qat.errors import ModelError
from pqcad_qat.machine.json_files import read_json, shown
from pqcad_qat.models.config_values import bounded_build, check_values, class_of, silent, with_defaults
from pqcad_qat.models.families.config_faults import autoencoder
from pqcad_qat.models.families.family import SCALING, TEXT_ENCODERS
from pqcad_qat.models.families.table import pipelines
from pqcad_qat.models.model_folder import (
    CONFIG,
    DECODERS,
    INDEX,
    STEM,
    TOKENIZERS,
    part_class,
    read_index,
)
from pqcad_qat.models.trial_calls import try_call
from pqcad_qat.models.vae import latent_channels
from pqcad_qat.models.weight_files import (
    check_finite,
    fitting,
    listed,
    load_weights,
    stored_tensors,
    variant_of,
    weight_files,
)

VAE, VQ = DECODERS

T5 = "T5EncoderModel"
"""Class of the third text encoder of Stable Diffusion 3, of the second of Flux, and of the only one of PixArt."""

TOKENIZER = "tokenizer.json"
"""Name of the file of a tokenizer that needs no other library than tokenizers."""

TEXT_STEM = "model"
"""File name of a text encoder's weights, without precision and ending."""

CLASSES: Mapping[str, tuple[str, ...]] = {
    VAE: ("AutoencoderKL",),
    VQ: ("VQModel",),
    **dict.fromkeys(TEXT_ENCODERS, ("CLIPTextModel", "CLIPTextModelWithProjection", T5)),
}
"""Mapping from a part to the classes that can be deployed for it."""


SCALING_FACTOR, UNSCALED = "scaling_factor", 1.0
"""Key of a VQModel's config, and its value where the key is missing: those who trained such models with this layout
(Rombach et al. 2022) did not scale their latents. diffusers' default, 0.18215, is that of Stable Diffusion's VAE, and
CompVis/ldm-celebahq-256 has weird pictures with it (github.com/huggingface/diffusers/issues/6725).
"""


@dataclass(frozen=True)
class PipelineParts:
    """The parts of a pipeline's folder beside its denoiser.

    Attributes:
        folder: the pipeline's folder, in diffusers' layout.
        index: content of its model_index.json.
    """

    folder: Path
    index: Mapping[str, Any]

    def has(self, part: str) -> bool:
        """Return whether the index names a class for the part, and the part's folder is there."""
        return part_class(self.index, part) is not None and (self.folder / part).is_dir()

    @property
    def decoder(self) -> str | None:
        """Name of the part that decodes latents into pictures; None where there is none."""
        return next((part for part in DECODERS if self.has(part)), None)

    def class_of(self, part: str) -> str:
        """Return the class of a part.

        Raises:
            ModelError: the class is not supported.
        """
        name = part_class(self.index, part)
        if name not in CLASSES[part]:
            raise ModelError(
                f"{self.folder / INDEX}: {part}: got {shown(name)}; allowed {', '.join(CLASSES[part])}, "
                f"or {left_out(part)}"
            )
        return str(name)

    def check_there(self, parts: Sequence[str]) -> None:
        """Raise ModelError where the index names a class for one of these parts whose folder is missing, or where it
        names two decoders.
        """
        for part in parts:
            if (name := part_class(self.index, part)) is not None and not self.has(part):
                raise ModelError(
                    f"{self.folder / part}: got no such folder; allowed the {shown(name)} that {INDEX} names for it, "
                    f"or {left_out(part)}"
                )
        if VQ in parts and self.has(VAE) and self.has(VQ):
            raise ModelError(f"{self.folder / INDEX}: {VQ}: got a second decoder beside {VAE}; allowed one of them")

    def check(self, part: str) -> None:
        """Raise ModelError for a part that is not supported, as far as the index and its configs show.

        A text encoder's tokenizer is checked as well.
        """
        name, where = self.class_of(part), self.folder / part / CONFIG
        if part in DECODERS:
            with loading(where, name):
                shapes: Any = self._shapes(part)
                latents = torch.zeros(1, latent_channels(shapes.config), 8, 8, device="meta")
                try_call(lambda: shapes.decode(latents), name, read_json(where))
            return
        check_transformers(f"pipeline.{TEXT_ENCODERS[0]}")
        with loading(where, name):
            self._shapes(part)
        check_tokenizer(self.folder / TOKENIZERS[TEXT_ENCODERS.index(part)])

    def check_weights(self, part: str) -> None:
        """Raise ModelError for a part whose safetensors are missing, damaged, or not those of its config."""
        files = self._weight_files(part)
        stored = stored_tensors(files)
        if part in DECODERS:
            stored = fitting(stored, self._shapes(part))
        else:
            self._text_encoder(part, device_map="meta")
        check_finite(stored)

    def _weight_files(self, part: str) -> tuple[Path, ...]:
        stem = STEM if part in DECODERS else TEXT_STEM
        return weight_files(self.folder / part, stem, f", or {left_out(part)}")

    def _shapes(self, part: str) -> nn.Module:
        """Build a part without weights, on torch's meta device."""
        where = self.folder / part / CONFIG
        read_json(where)
        with bounded_build(str(where)):
            return self._decoder(part) if part in DECODERS else self._text_encoder_of(part)

    def _decoder(self, part: str) -> nn.Module:
        """Build a decoder, with those keys of its config about scaling that its pipeline's class uses."""
        where, name = self.folder / part / CONFIG, self.class_of(part)
        config = read_json(where)
        if part == VQ:
            config = {SCALING_FACTOR: UNSCALED, **config}
        check_values(name, config, str(where))
        full = with_defaults(name, config)
        if (fault := next(autoencoder(full), None)) is not None:
            raise ModelError(f"{where}: {fault} ({name})")
        pipeline = pipelines().get(str(self.index.get("_class_name")))
        used = SCALING if pipeline is None else pipeline.scaling  # a pipeline of an unknown class may use all of them
        unused = [key for key in SCALING if key in full and key not in used]
        with loading(where, name):
            module: Any = class_of(name).from_config(
                {key: value for key, value in config.items() if key != "_use_default_values"}
            )
        module.register_to_config(**dict.fromkeys(unused))
        return cast(nn.Module, module)

    def _text_encoder_of(self, part: str) -> nn.Module:
        import transformers

        kind: Any = getattr(transformers, self.class_of(part))
        return cast(nn.Module, kind(kind.config_class.from_pretrained(self.folder / part, local_files_only=True)))

    def _text_encoder(self, part: str, **options: Any) -> nn.Module:
        """Load a text encoder in float32, with further options for transformers."""
        self._weight_files(part)  # for its message where there are none
        return load_with_transformers(self.folder / part, self.class_of(part), **options)

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """Names of the text encoders that are there."""
        return tuple(part for part in TEXT_ENCODERS if self.has(part))

    def load(self, part: str, attention: str = "eager") -> nn.Module:
        """Load a part in float32 and evaluation mode, with weights from safetensors alone.

        Args:
            part: one of DECODERS or of TEXT_ENCODERS.
            attention: transformers' name for the way in which a text encoder computes attention; export traces `eager`.

        Raises:
            ModelError: the part's class is not supported, its files are damaged, or its library is not installed.
        """
        if part in DECODERS:
            try:
                stored = fitting(stored_tensors(self._weight_files(part)), self._shapes(part))
                with no_init_weights():
                    module = self._decoder(part)
                load_weights(module, stored)
            except ModelError as error:
                raise ModelError(f"{error} ({self.class_of(part)})") from error
        else:
            check_transformers(f"{self.folder / part}")
            module = self._text_encoder(part, attn_implementation=attention)
            check_finite(stored_tensors(self._weight_files(part)))
        return module.float().eval().requires_grad_(False)

    def digest(self, *parts: str) -> str:
        """Return the SHA-256 over the names and contents of all files of these parts, as far as they are there."""
        hashed = hashlib.sha256()
        for part in parts:
            for path in sorted(path for path in (self.folder / part).rglob("*") if path.is_file()):
                with path.open("rb") as file:
                    content = hashlib.file_digest(file, "sha256").hexdigest()
                hashed.update(f"{path.relative_to(self.folder).as_posix()} {content}\n".encode())
        return hashed.hexdigest()


def pipeline_parts(folder: Path | None) -> PipelineParts | None:
    """Return the parts of a model's folder; None where there is no folder, or one without model_index.json.

    Raises:
        ModelError: model_index.json cannot be read.
    """
    if folder is None or not (folder / INDEX).is_file():
        return None
    return PipelineParts(folder, read_index(folder))


def load_with_transformers(folder: Path, name: str, **options: Any) -> nn.Module:
    """Load a model of a class of transformers in float32 from safetensors alone, with further options for it.

    Raises:
        ModelError: files are missing or damaged, tensors are missing, or have other shapes than the config gives them.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    with loading(folder, name), silent("transformers"):
        module, report = getattr(transformers, name).from_pretrained(
            folder,
            use_safetensors=True,
            local_files_only=True,
            torch_dtype=torch.float32,
            variant=variant_of(weight_files(folder, TEXT_STEM)[0]),
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
        )
    kinds = {"missing_keys": "missing", "mismatched_keys": "of another shape"}
    tensors = [(kind, sorted(map(str, report[key]))) for key, kind in kinds.items()]
    if faults := [f"{len(names)} {kind}: {listed(names)}" for kind, names in tensors if names]:
        raise ModelError(
            f"{folder}: got weights that do not fit; allowed those of the {name} that {CONFIG} describes: "
            f"{'; '.join(faults)}"
        )
    return cast(nn.Module, module)


def check_transformers(where: str) -> None:
    """Raise ModelError where the library transformers is not installed; `where` begins the message."""
    if find_spec("transformers") is None:
        raise ModelError(f"{where}: got no library transformers; allowed with it: pip install 'pqcad-qat[text]'")


def check_tokenizer(folder: Path) -> None:
    """Raise ModelError for a tokenizer that is missing, or whose libraries are: a SentencePiece file needs two more."""
    if not (folder / "tokenizer_config.json").is_file():
        raise ModelError(
            f"{folder}: got no tokenizer_config.json; allowed a text encoder with its tokenizer, or "
            f"{left_out(TEXT_ENCODERS[0])}"
        )
    read_json(folder / "tokenizer_config.json")
    if (folder / TOKENIZER).is_file() or not (folder / "spiece.model").is_file():
        return
    if missing := [
        name
        for name, module in (("sentencepiece", "sentencepiece"), ("protobuf", "google.protobuf"))
        if not _installed(module)
    ]:
        raise ModelError(
            f"{folder}: got spiece.model and no {TOKENIZER}, without the libraries that read it; allowed with "
            f"{' and '.join(missing)} (pip install {' '.join(missing)}), or with the {TOKENIZER} of another T5 of the "
            "same vocabulary"
        )


def left_out(part: str) -> str:
    """Return how a policy leaves a part out, for messages."""
    if part in DECODERS:
        return f"pipeline.{VAE}: none, without it"
    return f"pipeline.{part.rstrip('_23')}: none, without any of them"


@contextmanager
def loading(where: Path, name: str) -> Iterator[None]:
    """Turn whatever diffusers and transformers raise within this context into a ModelError.

    On a damaged folder they raise anything from OSError to KeyError.
    """
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"{where}: got a {name} that cannot be loaded ({str(error)[:1000]}); allowed one that its library can load"
        ) from error


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the module's parent package is not installed
        return False
