"""Turn the published files of the anime64 model into safetensors.

    git clone --depth 1 https://github.com/wangjia184/diffusion_model
    python convert.py diffusion_model/docs/64x64_cosin_300

The files are those of a TensorFlow.js graph: `model.json` lists the tensors, with a scale and a minimum each, and the
shards hold them one after the other, as 8-bit integers. Keras numbers its layers in the order in which they were made,
kind by kind. anime64.py makes its modules in the same order, so the n-th convolution there is the n-th one here.
"""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from anime64 import WEIGHTS, UNet
from safetensors.torch import save_file
from torch import nn

Tensors = dict[tuple[str, int], dict[str, npt.NDArray[np.float32]]]
"""(kind of layer, its number) -> its tensors, by the name of what reads them."""

KINDS: dict[str, type[nn.Module]] = {
    "conv2d": nn.Conv2d,
    "dense": nn.Linear,
    "group_normalization": nn.GroupNorm,
}
"""Keras's name of a kind of layer -> torch's class."""

READERS = {
    "conv2d": ("Conv2D", "BiasAdd"),
    "dense": (("MatMul", "Tensordot"), "BiasAdd"),
    "group_normalization": ("Reshape_1", "Reshape_2"),
}
"""Which operations of a layer read its weight and its bias."""

LAYER = re.compile(r"(conv2d|dense|group_normalization)_(\d+)/(\w+)/ReadVariableOp$")


def read_tensors(folder: Path) -> Tensors:
    """Every weight and bias of the graph in float32."""
    (group,) = json.loads((folder / "model.json").read_text(encoding="utf-8"))["weightsManifest"]
    data = b"".join((folder / name).read_bytes() for name in group["paths"])
    tensors: Tensors = {}
    place = 0
    for entry in group["weights"]:
        quantization = entry.get("quantization")
        kind = np.dtype(quantization["dtype"] if quantization else entry["dtype"])
        count = math.prod(entry["shape"])
        values = np.frombuffer(data, kind, count, place).reshape(entry["shape"])
        place += count * kind.itemsize
        if match := LAYER.search(entry["name"]):
            # in float32 and in this order, as TensorFlow.js computes them
            scaled = values.astype(np.float32) * np.float32(quantization["scale"]) + np.float32(quantization["min"])
            tensors.setdefault((match[1], int(match[2])), {})[match[3]] = scaled
    return tensors


def state_dict(tensors: Tensors, model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors by torch's names, in torch's layout."""
    state = {}
    for kind, cls in KINDS.items():
        numbers = sorted(number for name, number in tensors if name == kind)
        modules = [(path, module) for path, module in model.named_modules() if isinstance(module, cls)]
        for number, (path, _) in zip(numbers, modules, strict=True):
            layer = tensors[kind, number]
            for name, readers in zip(("weight", "bias"), READERS[kind], strict=True):
                (values,) = (layer[reader] for reader in np.atleast_1d(readers) if reader in layer)
                state[f"{path}.{name}"] = torch.from_numpy(_in_torchs_layout(values))
    return state


def _in_torchs_layout(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """(H, W, I, O) -> (O, I, H, W), (I, O) -> (O, I); vectors stay as they are."""
    axes = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[values.ndim]
    return np.ascontiguousarray(values.transpose(axes))


def main(folder: Path) -> None:
    """Write the weights beside anime64.py."""
    model = UNet()
    state = state_dict(read_tensors(folder), model)
    model.load_state_dict(state)  # every tensor is there, in its shape
    save_file(state, WEIGHTS)
    print(f"{WEIGHTS}: {sum(value.numel() for value in state.values()) / 1e6:.1f} million parameters")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
