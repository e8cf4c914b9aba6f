"""Where a full-precision denoiser comes from and goes to, and the one signature by which every denoiser is called.

Not here: quantized denoisers (quantization/conversion.py), nor sampling.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from pqcad_qat.errors import ModelError

EMBEDDED = "embedded:"
WEIGHTS = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class DiffusionModel:
    """A full-precision denoiser with the scheduler it was trained for.

    Attributes:
        denoiser: called as `predict` does; float32, in evaluation mode.
        scheduler_config: diffusers' scheduler config.
        source: as the user named it.
        digest: SHA-256 over the weights and both configs.
    """

    denoiser: nn.Module
    scheduler_config: dict[str, Any]
    source: str
    digest: str

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of x_t."""
        config = cast(Any, self.denoiser).config
        size = config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return config.in_channels, height, width

    @property
    def example(self) -> tuple[Tensor, Tensor]:
        """(x_t (1, C, H, W), t (1,)): arguments that the denoiser accepts."""
        return torch.zeros(1, *self.sample_shape), torch.zeros(1, dtype=torch.long)


def predict(denoiser: nn.Module, x_t: Tensor, t: Tensor | int) -> Tensor:
    """The denoiser's prediction (B, C, H, W) at x_t (B, C, H, W) and time step t, a number or (B,)."""
    steps = torch.as_tensor(t, device=x_t.device).expand(len(x_t))
    return cast(Tensor, denoiser(x_t, steps, return_dict=False)[0])


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
    if not getattr(model, "_supports_gradient_checkpointing", False) or not blocks or without:
        what = f"its blocks {', '.join(without)}" if without else type(denoiser).__name__
        raise ModelError(f"training.activation_checkpointing: got true; allowed false: diffusers has none for {what}")
    model.enable_gradient_checkpointing()
    try:
        yield
    finally:
        model.disable_gradient_checkpointing()


def load_model(source: str) -> DiffusionModel:
    """Load `embedded:NAME`, a local folder in diffusers layout, or a hub id; safetensors only.

    Raises:
        ModelError: nothing is there, it is damaged, or it is not a UNet2DModel.
    """
    if source.startswith(EMBEDDED):
        resource = files("pqcad_qat.assets") / source.removeprefix(EMBEDDED)
        if not resource.joinpath("model_index.json").is_file():
            raise ModelError(f"model.source: got {source!r}; allowed {', '.join(embedded_models())}, a diffusers folder, or a hub id")
        with as_file(resource) as folder:
            return _load_folder(folder, source)
    folder = Path(source).expanduser()
    return _load_folder(folder, source) if folder.exists() else _load_hub(source)


def embedded_models() -> list[str]:
    """The names that `load_model` takes without network or files."""
    assets = files("pqcad_qat.assets")
    return sorted(EMBEDDED + entry.name for entry in assets.iterdir() if entry.joinpath("model_index.json").is_file())


def _load_folder(folder: Path, source: str) -> DiffusionModel:
    config = read_json(folder / "unet" / "config.json")
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    if config.get("_class_name") != "UNet2DModel":
        raise ModelError(f"{folder / 'unet' / 'config.json'}: _class_name: got {config.get('_class_name')!r}; allowed UNet2DModel")
    weights = folder / "unet" / WEIGHTS
    if not weights.is_file():
        raise ModelError(f"{weights}: no such file; weights are read from safetensors only")
    try:
        denoiser, found = UNet2DModel.from_pretrained(
            folder / "unet", use_safetensors=True, low_cpu_mem_usage=False, output_loading_info=True
        )
    except Exception as error:  # diffusers raises anything from OSError to KeyError on a damaged folder
        raise ModelError(f"{folder / 'unet'}: cannot load this model: {error}") from error
    if found["missing_keys"] or found["unexpected_keys"]:  # diffusers warns, and leaves what is missing random
        raise ModelError(f"{weights}: missing: {found['missing_keys']}; not of this model: {found['unexpected_keys']}")
    return _model(denoiser, scheduler, source)


def _load_hub(source: str) -> DiffusionModel:
    from diffusers import DiffusionPipeline

    try:
        pipeline = DiffusionPipeline.from_pretrained(source, use_safetensors=True)
    except Exception as error:  # the hub client raises anything from OSError to its own HTTP errors
        reason = str(error).splitlines()[0]
        raise ModelError(f"model.source: got {source!r}: no such folder, and it cannot be loaded from the hub: {reason}") from error
    denoiser = getattr(pipeline, "unet", None)
    if not isinstance(denoiser, UNet2DModel):
        raise ModelError(f"model.source: got {source!r} with a denoiser of {type(denoiser).__name__}; allowed UNet2DModel")
    return _model(denoiser, dict(pipeline.scheduler.config), source)


def _model(denoiser: Any, scheduler: dict[str, Any], source: str) -> DiffusionModel:
    denoiser = denoiser.float().eval()
    configs = [{key: value for key, value in part.items() if not key.startswith("_")} for part in (denoiser.config, scheduler)]
    digest = hashlib.sha256(json.dumps(configs, sort_keys=True, default=str).encode())  # without paths and versions
    for name, value in sorted(denoiser.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return DiffusionModel(denoiser, scheduler, source, digest.hexdigest())


def save_model(denoiser: nn.Module, scheduler_config: Mapping[str, Any], folder: Path) -> None:
    """Write a denoiser as a diffusers pipeline folder: model_index.json, unet/, scheduler/."""
    cast(Any, denoiser).save_pretrained(folder / "unet", safe_serialization=True)
    config = read_json(folder / "unet" / "config.json")
    config.pop("_name_or_path", None)  # where it was once loaded from is nobody's business
    write_json(folder / "unet" / "config.json", config)
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler_config)
    write_json(folder / "model_index.json", model_index())


def model_index() -> dict[str, Any]:
    """diffusers' index of an unconditional pipeline: which class each part is."""
    return {"_class_name": "DDIMPipeline", "scheduler": ["diffusers", "DDIMScheduler"], "unet": ["diffusers", "UNet2DModel"]}


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
