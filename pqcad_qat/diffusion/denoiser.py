"""Where a full-precision denoiser comes from and goes to, and the one signature by which every denoiser is called.

Not here: which classes of diffusers are known (architectures.py), plain modules of the user's own (registry.py), quantized denoisers
(quantization/conversion.py), nor sampling.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
from diffusers.models.embeddings import LabelEmbedding
from safetensors.torch import save_file
from torch import Tensor, nn

from pqcad_qat.diffusion.architectures import (
    TEXT_TOKENS,
    Architecture,
    ConditionInput,
    architecture_of,
    check_config,
    known_architecture,
)
from pqcad_qat.diffusion.flow import FLOW_SCHEDULER
from pqcad_qat.diffusion.registry import REGISTERED, RegisteredDenoiser, registered, registered_as
from pqcad_qat.errors import ModelError
from pqcad_qat.policy.schema import EMBEDDED

WEIGHTS = "diffusion_pytorch_model.safetensors"
PARTS = ("unet", "transformer")
"""Folders of a diffusers pipeline that hold a denoiser."""
SCHEDULER_CONFIG = Path("scheduler") / "scheduler_config.json"

SHARD = "-" + "-of-".join(["[0-9]" * 5] * 2)
"""In the name of a file that holds a part of the weights, such as model-00001-of-00002.safetensors."""

WEIGHTS_AND_CONFIGS = (
    "model_index.json",
    "scheduler/*.json",
    *(f"{part}/config.json" for part in (*PARTS, "vae", "text_encoder*")),
    *(
        f"{weights}{kind}"
        for weights in (*(f"{part}/diffusion_pytorch_model" for part in (*PARTS, "vae")), "text_encoder*/model")
        for kind in (".safetensors", ".safetensors.index.json", f"{SHARD}.safetensors")
    ),
    *(f"tokenizer*/*.{kind}" for kind in ("json", "txt", "model")),
)
"""Of a hub id: a whole pipeline's files, less other formats and variants of its weights, such as model.fp16.safetensors."""

Condition = Mapping[str, Tensor]
"""What a denoiser takes beside x_t and t, by name, each (B, ...); {} where it takes nothing."""

DenoiserInput = tuple[Tensor, Tensor, Condition]
"""(x_t (B, C, H, W), t (B,), condition)."""

PredictArguments = DenoiserInput | tuple[Tensor, Tensor]
"""What follows the denoiser in a call of `predict`."""


