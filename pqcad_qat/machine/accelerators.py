"""The machine's accelerator, such as a GPU, for whatever calls a network many times.

Not here: training, whose modules Accelerate moves (training/trainer.py), and OpenVINO's devices.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def accelerator() -> torch.device | None:
    """Return the accelerator that torch can use; None where there is none."""
    return torch.accelerator.current_accelerator(check_available=True)


def device_of(module: nn.Module) -> torch.device | None:
    """Return the device of a module's Parameters; None where it has none."""
    return next((parameter.device for parameter in module.parameters()), None)


@contextmanager
def on_accelerator(*modules: nn.Module) -> Iterator[None]:
    """Hold modules on the accelerator within this context, if there is one, and put them back after it.

    Convolutions and products keep the whole float32 there: TF32 would round integers of 8 bits together with their
    scales.
    """
    device, before = accelerator(), [(module, device_of(module)) for module in modules]
    if device is None:
        yield
        return
    tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        for module in modules:
            module.to(device)
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = tf32
        for module, place in before:
            module.to(place)
