"""Modules that are held on the machine's accelerator while they are called many times.

Not here: training on one, which Accelerate cares for.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from paper_models import small_unet
from torch import nn

from pqcad_qat.machine import accelerators
from pqcad_qat.machine.accelerators import accelerator, device_of, on_accelerator
from pqcad_qat.models.denoiser import predict

GPU, CPU = torch.device("cuda"), torch.device("cpu")


class Travelled(nn.Linear):
    """A module that notes where it is sent, and stays."""

    def __init__(self) -> None:
        super().__init__(1, 1)
        self.places: list[Any] = []

    def to(self, *places: Any, **_: Any) -> Travelled:
        self.places += places
        return self


def test_modules_go_to_the_accelerator_and_come_back_whatever_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerators, "accelerator", lambda: GPU)
    tf32, modules = torch.backends.cudnn.allow_tf32, (Travelled(), Travelled())

    def interrupted() -> None:
        with on_accelerator(*modules):
            assert not torch.backends.cudnn.allow_tf32
            assert [module.places for module in modules] == [[GPU], [GPU]]
            raise ValueError("midway")

    with pytest.raises(ValueError, match="midway"):
        interrupted()
    assert [module.places for module in modules] == [[GPU, CPU], [GPU, CPU]]
    assert torch.backends.cudnn.allow_tf32 == tf32


def test_without_an_accelerator_nothing_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerators, "accelerator", lambda: None)
    module = Travelled()
    with on_accelerator(module):
        pass
    assert module.places == []


@pytest.mark.skipif(accelerator() is None, reason="torch sees no accelerator")
@torch.no_grad()
def test_a_prediction_comes_back_to_where_the_state_is() -> None:
    denoiser, x_t = small_unet(16), torch.randn(2, 3, 16, 16)
    wanted = predict(denoiser, x_t, 500)
    with on_accelerator(denoiser):
        assert device_of(denoiser) != CPU
        found = predict(denoiser, x_t, 500)
    assert (found.device, device_of(denoiser)) == (CPU, CPU)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