@dataclass(frozen=True)
class DiffusionModel:
    """A full-precision denoiser with the scheduler it was trained for.

    Attributes:
        denoiser: called by `predict`; float32, in evaluation mode.
        scheduler_config: diffusers' scheduler config.
        source: as the user named it.
        digest: SHA-256 over the weights and both configs.
        custom: what a plain module of the user's own was registered with; None for a class of diffusers, whose config says it.
        folder: in diffusers' layout, of the pipeline that it is part of; None of a module of the user's own.
    """

    denoiser: nn.Module
    scheduler_config: dict[str, Any]
    source: str
    digest: str
    custom: RegisteredDenoiser | None = None
    folder: Path | None = None

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of x_t."""
        if self.custom:
            return self.custom.sample_shape
        return self._architecture.sample_shape(cast(Any, self.denoiser).config)

    @property
    def latent(self) -> bool:
        return is_latent(self.sample_shape)

    @property
    def condition_inputs(self) -> tuple[ConditionInput, ...]:
        """What the denoiser takes beside x_t and t, in the order in which it is exported."""
        if self.custom:
            return self.custom.conditions
        return self._architecture.conditions(cast(Any, self.denoiser).config)

    @property
    def _architecture(self) -> Architecture:
        found = architecture_of(self.denoiser)
        assert found is not None
        return found

    @property
    def example(self) -> DenoiserInput:
        """One sample of zeros, which the denoiser accepts, on its device."""
        with next((parameter.device for parameter in self.denoiser.parameters()), torch.device("cpu")):
            condition = {
                wanted.name: torch.zeros(1, *(size or TEXT_TOKENS for size in wanted.shape), dtype=getattr(torch, wanted.dtype))
                for wanted in self.condition_inputs
            }
            return torch.zeros(1, *self.sample_shape), torch.zeros(1, dtype=torch.long), condition


def is_latent(sample_shape: tuple[int, int, int]) -> bool:
    """Whether an x_0 (C, H, W) is no picture: neither of one channel nor of three."""
    return sample_shape[0] not in (1, 3)


def predict(denoiser: nn.Module, x_t: Tensor, t: Tensor | float, condition: Condition | None = None) -> Tensor:
    """The denoiser's prediction (B, C, H, W) at x_t (B, C, H, W) and time step t, a number or (B,).

    Channels after those of x_t, a learned variance, are cut off. A plain module is called as `denoiser(x_t, t, **condition)`.
    """
    steps = t.to(x_t.device) if isinstance(t, Tensor) else torch.tensor(t, device=x_t.device)
    steps = steps if steps.shape == x_t.shape[:1] else steps.expand(x_t.shape[0])
    if (architecture := architecture_of(denoiser)) is None:
        found = denoiser(x_t, steps, **(condition or {}))
    else:
        found = architecture.call(denoiser, x_t, steps, architecture.keywords(condition or {}))
    prediction = cast(Tensor, found if isinstance(found, Tensor) else found[0])
    return prediction if prediction.shape[1] == x_t.shape[1] else prediction[:, : x_t.shape[1]]


@contextmanager
def recomputed_activations(denoiser: nn.Module, wanted: bool) -> Iterator[None]:
    """Inside, if wanted, the denoiser's blocks keep their inputs alone and compute the rest again in the backward pass (Chen et al. 2016).

    Raises:
        ModelError: diffusers cannot do so for this architecture, or for some of its blocks.
    """
    if not wanted:
        yield
        return
    model = cast(Any, denoiser)
    blocks = {name: block for name, block in denoiser.named_modules() if re.fullmatch(r"(down_blocks|up_blocks)\.\d+|mid_block", name)}
    without = [f"{name} ({type(block).__name__})" for name, block in blocks.items() if not hasattr(block, "gradient_checkpointing")]
    kept_whole = not blocks and not hasattr(denoiser, "gradient_checkpointing")  # of a transformer the model itself holds the switch
    if not getattr(model, "_supports_gradient_checkpointing", False) or kept_whole or without:
        what = f"its blocks {', '.join(without)}" if without else type(denoiser).__name__
        raise ModelError(f"training.activation_checkpointing: got true; allowed false: diffusers has none for {what}")
    model.enable_gradient_checkpointing()
    try:
        yield
    finally:
        model.disable_gradient_checkpointing()


def load_model(source: str, sample_size: int | None = None) -> DiffusionModel:
    """Load `embedded:NAME`, `registered:NAME`, a local folder in diffusers layout, or a hub id; safetensors only.

    `sample_size` is the height and width of x_t where it is to be another than the model's own.

    Raises:
        ModelError: nothing is there, it is damaged, its denoiser is of a class that is not known, or it does not take that size.
    """
    if source.startswith(REGISTERED):
        if sample_size is not None:
            raise ModelError(f"model.sample_size: got {sample_size}; allowed null: {source} was registered with its own")
        return _load_registered(source)
    if source.startswith(EMBEDDED):
        with embedded_folder(source) as folder:
            return _load_folder(folder, source, sample_size)
    folder = Path(source).expanduser()
    return _load_folder(folder if folder.exists() else downloaded(source, WEIGHTS_AND_CONFIGS), source, sample_size)


@contextmanager
def embedded_folder(source: str) -> Iterator[Path]:
    """The folder of `embedded:NAME`, in diffusers layout.

    Raises:
        ModelError: there is none of that name.
    """
    resource = files("pqcad_qat.assets") / source.removeprefix(EMBEDDED)
    if not resource.joinpath("model_index.json").is_file():
        raise ModelError(f"model.source: got {source!r}; allowed {', '.join(embedded_models())}, a diffusers folder, or a hub id")
    with as_file(resource) as folder:
        yield folder


def embedded_models() -> list[str]:
    """The names that `load_model` takes without network or files."""
    assets = files("pqcad_qat.assets")
    return sorted(EMBEDDED + entry.name for entry in assets.iterdir() if entry.joinpath("model_index.json").is_file())


def denoiser_folder(folder: Path) -> Path:
    """The part of a pipeline's folder that holds its denoiser: the one that is there, unet/ where none is."""
    return next((folder / part for part in PARTS if (folder / part / "config.json").is_file()), folder / PARTS[0])


