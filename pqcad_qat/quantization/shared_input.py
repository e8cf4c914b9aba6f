"""Quantization of an input once for all layers of a module that read it, such as to_q, to_k and to_v of an attention.

Not here: quantizers (brevitas_quantizers.py), and which layers share one (plan.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class SharedResult:
    """An input that was quantized for the first of its readers, and is kept for the others.

    Attributes:
        x: the input.
        state: what else the result depends on; see `SharedInput.quantized`.
        y: the quantized input.
        waiting: number of readers still to come.
    """

    x: Tensor
    state: tuple[Any, ...]
    y: Tensor
    waiting: int


class SharedInput:
    """Quantizes an input for the first of `readers` layers, and returns the same result to the others.

    The layers read the same tensor one after another. The last one releases the result.

    All readers are children of one module. The reason is activation checkpointing, which runs a part of a network
    again in the backward pass, by itself. That run must save the same tensors as the first, but a result that came
    from another part would be missing in it. Such a part usually consists of whole modules. For a module that divides
    itself into parts, torch's hooks for saved tensors are compared: they differ between parts, and between the runs of
    one part.
    """

    def __init__(self, readers: int) -> None:
        self.readers = readers
        self.shared: SharedResult | None = None

    def quantized(self, x: Tensor, dtype: torch.dtype, quantize: Callable[[Tensor], Tensor]) -> Tensor:
        """The result of `quantize` for x, whose dtype is `dtype`; it is computed only for the first reader.

        A kept result is reused under two conditions. x is the same object and was not written to since, which its
        version shows. The mode of autograd, the dtype and the hooks for saved tensors are the same as well.
        """
        if x.is_inference():  # inference tensors have no version, so writing to them would go unnoticed
            return quantize(x)
        state = (x._version, torch.is_grad_enabled(), dtype, torch._C._autograd._top_saved_tensors_default_hooks(True))
        if self.shared is None or self.shared.x is not x or self.shared.state != state:
            self.shared = SharedResult(x, state, quantize(x), self.readers)
        y = self.shared.y
        self.shared.waiting -= 1
        if not self.shared.waiting:
            self.shared = None
        return y

    def __reduce__(self) -> tuple[type[SharedInput], tuple[int]]:
        """A copy of the layers, made together, shares results among its own layers and starts without any."""
        return SharedInput, (self.readers,)
