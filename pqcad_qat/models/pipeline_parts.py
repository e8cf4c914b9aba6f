"""The parts of a pipeline's folder beside its denoiser: which are there, of which class, and how each is loaded.

Not here: the denoiser and its scheduler (denoiser.py), what prompts become (prompts.py), or how parts are deployed
(export/part_export.py).
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
from pqcad_qat.models.families.family import SCALING, ConditionInput
from pqcad_qat.models.families.table import pipelines
from pqcad_qat.models.model_folder import (
    CONFIG,
    DECODERS,
    INDEX,
    STEM,
    TEXT_ENCODERS,
    TOKENIZERS,
    part_class,
    read_index,
)
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
"""Of text: the third encoder of Stable Diffusion 3, the second of Flux, the only one of PixArt."""

TOKENIZER = "tokenizer.json"

TEXT_STEM = "model"
"""Of the names of a text encoder's weights."""

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
        return part_class(self.index, part) is not None and (self.folder / part).is_dir()

    def class_of(self, part: str) -> str:
        """The class of a part that is there.

        Raises:
            ModelError: one that cannot be taken.
        """
        found = part_class(self.index, part)
        if found not in CLASSES[part]:
            raise ModelError(
                f"{self.folder / INDEX}: {part}: got {shown(found)}; allowed {', '.join(CLASSES[part])}, "
                f"or {_left_out(part)}"
            )
        return str(found)

    def check_there(self, parts: Sequence[str]) -> None:
        """Raise ModelError where the index names a class for one of the parts whose folder is not there, or another
        decoder than a VAE.
        """
        for part in parts:
            if (name := part_class(self.index, part)) is not None and not self.has(part):
                raise ModelError(
                    f"{self.folder / part}: no such folder, and {INDEX} names {shown(name)} for it; {_left_out(part)}"
                )
        if VAE in parts and (name := part_class(self.index, VQ)) is not None:
            rule = f"a {VAE} of {', '.join(CLASSES[VAE])} in its place, or {_left_out(VAE)}, and samples are latents"
            raise ModelError(f"{self.folder / INDEX}: {VQ}: got {shown(name)}; allowed {rule}")

    def check(self, part: str) -> None:
        """Raise ModelError for a part that cannot be taken, as far as the index, its configs and its tokenizer's
        tell.
        """
        name, where = self.class_of(part), self.folder / part / CONFIG
        if part == VAE:
            with torch.no_grad(), _named(where, name):
                shapes: Any = self._shapes(part)
                shapes.decode(torch.zeros(1, shapes.config.latent_channels, 8, 8, device="meta"))
            return
        check_transformers(f"pipeline.{TEXT_ENCODERS[0]}")
        with _named(where, name):
            self._shapes(part)
        check_tokenizer(self.folder / TOKENIZERS[TEXT_ENCODERS.index(part)])

    def check_weights(self, part: str) -> None:
        """Raise ModelError for a part that is there without safetensors, or with others than its config's, or with
        damaged ones.
        """
        files = self._weight_files(part)
        stored = stored_tensors(files)
        if part == VAE:
            stored = fitting(stored, self._shapes(part))
        else:
            self._text_encoder(part, device_map="meta")
        check_finite(stored)

    def _weight_files(self, part: str) -> tuple[Path, ...]:
        return weight_files(self.folder / part, STEM if part == VAE else TEXT_STEM, f", and {_left_out(part)}")

    def _shapes(self, part: str) -> nn.Module:
        """A part without weights, on torch's meta device."""
        where = self.folder / part / CONFIG
        read_json(where)
        with bounded_build(str(where)):
            return self._decoder() if part == VAE else self._text_encoder_of(part)

    def _decoder(self) -> nn.Module:
        """The VAE with what its pipeline's class heeds of its config."""
        where, name = self.folder / VAE / CONFIG, self.class_of(VAE)
        config = read_json(where)
        check_values(name, config, str(where))
        full = with_defaults(name, config)
        if (fault := next(autoencoder(full), None)) is not None:
            raise ModelError(f"{where}: {fault} ({name})")
        pipeline = pipelines().get(str(self.index.get("_class_name")))
        heeded = SCALING if pipeline is None else pipeline.scaling  # a class that is not known is taken to heed all
        unheeded = [key for key in SCALING if key not in heeded]
        with _named(where, name):
            module: Any = class_of(name).from_config(
                {key: value for key, value in config.items() if key != "_use_default_values"}
            )
        module.register_to_config(**dict.fromkeys(unheeded))
        return cast(nn.Module, module)

    def _text_encoder_of(self, part: str) -> nn.Module:
        import transformers

        kind: Any = getattr(transformers, self.class_of(part))
        return cast(nn.Module, kind(kind.config_class.from_pretrained(self.folder / part, local_files_only=True)))

    def _text_encoder(self, part: str, **how: Any) -> nn.Module:
        """A text encoder in float32, as transformers loads it.

        Raises:
            ModelError: tensors are missing, or of another shape than its config says.
        """
        import transformers

        transformers.utils.logging.disable_progress_bar()
        name, folder = self.class_of(part), self.folder / part
        with _named(folder, name), silent("transformers"):
            module, report = getattr(transformers, name).from_pretrained(
                folder,
                use_safetensors=True,
                local_files_only=True,
                torch_dtype=torch.float32,
                variant=variant_of(self._weight_files(part)[0]),
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **how,
            )
        kinds = {"missing_keys": "missing", "mismatched_keys": "of another shape"}
        faults = [(what, sorted(map(str, report[key]))) for key, what in kinds.items()]
        if said := [f"{len(names)} {what}: {listed(names)}" for what, names in faults if names]:
            raise ModelError(
                f"{folder}: cannot load this {name}: its weights are not those of its config: {'; '.join(said)}"
            )
        return cast(nn.Module, module)

    @property
    def text_encoders(self) -> tuple[str, ...]:
        return tuple(part for part in TEXT_ENCODERS if self.has(part))

    def load(self, part: str, attention: str = "eager") -> nn.Module:
        """A part in float32, in evaluation mode; weights from safetensors alone.

        Args:
            part: VAE or one of TEXT_ENCODERS.
            attention: of a text encoder, as transformers names its ways to compute it; `eager` is the one that is
                traced.

        Raises:
            ModelError: of another class, damaged, or of a library that is not installed.
        """
        if part == VAE:
            try:
                stored = fitting(stored_tensors(self._weight_files(part)), self._shapes(part))
                with no_init_weights():
                    module = self._decoder()
                load_weights(module, stored)
            except ModelError as error:
                raise ModelError(f"{self.folder / part}: cannot load this {self.class_of(part)}: {error}") from error
        else:
            check_transformers(f"{self.folder / part}")
            module = self._text_encoder(part, attn_implementation=attention)
            check_finite(stored_tensors(self._weight_files(part)))
        return module.float().eval().requires_grad_(False)

    def digest(self, *parts: str) -> str:
        """SHA-256 of every file of the parts that are there."""
        found = hashlib.sha256()
        for part in parts:
            for path in sorted(path for path in (self.folder / part).rglob("*") if path.is_file()):
                with path.open("rb") as file:
                    found.update(
                        (
                            f"{path.relative_to(self.folder).as_posix()} "
                            f"{hashlib.file_digest(file, 'sha256').hexdigest()}\n"
                        ).encode()
                    )
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
        raise ModelError(
            f"{what}: takes the library transformers, which is not installed: pip install 'pqcad-qat[text]'"
        )