def untrained_denoiser(config: Mapping[str, Any], where: str) -> tuple[nn.Module, RegisteredDenoiser | None]:
    """A denoiser of a config that `save_model` wrote, before its weights are loaded, and what it was registered with, if it was.

    Raises:
        ModelError: a class that is not known, or a config that diffusers refuses.
    """
    if str(config.get("_class_name")).startswith(REGISTERED):
        told, module = registered(str(config["_class_name"]))
        return module.eval(), told
    architecture = known_architecture(config, where)
    try:
        denoiser: Any = getattr(diffusers, architecture.name).from_config(dict(config))
    except Exception as error:  # diffusers raises anything on a config that it cannot follow
        raise ModelError(f"{where}: diffusers makes no {architecture.name} of it: {error}") from error
    resize(denoiser, architecture, None)
    check_config(architecture, denoiser.config, where)
    return _without_label_dropout(denoiser).eval(), None


def _load_folder(folder: Path, source: str, sample_size: int | None) -> DiffusionModel:
    part = denoiser_folder(folder)
    config = read_json(part / "config.json")
    scheduler = read_json(folder / SCHEDULER_CONFIG)
    architecture = known_architecture(config, str(part / "config.json"))
    weights = part / WEIGHTS
    if not has_weights(weights):
        of_the_hub = not source.startswith(EMBEDDED) and not Path(source).expanduser().exists()
        why = f"; of the hub's {source} it was not fetched: it has none, or its copy here holds a part of it" if of_the_hub else ""
        raise ModelError(f"{weights}: no such file; weights are read from safetensors only{why}")
    try:
        denoiser, found = getattr(diffusers, architecture.name).from_pretrained(
            part, use_safetensors=True, low_cpu_mem_usage=False, output_loading_info=True
        )
    except Exception as error:  # diffusers raises anything from OSError to KeyError on a damaged folder
        raise ModelError(f"{part}: cannot load this model: {error}") from error
    if found["missing_keys"] or found["unexpected_keys"]:  # diffusers warns, and leaves what is missing random
        raise ModelError(f"{weights}: missing: {found['missing_keys']}; not of this model: {found['unexpected_keys']}")
    resize(denoiser, architecture, sample_size)
    check_config(architecture, denoiser.config, str(part / "config.json"))
    scheduler = architecture.scheduler(scheduler, architecture.sample_shape(denoiser.config)[1:])
    return replace(_model(_without_label_dropout(denoiser), scheduler, source), folder=folder)


def has_weights(path: Path) -> bool:
    """Whether weights are there by the name of their safetensors file, whole or in shards."""
    return path.is_file() or path.with_name(f"{path.name}.index.json").is_file()


def resize(denoiser: Any, architecture: Architecture, sample_size: int | None) -> None:
    """Write the height and width of x_t into the denoiser's config: those asked for, or its class's where its config has none.

    Raises:
        ModelError: a class that keeps its own.
    """
    if sample_size is not None and not architecture.resizable:
        raise ModelError(f"model.sample_size: got {sample_size}; allowed null: {architecture.name} keeps its own")
    size = sample_size or denoiser.config.get("sample_size") or architecture.default_size
    if size != denoiser.config.get("sample_size"):
        denoiser.register_to_config(sample_size=size)


