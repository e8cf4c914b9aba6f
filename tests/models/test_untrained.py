"""Denoisers from their configs alone: that shapes plan as weights do, and that random weights repeat.

Not here: the architectures that ship at full size (test_large_policies.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conditional_models import MODELS, Plain, saved
from small_networks import unet_config
from tiny_runs import SCHEDULER

from pqcad_qat.errors import ModelError
from pqcad_qat.models.denoiser import DiffusionModel, predict
from pqcad_qat.models.model_folder import denoiser_folder
from pqcad_qat.models.model_loading import load_model
from pqcad_qat.models.own_model import OwnModel
from pqcad_qat.models.untrained import (
    architectures,
    fixed_inputs,
    noise_condition,
    noise_inputs,
    random_denoiser,
    shapes_of,
)
from pqcad_qat.policy.layer_rules import LayerRule, numbered
from pqcad_qat.quantization.plan import LayerPlan, plan_layers
from pqcad_qat.quantization.plan_facts import expected_bytes
from pqcad_qat.quantization.shortcuts import rewritable, split_shortcuts

RULES = [LayerRule.model_validate({"match": ["*"], "weights": {"bits": 4}, "inputs": {"bits": 8}})]


def planned(model: DiffusionModel) -> tuple[tuple[LayerPlan, ...], int]:
    denoiser = split_shortcuts(rewritable(model.denoiser), model.example)
    plan = plan_layers(denoiser, numbered(RULES), (8,), model.example)
    return plan, expected_bytes(denoiser, plan, packed=True)


@pytest.mark.parametrize("name", MODELS)
def test_shapes_plan_as_weights_do(name: str, tmp_path: Path) -> None:
    model = saved(name, tmp_path / "model")
    for weights in (tmp_path / "model").rglob("*.safetensors"):
        weights.unlink()
    shapes = shapes_of(str(tmp_path / "model"))
    assert {parameter.device.type for parameter in shapes.denoiser.parameters()} == {"meta"}
    assert (shapes.sample_shape, shapes.scheduler_config, shapes.condition_inputs) == (
        model.sample_shape,
        model.scheduler_config,
        model.condition_inputs,
    )
    assert planned(shapes) == planned(model)


def test_shapes_of_an_embedded_model_are_its_own() -> None:
    shapes, model = shapes_of("embedded:digits"), load_model("embedded:digits")
    assert {n: v.shape for n, v in shapes.denoiser.state_dict().items()} == {
        n: v.shape for n, v in model.denoiser.state_dict().items()
    }


def test_a_module_of_the_users_own_is_built_whole() -> None:
    own = OwnModel("whole", Plain, (1, 8, 8), SCHEDULER)
    model = shapes_of(own.source, own=own)
    assert {parameter.device.type for parameter in model.denoiser.parameters()} == {"cpu"}


def test_a_copy_to_rewrite_shares_its_weights_and_leaves_the_model_as_it_is(tmp_path: Path) -> None:
    model = saved("text_unet", tmp_path)
    before = [type(module) for module in model.denoiser.modules()]
    copied = split_shortcuts(rewritable(model.denoiser), model.example)
    assert (
        [type(module) for module in model.denoiser.modules()] == before != [type(module) for module in copied.modules()]
    )
    assert copied.get_parameter("conv_in.weight") is model.denoiser.get_parameter("conv_in.weight")


@pytest.mark.parametrize(("name", "of"), [("dit", "DiTTransformer2DModel"), ("pixart", "PixArtTransformer2DModel")])
def test_a_config_that_names_the_former_class_of_a_transformer_is_of_its_present_one(
    name: str, of: str, tmp_path: Path
) -> None:
    model = saved(name, tmp_path)
    path = denoiser_folder(tmp_path) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "_class_name": "Transformer2DModel"}))
    assert type(shapes_of(str(tmp_path)).denoiser).__name__ == type(load_model(str(tmp_path)).denoiser).__name__ == of
    with torch.no_grad():
        assert torch.equal(
            predict(load_model(str(tmp_path)).denoiser, *model.example), predict(model.denoiser, *model.example)
        )


def test_the_architecture_of_cifar10_ships_with_one_attention_head_and_its_published_size() -> None:
    assert "ddpm-cifar10-32" in architectures()
    denoiser = shapes_of("ddpm-cifar10-32").denoiser
    assert sum(parameter.numel() for parameter in denoiser.parameters()) == 35_746_307
    assert {module.heads for module in denoiser.modules() if type(module).__name__ == "Attention"} == {1}


def test_random_weights_are_the_same_every_time_and_leave_the_random_state_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first, second = (random_denoiser(unet_config(), "config") for _ in range(2))
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(first.get_parameter("conv_in.weight"), second.get_parameter("conv_in.weight"))


@pytest.mark.parametrize("name", MODELS)
def test_noise_fits_the_model_and_repeats(name: str, tmp_path: Path) -> None:
    model = saved(name, tmp_path)
    first, second = noise_inputs(model, 3, seed=1), noise_inputs(model, 3, seed=1)
    for one, other in zip(
        (first[0], first[1], *first[2].values()), (second[0], second[1], *second[2].values()), strict=True
    ):
        assert torch.equal(one, other)
    with torch.no_grad():
        assert predict(model.denoiser, *first).shape == first[0].shape
    for wanted in fixed_inputs(model.condition_inputs):
        value = noise_condition([wanted], 64)[wanted.name]
        assert (value.shape, value.dtype) == ((64, *wanted.shape), getattr(torch, wanted.dtype))
        if wanted.bound is not None:
            assert 0 <= int(value.min()) < int(value.max()) < wanted.bound


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "an empty folder": (lambda _: None, r"config\.json: got no such file; allowed a denoiser's config in"),
    "an unknown class": (
        lambda path: path.write_text('{"_class_name": "Unheard"}'),
        r"_class_name: got 'Unheard'; allowed UNet2DModel",
    ),
    "sizes that do not fit": (
        lambda path: path.write_text(json.dumps(unet_config(block_out_channels=[8, 12], norm_num_groups=8))),
        r"UNet2DModel",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_makes_no_denoiser_is_refused(fault: str, tmp_path: Path) -> None:
    write, message = FAULTS[fault]
    write(tmp_path / "config.json")
    with pytest.raises(ModelError, match=message):
        shapes_of(str(tmp_path))
