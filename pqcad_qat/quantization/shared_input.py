"""One quantized input for the layers of one module that read one tensor, such as to_q, to_k and to_v of an attention.

Not here: quantizers (brevitas_layers.py), and which layers share one (plan.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Held:
    """An input that was quantized for the first of the layers that read it."""

    x: Tensor
    state: tuple[Any, ...]
    y: Tensor
    waiting: int  # readers still to come


class SharedInput:
    """Quantizes for the first of `readers` layers that read the same tensor one after another; the last one lets go of
    the result.

    The readers are children of one module, never of two. Activation checkpointing runs a part of a network once more in
    the backward pass,
    by itself, and it must keep the same tensors then: a result that came from another part would be missing. Such a
    part mostly consists of whole modules. Where a module cuts itself into parts, torch's hooks for what a graph saves
    tell one part, and one run of it, from another.
    """

    def __init__(self, readers: int) -> None:
        self.readers = readers
        self.held: Held | None = None

    def quantized(self, x: Tensor, dtype: torch.dtype, quantize: Callable[[Tensor], Tensor]) -> Tensor:
        """What `quantize` makes of x, in `dtype`, which it chooses by itself."""
        if x.is_inference():  # such tensors do not tell whether they were written over
            return quantize(x)
        state = (x._version, torch.is_grad_enabled(), dtype, torch._C._autograd._top_saved_tensors_default_hooks(True))
        if self.held is None or self.held.x is not x or self.held.state != state:
            self.held = Held(x, state, quantize(x), self.readers)
        y = self.held.y
        self.held.waiting -= 1
        if not self.held.waiting:
            self.held = None
        return y

    def __reduce__(self) -> tuple[type[SharedInput], tuple[int]]:
        """A copy of the layers, made together, shares results among themselves and begins with none."""
        return SharedInput, (self.readers,)
