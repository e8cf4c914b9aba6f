"""Modules that are held on the machine's accelerator while they are called many times.

Not here: training on one, which Accelerate cares for.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from paper_models import small_unet
from torch import Tensor, nn

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


class Elsewhere(nn.Module):
    """A denoiser on another device, which notes where its arguments are."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, device="meta"))
        self.places: list[str] = []

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        self.places += [value.device.type for value in (x, t, label)]
        return torch.ones(x.shape)


@pytest.mark.parametrize("t", [500, torch.tensor([500, 20])])
def test_all_arguments_go_to_where_the_denoiser_is(t: Tensor | float) -> None:
    denoiser = Elsewhere()
    found = predict(denoiser, torch.zeros(2, 1, 4, 4), t, {"label": torch.zeros(2)})
    assert denoiser.places == ["meta", "meta", "meta"]
    assert torch.equal(found, torch.ones(2, 1, 4, 4))


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
