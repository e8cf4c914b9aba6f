"""The policies that ship: what each says of itself, and its plan on the model it is for.

Not here: what a policy may say (test_policy_schema.py).
"""

from __future__ import annotations

import copy
import re
from functools import lru_cache
from pathlib import Path

import pytest
import torch
import yaml
from conditional_models import saved, write_embeddings
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DModel
from tiny_runs import POLICIES

from pqcad_qat.commands.run import prepare
from pqcad_qat.models.conditions import chosen_conditions, conditioned
from pqcad_qat.models.denoiser import DiffusionModel
from pqcad_qat.models.model_folder import embedded_models
from pqcad_qat.models.model_loading import load_model
from pqcad_qat.policy.loading import load_policy, load_pretrain_policy
from pqcad_qat.policy.schema import Policy
from pqcad_qat.policy.shipped import SCHEMA
from pqcad_qat.policy.study_cells import load_study
from pqcad_qat.quality.feature_network import load_features
from pqcad_qat.quantization.plan import LayerPlan, plan_layers
from pqcad_qat.quantization.plan_facts import executes_int8, expected_bytes, float_layers
from pqcad_qat.quantization.shortcuts import split_shortcuts

PRETRAINED = {  # (channels, pixels), and the parameters promised, in millions
    "fashion-mnist": ((1, 32), (2, 6)),
    "digits": ((1, 16), (0.5, 1)),
    "noto-emoji": ((3, 32), (2, 6)),
}
WEIGHT_BITS = {  # of the layers between the first and the last
    "w8a8": {8},
    "w8a8-qat": {8},
    "w8a8-ptq": {8},
    "w4a8-ptq": {4},
    "w4a8": {4},
    "mixed": {2},
    "w6a6": {6},
    "w3a8": {3},
    "w2a8": {2},
    "w4a6": {4},
    "w4a4": {4},
    "smoke": {4},
    "w4a8-digits": {4},
    "w4a8-noto-emoji": {4},
}
EDGES = r"conv_out|time_embedding\..*|.*\.time_emb_proj"
"""The layers that make the prediction or read the time step alone, in the embedded architectures."""

CONDITIONAL = ("w4a8-digits-classes", "w4a8-dit", "w8a8-sd3", "w8a8-flux")
"""On models that do not ship: one that a command makes, and the user's own."""

LARGE = ("w4a8-sd15", "w8a8-sd15", "w8a8-sdxl", "w8a8-dit-xl-2", "w8a8-pixart")
"""On models of the hub (test_large_policies.py)."""

STUDIES = {
    "data-sets": (3, 3),  # combinations, seeds
    "bits": (42, 3),
    "bits-digits": (42, 3),
    "steps": (8, 3),
    "steps-digits": (16, 3),
    "momentum": (9, 3),
    "momentum-digits": (9, 3),
    "scales-digits": (9, 3),
    "extremes": (6, 3),
    "extremes-digits": (6, 3),
    "post-training": (36, 1),
    "low-rank": (6, 3),
    "starts": (6, 3),
    "smoke": (2, 1),
    "paper": (4, 1),
}


def data_of(name: str) -> str:
    """The data of the embedded model that a policy is for."""
    return next((data for data in PRETRAINED if name.endswith(f"-{data}")), "fashion-mnist")


@lru_cache
def untrained(data: str) -> DiffusionModel:
    """The architecture that a pretraining policy describes."""
    config = {
        key: value
        for key, value in load_pretrain_policy(POLICIES / f"pretrain-{data}.yaml").model.items()
        if key != "class"
    }
    torch.manual_seed(0)
    return DiffusionModel(UNet2DModel(**config).eval(), {"num_train_timesteps": 1000}, data, "")


def planned(policy: Policy, model: DiffusionModel) -> tuple[LayerPlan, ...]:
    denoiser = copy.deepcopy(model.denoiser)
    if policy.quantization.split_shortcuts:
        split_shortcuts(denoiser, model.example)
    plan = plan_layers(denoiser, policy.quantization.layers, policy.progressive.ladder, model.example)
    assert float_layers(denoiser, plan) == ("conv_in",)
    return plan


def test_all_of_them_ship() -> None:
    assert {path.stem for path in POLICIES.glob("*.yaml")} == {
        *WEIGHT_BITS,
        *CONDITIONAL,
        *LARGE,
        *(f"pretrain-{data}" for data in (*PRETRAINED, "digits-classes")),
    }


