"""The policies for models that do not ship, on their architectures at full size: which layers each plans, and for what.

Not here: weights, which a plan does without; what a small architecture costs on its way to a deployed folder
(test_rehearse.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from diffusers import DDIMScheduler
from tiny_runs import POLICIES
from torch import nn

from pqcad_qat.models.conditions import conditioned
from pqcad_qat.models.untrained import shapes_of
from pqcad_qat.policy.loading import load_policy
from pqcad_qat.policy.schema import ConditionsPolicy
from pqcad_qat.quantization.plan import LayerPlan
from pqcad_qat.quantization.plan_facts import executes_int8, expected_bytes, float_layers
from pqcad_qat.sampling.trajectory import noise_schedule
from pqcad_qat.stages.prepared import planned_shapes


@dataclass(frozen=True)
class Large:
    """What a policy promises.

    Attributes:
        hub: the model that it names.
        architecture: of that model, as it ships here.
        floating: the layer that reads x_t.
        layers: planned, halves of shortcuts each.
        takes: the conditions.
        given: keys of the policy's section that give them.
        bits: weights -> a layer that has so many.
    """

    hub: str
    architecture: str
    floating: str
    layers: int
    takes: tuple[str, ...]
    given: list[str]
    bits: Mapping[int, str]


TEXT = ("encoder_hidden_states",)
LARGE = {
    "w4a8-sd15": Large(
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "stable-diffusion-v1-5",
        "conv_in",
        293,
        TEXT,
        ["prompts"],
        {4: "mid_block.resnets.0.conv1", 7: "mid_block.resnets.0.time_emb_proj"},
    ),
    "w8a8-sd15": Large(
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "stable-diffusion-v1-5",
        "conv_in",
        293,
        TEXT,
        ["prompts"],
        {8: "conv_out"},
    ),
    "w8a8-sdxl": Large(
        "stabilityai/stable-diffusion-xl-base-1.0",
        "sdxl-base-1.0",
        "conv_in",
        802,
        (*TEXT, "text_embeds", "time_ids"),
        ["prompts"],
        {8: "add_embedding.linear_1"},
    ),
    "w8a8-dit-xl-2": Large(
        "facebook/DiT-XL-2-256",
        "DiT-XL-2-256",
        "pos_embed.proj",
        254,
        ("class_labels",),
        [],
        {8: "transformer_blocks.0.norm1.linear"},
    ),
    "w8a8-pixart": Large(
        "PixArt-alpha/PixArt-XL-2-512x512",
        "PixArt-XL-2-512x512",
        "pos_embed.proj",
        286,
        (*TEXT, "encoder_attention_mask"),
        ["prompts"],
        {8: "adaln_single.linear"},
    ),
}
PARAMETERS = {  # as published; of DiT as diffusers lays it out, each block with time and label embeddings of its own
    "stable-diffusion-v1-5": 859_520_964,
    "sdxl-base-1.0": 2_567_463_684,
    "DiT-XL-2-256": 749_826_464,
    "PixArt-XL-2-512x512": 610_856_096,
}


@pytest.fixture(scope="module", params=LARGE)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def planned(name: str) -> tuple[nn.Module, tuple[LayerPlan, ...]]:
    policy = load_policy(POLICIES / f"{name}.yaml", [f"model.source={LARGE[name].architecture}"])
    denoiser, plan, remarks = planned_shapes(policy)
    assert remarks == ()
    return denoiser, plan


def test_each_names_the_real_model_it_is_for(name: str) -> None:
    policy = load_policy(POLICIES / f"{name}.yaml")
    assert (policy.name, policy.model.source) == (name, LARGE[name].hub)
    assert policy.sampler.guidance_scale > 1
    assert policy.training.activation_checkpointing
    assert [key for key, value in policy.conditions if value != ConditionsPolicy.model_fields[key].default] == LARGE[
        name
    ].given


def test_each_plans_all_but_the_layer_that_reads_the_state_and_all_of_them_for_int8(
    name: str, planned: tuple[nn.Module, tuple[LayerPlan, ...]]
) -> None:
    denoiser, plan = planned
    assert float_layers(denoiser, plan) == (LARGE[name].floating,)
    assert len(plan) == LARGE[name].layers
    assert all(executes_int8(layer) for layer in plan)
    assert {layer.weights.bits for layer in plan} == LARGE[name].bits.keys()
    widths = {layer.name: layer.weights.bits for layer in plan}
    assert {bits: widths[layer] for bits, layer in LARGE[name].bits.items()} == {
        bits: bits for bits in LARGE[name].bits
    }


def test_each_plan_tells_its_size_without_any_weights(
    name: str, planned: tuple[nn.Module, tuple[LayerPlan, ...]]
) -> None:
    denoiser, plan = planned
    assert {parameter.device.type for parameter in denoiser.parameters()} == {"meta"}
    share = expected_bytes(denoiser, plan, packed=True) / expected_bytes(denoiser, (), packed=False)
    assert share < (0.14 if name.startswith("w4") else 0.29)  # a DiT's tables of labels stay in floating point


@pytest.mark.parametrize("architecture", PARAMETERS)
def test_each_architecture_has_its_published_size_and_takes_its_conditions(architecture: str) -> None:
    model = shapes_of(architecture)
    assert sum(parameter.numel() for parameter in model.denoiser.parameters()) == PARAMETERS[architecture]
    (takes,) = {large.takes for large in LARGE.values() if large.architecture == architecture}
    assert tuple(wanted.name for wanted in conditioned(model).inputs) == takes


def test_the_schedulers_of_latent_models_clip_nothing() -> None:
    latent = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    # PixArt's config has no clip_sample
    solvers = ("DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "PNDMScheduler")
    for scheduler in (
        {"_class_name": "DDIMScheduler", "clip_sample": False},
        *({"_class_name": name} for name in solvers),
    ):
        assert noise_schedule({**latent, **scheduler}).clip_sample_range is None
    assert (
        noise_schedule({**latent, "_class_name": "DDIMScheduler"}).clip_sample_range
        == DDIMScheduler().config.clip_sample_range
    )


def test_the_prompts_that_ship_are_one_a_line_and_none_twice() -> None:
    lines = Path(POLICIES / "prompts.txt").read_text(encoding="utf-8").splitlines()
    assert len(lines) == len(set(lines)) == 32
    assert all(line.strip() == line != "" for line in lines)
