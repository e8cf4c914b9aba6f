"""Recording of what every quantized layer reads in one forward pass.

The recordings are kept in files, because for a large model they exceed the weights in size.

Not here: the comparison that uses the recordings (proof.py).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pqcad_qat.models.denoiser import DenoiserInput, predict
from pqcad_qat.models.watched_layers import watched_inputs
from pqcad_qat.quantization.conversion import quantized_layers


class LayerInputs(Mapping[str, npt.NDArray[np.float32]]):
    """Layer name -> its input before quantization, (B, C, H, W) or (..., I), read from a file at each access."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._files = files

    def __getitem__(self, layer: str) -> npt.NDArray[np.float32]:
        values: npt.NDArray[np.float32] = np.load(self._files[layer])
        return values

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


@contextmanager
def recorded_inputs(model: nn.Module, inputs: DenoiserInput, beside: Path) -> Iterator[LayerInputs]:
    """Record the input of every quantized layer while the model predicts once, in the units of its quantizer.

    Layers that share an input quantizer share a file. The files are deleted when the context ends.

    Args:
        model: a quantized and calibrated model.
        inputs: the arguments of `predict`.
        beside: the folder in which the temporary files are written.
    """
    layers = quantized_layers(model)
    leaders = dict.fromkeys(layer.plan.input_group for layer in layers.values())
    with tempfile.TemporaryDirectory(prefix=".inputs-", dir=beside) as folder:
        files = {leader: Path(folder) / f"{place}.npy" for place, leader in enumerate(leaders)}
        watched = [
            (layers[leader], partial(_write, file, layers[leader].input_quant.factors))
            for leader, file in files.items()
        ]
        with watched_inputs(watched), torch.no_grad():
            predict(model.eval(), *inputs)
        yield LayerInputs({name: files[layer.plan.input_group] for name, layer in layers.items()})


def _write(file: Path, factors: Tensor | None, tensor: Tensor) -> None:
    tensor = tensor.detach()
    np.save(file, (tensor if factors is None else tensor * factors).numpy())
