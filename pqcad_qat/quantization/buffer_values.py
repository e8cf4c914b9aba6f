"""Values of buffers that hold one number, read without waiting for an accelerator where that can be avoided.

Not here: which buffers there are (brevitas_quantizers.py).
"""

from __future__ import annotations

from collections.abc import MutableMapping

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

_READ: MutableMapping[Tensor, tuple[int, float]] = WeakTensorKeyDictionary()
"""Buffer on an accelerator -> its version when it was last read or written, and its value then.

A tensor's version is torch's count of the writes to it.
"""


def buffer_value(module: nn.Module, name: str) -> float:
    """A buffer's value as a number.

    On an accelerator a read waits for the device. So the buffer is read again only after it was written to, and the
    forward pass does not wait.
    """
    buffer = module._buffers[name]
    assert buffer is not None
    if buffer.device.type == "cpu":
        return buffer.item()
    version, value = _READ.get(buffer, (-1, 0.0))
    if version != buffer._version:
        value = buffer.item()
        _READ[buffer] = (buffer._version, value)
    return float(value)


def write_buffer(module: nn.Module, name: str, value: float) -> None:
    """Write a buffer so that `buffer_value` knows its value without waiting for the accelerator."""
    buffer = module._buffers[name]
    assert buffer is not None
    buffer.fill_(value)
    if buffer.device.type != "cpu":
        _READ[buffer] = (buffer._version, torch.tensor(value, dtype=buffer.dtype).item())
