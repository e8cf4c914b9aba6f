"""Activations that the backward pass computes again: the same gradients and the same statistics from less memory.

Not here: the rest of a training step (test_trainer.py, test_step_profile.py).
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conditional_models import saved
from conftest import tiny_unet
from diffusers import UNet2DModel
from rich.console import Console
from torch import Tensor, nn

from pqcad_qat.diffusion.denoiser import predict, recomputed_activations
from pqcad_qat.errors import ModelError
from pqcad_qat.policy.schema import Policy
from pqcad_qat.quantization.conversion import calibrate_ranges, quantize_model, quantized_layers
from pqcad_qat.quantization.quantizers import begin_blend, set_blend
from pqcad_qat.stages.prepared import prepare
from pqcad_qat.training import trouble
from pqcad_qat.training.callback import Batch
from pqcad_qat.training.checkpoint import CheckpointFolder
from pqcad_qat.training.quantization_aware import FullPrecisionMatching
from pqcad_qat.training.stage import StageSettings, train_stage
from pqcad_qat.training.step_profile import profile_steps
from pqcad_qat.training.trainer import LoopSettings


@pytest.fixture(scope="module")
def calibrated(tiny_policy: Policy) -> nn.Module:
    """The tiny model quantized, every other layer in a transition; tests copy it, so that their first forward pass is its first."""
    prepared = prepare(tiny_policy)
    model = quantize_model(prepared.split, prepared.plan)
    calibrate_ranges(model, [(batch(0)["x_t"], batch(0)["t"])])
    for layer in list(quantized_layers(model).values())[::2]:
        if len(layer.plan.ladder) > 1:
            begin_blend(layer, layer.plan.ladder[1])
            set_blend(layer, 0.5)
    return model


def batch(step: int) -> Batch:
    dice = torch.Generator().manual_seed(step)
    x, target = (torch.randn(4, 1, 32, 32, generator=dice) for _ in range(2))
    return {"x_t": x, "t": torch.tensor([900, 600, 300, 0]), "target": target}


def gradients(model: nn.Module, again: bool) -> dict[str, Tensor]:
    model.train().zero_grad()
    data = batch(1)
    with recomputed_activations(model, again):
        (model(data["x_t"], data["t"], return_dict=False)[0] - data["target"]).square().mean().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_gradients_are_the_same_to_the_last_bit_and_no_statistic_moves(calibrated: nn.Module) -> None:
    model = copy.deepcopy(calibrated)
    kept, recomputed = gradients(copy.deepcopy(calibrated), again=False), gradients(model, again=True)
    assert kept.keys() == recomputed.keys() == dict(calibrated.named_parameters()).keys()
    assert [name for name, value in kept.items() if not torch.equal(value, recomputed[name])] == []
    assert [name for name, value in model.state_dict().items() if not torch.equal(value, calibrated.state_dict()[name])] == []


def test_the_blocks_of_a_transformer_compute_again_as_well(tmp_path: Path) -> None:
    model = saved("dit", tmp_path / "dit").denoiser.train()
    x, labels = torch.randn(2, 4, 8, 8), {"class_labels": torch.tensor([1, 3])}
    found = []
    for again in (False, True):
        model.zero_grad()
        with recomputed_activations(model, again):
            predict(model, x, 500, labels).square().mean().backward()
        found.append({name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None})
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def stage(model: nn.Module, folder: Path, again: bool) -> nn.Module:
    settings = StageSettings(
        "toy", LoopSettings(2, learning_rate=1e-4), "fp32", CheckpointFolder(folder), folder / "logs", activation_checkpointing=again
    )
    train_stage(model, [FullPrecisionMatching()], batch, settings, Console(quiet=True))
    return model


def test_a_stage_ends_with_the_same_weights_and_inputs_are_looked_at_once(
    calibrated: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The watch reads every layer's input at step 0 of 2; what is computed again is not read again."""
    looked: list[Any] = []
    use = trouble.input_use
    monkeypatch.setattr(trouble, "input_use", lambda layer, *rest: looked.append(id(layer)) or use(layer, *rest))
    ends = [stage(copy.deepcopy(calibrated), tmp_path / str(again), again) for again in (False, True)]
    assert [name for name, value in ends[0].state_dict().items() if not torch.equal(value, ends[1].state_dict()[name])] == []
    assert len(looked) == len(set(looked)) == 2 * len(quantized_layers(calibrated))
    assert not any(getattr(module, "gradient_checkpointing", False) for module in ends[1].modules())


def test_a_profile_shows_that_less_is_kept_and_less_is_needed_at_once(calibrated: nn.Module) -> None:
    plain, again = copy.deepcopy(calibrated), copy.deepcopy(calibrated)
    with recomputed_activations(again, True):
        found = profile_steps(
            {name: (model, [FullPrecisionMatching()]) for name, model in (("plain", plain), ("again", again))}, batch, "fp32", 0.0, 1
        )
    assert found["again"].kept_bytes < 0.7 * found["plain"].kept_bytes
    assert found["again"].peak_bytes < 0.8 * found["plain"].peak_bytes
    assert found["plain"].peak_bytes > found["plain"].kept_bytes


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (lambda: nn.Linear(2, 2), "Linear"),
        (
            lambda: UNet2DModel(**{**dict(tiny_unet().config), "down_block_types": ("SkipDownBlock2D", "DownBlock2D")}),
            r"down_blocks\.0 \(SkipDownBlock2D\)",
        ),
    ],
    ids=["no diffusers model", "a block without it"],
)
def test_an_architecture_that_cannot_is_an_error_that_names_what_cannot(model: Any, named: str) -> None:
    with (
        pytest.raises(ModelError, match=f"training.activation_checkpointing: got true; allowed false: .*{named}"),
        recomputed_activations(model(), True),
    ):
        pass
    with recomputed_activations(model(), False):
        pass
