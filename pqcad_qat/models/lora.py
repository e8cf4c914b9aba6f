"""LoRA files (Hu et al. 2021, arXiv 2106.09685), added to a pipeline's weights: W + scale (alpha / rank) B A.

diffusers knows how Kohya's scripts, PEFT and itself name the matrices (`lora_state_dict`). The sum is computed here and
not by PEFT, since every matrix of the file must have a layer, and because transformers' text encoders take LoRA files
with its newest versions alone. In a convolution A is a kernel of `rank` channels, and B one of 1x1.

Not here: the rest of what a pipeline is made of (assembly.py).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import convert_state_dict_to_peft, convert_unet_state_dict_to_peft
from diffusers.utils.state_dict_utils import StateDictType
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from pqcad_qat.errors import ModelError
from pqcad_qat.machine.json_files import shown
from pqcad_qat.models.families.family import DENOISER_FOLDERS, TEXT_ENCODERS

A, B = ".lora_A.weight", ".lora_B.weight"
"""Endings of the names of a layer's two matrices, as PEFT has them: A (rank, inputs) and B (outputs, rank)."""

FIRST = (A, ".lora_down.weight", ".lora.down.weight", "_lora.down.weight", ".lora_linear_layer.down.weight")
"""Endings of A's name in files."""

ALPHA = ".alpha"
"""Ending of the name of a layer's alpha; without one, alpha is the rank."""

METADATA = "lora_adapter_metadata"
"""Entry of a file's header in which diffusers keeps what PEFT's LoraConfig says: `unet.lora_alpha` and so on."""


@dataclass(frozen=True)
class Lora:
    """A LoRA file.

    Attributes:
        file: safetensors.
        scale: factor of what it adds.
    """

    file: Path
    scale: float = 1.0


@torch.no_grad()
def add_lora(pipeline: Any, lora: Lora) -> int:
    """Add a LoRA to the weights of diffusers' pipeline, and return its number of layers.

    Raises:
        ModelError: the pipeline takes none, or a tensor of the file has no layer there, or is of another method.
    """
    kind = type(pipeline)
    if not hasattr(kind, "lora_state_dict"):
        raise ModelError(f"--loras: got {lora.file} for a {kind.__name__}; allowed for a pipeline that takes LoRA")
    named = _by_layer(pipeline, _without_alphas(load_file(lora.file)))
    factors = _factors(lora.file)
    strangers = [name for name, pair in named.items() if pair.keys() != {A, B} or not _fits(pipeline, name, pair)]
    if strangers or not named:
        got = "; ".join(_described(pipeline, name, named[name]) for name in strangers[:3]) if named else "no layer"
        raise ModelError(f"{lora.file}: got {got}; allowed a LoRA, no other adapter, of layers of this {kind.__name__}")
    for name, pair in named.items():
        weight, rank = _weight(pipeline, name), len(pair[A])
        added = pair[B].double().flatten(1) @ pair[A].double().flatten(1)
        weight += (lora.scale * factors(name, rank) * added.view(weight.shape)).to(weight.dtype)
    return len(named)


def _without_alphas(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the file's tensors with alpha / rank inside A, and with every alpha the rank."""
    scaled = dict(tensors)
    for name in tensors:
        if ending := next((ending for ending in FIRST if name.endswith(ending)), None):
            alpha, rank = name.removesuffix(ending) + ALPHA, len(tensors[name])
            if alpha in tensors:
                scaled[name] = tensors[name].float() * (float(tensors[alpha]) / rank)
                scaled[alpha] = torch.tensor(float(rank))
    return scaled


def _by_layer(pipeline: Any, tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return A and B by layer, PART.MODULE; a tensor that is neither stands under its own name."""
    unet = {"unet_config": pipeline.unet.config} if hasattr(pipeline, "unet") else {}
    state = type(pipeline).lora_state_dict(tensors, **unet)
    named: dict[str, dict[str, Tensor]] = {}
    for name, value in (state[0] if isinstance(state, tuple) else state).items():
        part, _, rest = name.partition(".")
        for module, found in _of_peft(part, {rest: value}).items():
            ending = next((ending for ending in (A, B) if module.endswith(ending)), "")
            layer = module.removesuffix(ending)
            if part in TEXT_ENCODERS and not hasattr(getattr(pipeline, part, None), "text_model"):
                layer = layer.removeprefix("text_model.")  # of older versions of transformers
            named.setdefault(f"{part}.{layer}", {})[ending] = found
    return named


def _of_peft(part: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a part by PEFT's names."""
    if part in DENOISER_FOLDERS:
        return dict(convert_unet_state_dict_to_peft(tensors))
    old = any("_lora." in name for name in tensors)
    return dict(convert_state_dict_to_peft(tensors, StateDictType.DIFFUSERS_OLD if old else StateDictType.DIFFUSERS))


def _weight(pipeline: Any, name: str) -> Tensor:
    """Return the weight of the layer PART.MODULE.

    Raises:
        AttributeError: there is none.
    """
    part, _, module = name.partition(".")
    weight = getattr(pipeline, part).get_submodule(module).weight
    assert isinstance(weight, Tensor)
    return weight


def _fits(pipeline: Any, name: str, pair: Mapping[str, Tensor]) -> bool:
    """Whether the layer exists, and its weight has the size of B A."""
    try:
        weight = _weight(pipeline, name)
    except AttributeError:
        return False
    a, b = pair[A].flatten(1), pair[B].flatten(1)
    return b.shape[1] == len(a) and (len(b), a.shape[1]) == (len(weight), weight[0].numel())


def _described(pipeline: Any, name: str, pair: Mapping[str, Tensor]) -> str:
    """What is wrong with a layer's tensors, in a few words."""
    try:
        weight = tuple(_weight(pipeline, name).shape)
    except AttributeError:
        return f"{shown(name)}, which is no layer"
    if pair.keys() != {A, B}:
        return f"{shown(name)} with {', '.join(sorted(pair)) or 'neither of its two matrices'}"
    return f"{shown(name)} with A {tuple(pair[A].shape)} and B {tuple(pair[B].shape)} for a weight {weight}"


def _factors(file: Path) -> Any:
    """Return the function (layer, rank) -> alpha / rank that the file's header gives; 1 where it says nothing.

    Raises:
        ModelError: the header asks for another method than LoRA.
    """
    with safe_open(file, "pt") as tensors:
        said = json.loads((tensors.metadata() or {}).get(METADATA, "{}"))
    if other := [key for key, value in said.items() if value and key.endswith(("use_dora", "lora_bias"))]:
        raise ModelError(f"{file}: {METADATA}: {other[0]}: got {said[other[0]]}; allowed false")

    def factor(layer: str, rank: int) -> float:
        part, _, module = layer.partition(".")
        alpha = said.get(f"{part}.lora_alpha", rank)
        for pattern, own in (said.get(f"{part}.alpha_pattern") or {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                alpha = own
        return float(alpha) / (math.sqrt(rank) if said.get(f"{part}.use_rslora") else rank)

    return factor