def _without_label_dropout(denoiser: nn.Module) -> nn.Module:
    """Class labels are never dropped at random in training: what the model is to match was recorded with its label."""
    for module in denoiser.modules():
        if isinstance(module, LabelEmbedding):
            module.dropout_prob = 0.0
    return denoiser


def downloaded(source: str, patterns: Sequence[str]) -> Path:
    """The folder of a hub id with the files that the patterns name; nothing of it is run.

    Raises:
        ModelError: the hub cannot be reached, or has none of that name.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=list(patterns)))
    except Exception as error:  # the hub client raises anything from OSError to its own HTTP errors
        reason = str(error).splitlines()[0]
        raise ModelError(f"model.source: got {source!r}: no such folder, and it cannot be loaded from the hub: {reason}") from error


def _load_registered(source: str) -> DiffusionModel:
    told, denoiser = registered(source)
    return _model(denoiser, dict(told.scheduler_config), source, told)


def _model(denoiser: Any, scheduler: dict[str, Any], source: str, custom: RegisteredDenoiser | None = None) -> DiffusionModel:
    denoiser = denoiser.float().eval()
    own = {"sample_shape": custom.sample_shape, "conditions": [str(wanted) for wanted in custom.conditions]} if custom else denoiser.config
    configs = [{key: value for key, value in part.items() if not key.startswith("_")} for part in (own, scheduler)]
    digest = hashlib.sha256(json.dumps(configs, sort_keys=True, default=str).encode())  # without paths and versions
    for name, value in sorted(denoiser.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return DiffusionModel(denoiser, scheduler, source, digest.hexdigest(), custom)


def save_model(denoiser: nn.Module, scheduler_config: Mapping[str, Any], folder: Path) -> None:
    """Write a denoiser as a diffusers pipeline folder: model_index.json, unet/ or transformer/, scheduler/."""
    architecture = architecture_of(denoiser)
    part = folder / (architecture.part if architecture else PARTS[0])
    if architecture:
        cast(Any, denoiser).save_pretrained(part, safe_serialization=True)
        config = read_json(part / "config.json")
        config.pop("_name_or_path", None)  # where it was once loaded from is nobody's business
    else:
        config = {"_class_name": registered_as(denoiser)}
        part.mkdir(parents=True, exist_ok=True)
        save_file({name: value.detach().clone().contiguous() for name, value in denoiser.state_dict().items()}, part / WEIGHTS)
    write_json(part / "config.json", config)
    write_json(folder / SCHEDULER_CONFIG, scheduler_config)
    write_json(folder / "model_index.json", model_index(denoiser, scheduler_config))


def model_index(denoiser: nn.Module, scheduler_config: Mapping[str, Any]) -> dict[str, Any]:
    """diffusers' index of a pipeline: which class each part is. Only without conditions are denoiser and scheduler a whole pipeline."""
    architecture = architecture_of(denoiser)
    name, part = (architecture.name, architecture.part) if architecture else (None, PARTS[0])
    whole = architecture is not None and name == "UNet2DModel" and not architecture.conditions(cast(Any, denoiser).config)
    pipeline = "DDIMPipeline" if whole else "DiffusionPipeline"
    scheduler = FLOW_SCHEDULER if scheduler_config.get("_class_name") == FLOW_SCHEDULER else "DDIMScheduler"
    return {"_class_name": pipeline, "scheduler": ["diffusers", scheduler], part: ["diffusers" if name else None, name]}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a model folder.

    Raises:
        ModelError: no such file, or it does not hold a JSON object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file; a folder in diffusers layout holds unet/config.json and scheduler/") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path}: got a JSON {type(found).__name__}; allowed an object")
    return found


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(content), indent=2) + "\n", encoding="utf-8")