@pytest.mark.parametrize("path", sorted(POLICIES.rglob("*.yaml")), ids=lambda path: path.stem)
def test_each_opens_with_what_it_is_for_and_its_command(path: Path) -> None:
    modeline, *lines = path.read_text(encoding="utf-8").splitlines()
    header = lines[: next(number for number, line in enumerate(lines) if not line.startswith("#"))]
    kind = yaml.safe_load(path.read_text(encoding="utf-8")).get("kind")
    command = {"study": "sweep", "pretrain": "pretrain"}.get(kind, "run")
    schema = re.fullmatch(r"# yaml-language-server: \$schema=(.*)", modeline)
    assert schema is not None
    assert (path.parent / schema[1]).resolve() == (POLICIES / SCHEMA).resolve()
    assert re.match(r"# [A-Z0-9].*[.:,]", header[0])
    wanted = f"#     python -m pqcad_qat {command} policies/{path.relative_to(POLICIES)}"
    assert any(re.sub(r" --(jobs 2|model FOLDER|module \S+)$", "", line) == wanted for line in header)


def test_the_class_conditional_policy_fits_the_model_that_its_pretraining_makes() -> None:
    policy, model = load_policy(POLICIES / "w4a8-digits-classes.yaml"), untrained("digits-classes")
    assert policy.model.source == str(
        POLICIES.parent / "runs" / load_pretrain_policy(POLICIES / "pretrain-digits-classes.yaml").name / "model"
    )
    conditions = chosen_conditions(conditioned(model), policy.conditions)
    assert (conditions.choices["class_labels"].tolist(), conditions.null_class) == (list(range(10)), 10)
    assert all(executes_int8(layer) for layer in planned(policy, model))


@pytest.mark.parametrize("name", ["dit", "pixart"])
def test_the_policy_of_diffusion_transformers_plans_all_but_the_layer_that_reads_the_state(
    name: str, tmp_path: Path
) -> None:
    policy, model = load_policy(POLICIES / "w4a8-dit.yaml"), saved(name, tmp_path / "model")
    plan = plan_layers(model.denoiser, policy.quantization.layers, policy.progressive.ladder, model.example)
    assert float_layers(model.denoiser, plan) == ("pos_embed.proj",)
    assert {layer.weights.bits for layer in plan} == {4, 7}
    assert all(executes_int8(layer) for layer in plan)


@pytest.mark.parametrize(
    ("name", "source", "steps", "reader"),
    [
        ("sd3", "stabilityai/stable-diffusion-3.5-medium", (40, 20), "pos_embed.proj"),
        ("flux", "black-forest-labs/FLUX.1-schnell", (4, 2), "x_embedder"),
    ],
)
def test_each_policy_of_a_flow_names_its_model_and_plans_all_but_the_layer_that_reads_the_state(
    name: str, source: str, steps: tuple[int, int], reader: str, tmp_path: Path
) -> None:
    policy = load_policy(POLICIES / f"w8a8-{name}.yaml")
    assert (policy.model.source, policy.sampler.name, policy.sampler.steps, policy.distillation.student_steps) == (
        source,
        None,
        *steps,
    )
    assert (policy.conditions.prompts, policy.pipeline.text_encoder) == (str(POLICIES / "prompts.txt"), "auto")
    saved(name, tmp_path / "model")
    embeddings = write_embeddings(name, tmp_path / "prompts.safetensors")
    instead = ["conditions.prompts=null", "conditions.tokens=null", f"conditions.embeddings={embeddings}"]
    prepared = prepare(load_policy(POLICIES / f"w8a8-{name}.yaml", [f"model.source={tmp_path / 'model'}", *instead]))
    assert float_layers(prepared.split, prepared.plan) == (reader,)
    assert all(executes_int8(layer) and layer.weights.bits == 8 for layer in prepared.plan)


@pytest.mark.parametrize(("name", "layers", "billions"), [("sd3", 392, 2.24), ("flux", 501, 11.9)])
def test_each_policy_of_a_flow_plans_its_model_at_full_size(name: str, layers: int, billions: float) -> None:
    """On the meta device, which holds shapes alone. The defaults of FluxTransformer2DModel are FLUX.1 schnell's."""
    medium = {
        "attention_head_dim": 64,
        "caption_projection_dim": 1536,
        "pos_embed_max_size": 384,
        "dual_attention_layers": tuple(range(13)),
    }
    shape = {
        "num_layers": 24,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 2048,
        "qk_norm": "rms_norm",
    }
    with torch.device("meta"):
        denoiser = SD3Transformer2DModel(**medium, **shape) if name == "sd3" else FluxTransformer2DModel()
        denoiser.register_to_config(sample_size=128)
        x, t, condition = DiffusionModel(denoiser, {}, name, "").example
        example = x.to("meta"), t.to("meta"), {key: value.to("meta") for key, value in condition.items()}
        plan = plan_layers(denoiser, load_policy(POLICIES / f"w8a8-{name}.yaml").quantization.layers, (8,), example)
    assert x.shape == (1, 16, 128, 128)
    assert len(plan) == layers
    assert sum(parameter.numel() for parameter in denoiser.parameters()) / 1e9 == pytest.approx(billions, rel=2e-3)


