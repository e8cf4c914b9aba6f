"""The shipped policies w4a8 and w8a8 on models that nobody here made, with nothing changed but the source.

Not here: how roles are found (tests/quantization/test_layer_roles.py), or any training.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from own_networks import conv
from tiny_runs import POLICIES, REPOSITORY, SCHEDULER
from torch import Tensor, nn

from pqcad_qat.models.own_model import OwnModel
from pqcad_qat.policy.loading import load_policy
from pqcad_qat.quantization.plan import plan_with_remarks
from pqcad_qat.quantization.plan_facts import executes_int8, float_layers
from pqcad_qat.quantization.quantizable_layers import quantizable_layers
from pqcad_qat.quantization.shortcuts import split_shortcuts
from pqcad_qat.stages.prepared import planned_shapes, with_own_model

BITS = {"w4a8": (7, 4), "w8a8": (8, 8)}
"""Policy -> widths of the weights at the ends of a network, and of all others."""

ANIME64 = Path(os.environ.get("PQCAD_QAT_ANIME64", REPOSITORY.parent / "shared" / "models" / "anime64"))
"""Folder of a public model of 63 million parameters: anime64.py and its weights."""


class Unusual(nn.Module):
    """Convolutions alone, none with a name that diffusers would give it: x (B, 3, 16, 16), t (B,) -> (B, 3, 16, 16)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = conv(3), conv(8, 3)
        self.trunk = nn.ModuleList(conv() for _ in range(2))
        self.shift = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.stem(x) + (t.float() / 1000)[:, None, None, None] * self.shift[:, None, None]
        for layer in self.trunk:
            h = h + layer(F.silu(h))
        y: Tensor = self.head(F.silu(h))
        return y


@pytest.mark.parametrize("name", BITS)
def test_a_module_of_unusual_names_and_without_linear_layers_is_planned_and_deployed_on_trial(name: str) -> None:
    ends, body = BITS[name]
    own = OwnModel("unusual", Unusual, (3, 16, 16), SCHEDULER)
    denoiser, plan, remarks = planned_shapes(with_own_model(load_policy(POLICIES / f"{name}.yaml"), own), own)
    assert float_layers(denoiser, plan) == ("stem",)
    assert {layer.name: layer.weights.bits for layer in plan} == {"head": ends, "trunk.0": body, "trunk.1": body}
    assert remarks == (
        "quantization.layers.ends.match: 'role:time' matches no Conv2d or Linear of the model",
        "quantization.layers.body.match: 'type:Linear' matches no Conv2d or Linear of the model",
    )


@pytest.fixture(scope="module")
def anime64() -> nn.Module:
    """Anime64 with random weights, its shortcuts split."""
    if not (ANIME64 / "anime64.py").is_file():
        pytest.skip(f"no anime64.py in {ANIME64}; PQCAD_QAT_ANIME64 may name another folder")
    sys.path.append(str(ANIME64))
    try:
        module: Any = import_module("anime64")
    finally:
        sys.path.remove(str(ANIME64))
    with torch.device("meta"):
        return split_shortcuts(module.UNet().eval(), example())


def example() -> tuple[Tensor, Tensor]:
    return torch.zeros(1, 3, 64, 64, device="meta"), torch.zeros(1, dtype=torch.long, device="meta")


@pytest.mark.parametrize("name", BITS)
def test_a_public_model_is_planned_whole(name: str, anime64: nn.Module) -> None:
    ends, body = BITS[name]
    policy = load_policy(POLICIES / f"{name}.yaml")
    plan, remarks = plan_with_remarks(anime64, policy.quantization.layers, policy.progressive.ladder, example())
    assert remarks == ()
    assert float_layers(anime64, plan) == ("conv_in",)
    assert all(executes_int8(layer) for layer in plan)
    edges = [layer for layer in quantizable_layers(anime64) if layer == "conv_out" or "time" in layer]
    assert len(edges) == 25
    assert {layer.name: layer.weights.bits for layer in plan} == {
        layer: ends if layer in edges else body for layer in quantizable_layers(anime64) if layer != "conv_in"
    }