def check_tokenizer(folder: Path) -> None:
    """Raise ModelError for a tokenizer that is not there, or that takes libraries which are not: SentencePiece's file
    takes two more.
    """
    if not (folder / "tokenizer_config.json").is_file():
        raise ModelError(
            f"{folder}: has no tokenizer_config.json; a text encoder takes its tokenizer, and "
            f"{_left_out(TEXT_ENCODERS[0])}"
        )
    read_json(folder / "tokenizer_config.json")
    if (folder / TOKENIZER).is_file() or not (folder / "spiece.model").is_file():
        return
    if missing := [
        name
        for name, module in (("sentencepiece", "sentencepiece"), ("protobuf", "google.protobuf"))
        if not _found(module)
    ]:
        raise ModelError(
            f"{folder}: has spiece.model and no {TOKENIZER}, which takes {' and '.join(missing)}, not "
            "installed: pip install "
            f"{' '.join(missing)}; or put the {TOKENIZER} of another T5 of the same vocabulary there"
        )


def check_decoder(parts: PipelineParts | None, channels: int) -> None:
    """Raise ModelError for a VAE whose latents have other channels than the denoiser."""
    if parts is None or not parts.has(VAE):
        return
    where = parts.folder / VAE / CONFIG
    got = read_json(where).get("latent_channels", 4)
    if got != channels:
        raise ModelError(
            f"{where}: latent_channels: got {shown(got)}; allowed {channels}, as its denoiser has, or {_left_out(VAE)}"
        )


def check_text_width(parts: PipelineParts | None, inputs: Sequence[ConditionInput]) -> None:
    """Raise ModelError where SDXL's second text encoder gives a pooled text of another width than the denoiser reads
    beside its sizes.
    """
    wanted = [one.shape[0] for one in inputs if one.name == "text_embeds"]
    if parts is None or not wanted or part_class(parts.index, TEXT_ENCODERS[1]) is None:
        return
    where = parts.folder / TEXT_ENCODERS[1] / CONFIG
    if where.is_file() and (got := read_json(where).get("projection_dim", 512)) != wanted[0]:
        raise ModelError(
            f"{where}: projection_dim: got {shown(got)}; allowed {wanted[0]}, which the denoiser's "
            "projection_class_embeddings_input_dim "
            "leaves beside six sizes; SDXL's refiner, which reads five, is not taken"
        )


def _left_out(part: str) -> str:
    key = part.rstrip("_23")
    return f"pipeline.{key}: none takes none" if key == VAE else f"pipeline.{key}: none takes none of them"


@contextmanager
def _named(where: Path, name: str) -> Iterator[None]:
    """Inside, whatever diffusers and transformers raise on a damaged folder, from OSError to KeyError, becomes a
    ModelError.
    """
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{where}: cannot load this {name}: {str(error)[:1000]}") from error


def _found(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of its parent
        return False