@pytest.mark.parametrize("name", WEIGHT_BITS)
def test_each_is_named_as_its_file_and_takes_the_embedded_model_and_features(name: str) -> None:
    policy = load_policy(POLICIES / f"{name}.yaml")
    embedded = f"embedded:{data_of(name)}"
    assert (policy.name, policy.model.source, policy.features) == (name, embedded, embedded)
    assert policy.sampler.steps == 2 * policy.distillation.student_steps
    assert load_features(embedded).reference is not None


@pytest.mark.parametrize(("name", "widths"), WEIGHT_BITS.items())
def test_each_plans_every_layer_of_the_embedded_architecture_to_the_widths_of_its_name(
    name: str, widths: set[int]
) -> None:
    plan = planned(load_policy(POLICIES / f"{name}.yaml"), untrained(data_of(name)))
    edges = [layer for layer in plan if re.fullmatch(EDGES, layer.name)]
    inner = [layer for layer in plan if layer not in edges]
    assert {layer.weights.bits for layer in edges} == {{"w8a8": 8, "mixed": 2}.get(name.split("-")[0], 7)}
    assert {layer.weights.bits for layer in inner} == widths
    assert {layer.inputs.bits for layer in inner} == {int(name[3]) if name.startswith("w") else 8}
    assert all(layer.ladder[-1] == layer.weights.bits for layer in plan)


@pytest.mark.parametrize("name", WEIGHT_BITS)
def test_roles_name_the_layers_of_the_embedded_architecture_that_these_names_do(name: str) -> None:
    names = ["quantization.layers.first.match=conv_in", f"quantization.layers.ends.match=re:{EDGES}"]
    by_name, by_role = (load_policy(POLICIES / f"{name}.yaml", overrides) for overrides in (names, []))
    model = untrained(data_of(name))
    assert [vars(layer) | {"pattern": ""} for layer in planned(by_role, model)] == [
        vars(layer) | {"pattern": ""} for layer in planned(by_name, model)
    ]


@pytest.mark.parametrize("name", WEIGHT_BITS)
def test_each_plans_every_layer_for_int8_execution(name: str) -> None:
    assert all(
        executes_int8(layer) for layer in planned(load_policy(POLICIES / f"{name}.yaml"), untrained(data_of(name)))
    )


def test_the_default_policy_packs_to_at_most_a_sixth_of_the_float32_weights() -> None:
    policy, model = load_policy(POLICIES / "w4a8.yaml"), untrained("fashion-mnist")
    denoiser = split_shortcuts(copy.deepcopy(model.denoiser), model.example)
    plan = plan_layers(denoiser, policy.quantization.layers, policy.progressive.ladder, model.example)
    weights = 4 * sum(parameter.numel() for parameter in model.denoiser.parameters())
    assert expected_bytes(denoiser, plan, packed=True) <= 0.16 * weights


@pytest.mark.parametrize("data", PRETRAINED)
def test_each_pretraining_policy_describes_a_model_of_the_promised_size_with_attention(data: str) -> None:
    (channels, pixels), (least, most) = PRETRAINED[data]
    model, policy = untrained(data), load_pretrain_policy(POLICIES / f"pretrain-{data}.yaml")
    assert (policy.name, policy.data.source) == (data, data)
    assert least <= sum(parameter.numel() for parameter in model.denoiser.parameters()) / 1e6 <= most
    assert model.sample_shape == (channels, pixels, pixels)
    assert any("attentions" in name for name, _ in model.denoiser.named_modules())


@pytest.mark.parametrize("source", embedded_models())
def test_each_embedded_model_is_what_its_pretraining_policy_makes(source: str) -> None:
    data = source.removeprefix("embedded:")
    policy = load_pretrain_policy(POLICIES / f"pretrain-{data}.yaml")
    embedded = load_model(source)
    found = embedded.denoiser.state_dict()
    assert {name: value.shape for name, value in found.items()} == {
        n: v.shape for n, v in untrained(data).denoiser.state_dict().items()
    }
    scheduler = embedded.scheduler_config
    for key in ("beta_schedule", "prediction_type", "timestep_spacing"):
        assert scheduler[key] == getattr(policy.scheduler, key)


@pytest.mark.parametrize("name", WEIGHT_BITS)
def test_each_is_ready_to_run_on_the_embedded_model(name: str) -> None:
    assert prepare(load_policy(POLICIES / f"{name}.yaml")).plan


@pytest.mark.parametrize("name", STUDIES)
def test_each_study_is_named_as_its_file_and_has_its_cells(name: str) -> None:
    combinations, seeds = STUDIES[name]
    study = load_study(POLICIES / "studies" / f"{name}.yaml")
    assert (study.name, len(study.cells)) == (name, combinations * seeds)
    assert {path.stem for path in (POLICIES / "studies").glob("*.yaml")} == set(STUDIES)


def test_the_study_of_bits_has_every_combination_of_widths_that_ships() -> None:
    policies = {cell.labels["policy"] for cell in load_study(POLICIES / "studies" / "bits.yaml").cells}
    assert policies == {name for name in WEIGHT_BITS if re.fullmatch(r"w\da\d", name)}
