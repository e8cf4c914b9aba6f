"""Every class of denoiser: what it takes, that our call is diffusers' own, its folder, and what is refused.

Not here: runs of them (test_conditional_runs.py).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conditional_models import (
    FLOW,
    MODELS,
    Plain,
    class_unet,
    conditions,
    dit,
    flux,
    pixart,
    saved,
    sd3,
    text_and_size_unet,
    text_unet,
)
from tiny_runs import SCHEDULER
from torch import Tensor

from pqcad_qat.errors import ModelError
from pqcad_qat.machine.json_files import read_json
from pqcad_qat.models.denoiser import DiffusionModel, predict
from pqcad_qat.models.families.family import ConditionInput
from pqcad_qat.models.families.table import families
from pqcad_qat.models.model_loading import load_model, model_index, save_model, untrained_denoiser
from pqcad_qat.models.own_model import OwnModel

TAKES = {
    "class_unet": ["class_labels () int64 in [0, 5)"],
    "text_unet": ["encoder_hidden_states (tokens, 24) float32"],
    "text_and_size_unet": [
        "encoder_hidden_states (tokens, 24) float32",
        "text_embeds (12) float32",
        "time_ids (6) int64 in [0, 4097)",
    ],
    "dit": ["class_labels () int64 in [0, 5)"],
    "pixart": ["encoder_hidden_states (tokens, 24) float32", "encoder_attention_mask (tokens) float32"],
    "sd3": ["encoder_hidden_states (tokens, 24) float32", "pooled_projections (12) float32"],
    "flux": ["encoder_hidden_states (tokens, 24) float32", "pooled_projections (12) float32", "guidance () float32"],
}


@pytest.fixture(scope="module", params=list(MODELS))
def named(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, DiffusionModel, Path]:
    folder = tmp_path_factory.mktemp(request.param) / "model"
    return request.param, saved(request.param, folder), folder


def flux_pipelines_call(denoiser: Any, x: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
    """As FluxPipeline calls its transformer: latents packed and unpacked, places of patches, time over 1000."""
    batch, channels, height, width = x.shape
    rows = x.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    ids = torch.zeros(height // 2, width // 2, 3)
    ids[..., 1] += torch.arange(height // 2)[:, None]
    ids[..., 2] += torch.arange(width // 2)[None, :]
    text = torch.zeros(condition["encoder_hidden_states"].shape[1], 3)
    rest = {"txt_ids": text, "img_ids": ids.reshape(-1, 3), **condition}
    found = denoiser(hidden_states=rows.reshape(batch, -1, 4 * channels), timestep=t / 1000, **rest).sample
    patches = found.view(batch, height // 2, width // 2, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(x.shape)


def as_diffusers_spells_it(name: str, condition: dict[str, Tensor]) -> dict[str, Any]:
    added = {key: condition[key] for key in ("text_embeds", "time_ids") if key in condition}
    rest = {key: value for key, value in condition.items() if key not in added}
    return {**rest, **({"added_cond_kwargs": added} if added else {})}


def test_a_model_says_what_it_takes(named: tuple[str, DiffusionModel, Path]) -> None:
    name, model, _ = named
    assert [str(wanted) for wanted in model.condition_inputs] == TAKES[name]


def test_a_prediction_is_that_of_diffusers_own_call(named: tuple[str, DiffusionModel, Path]) -> None:
    name, model, _ = named
    x, t, condition = torch.randn(3, *model.sample_shape), torch.tensor([1, 500, 999]), conditions(name, 3)
    with torch.no_grad():
        ours = predict(model.denoiser, x, t, condition)
        if name == "flux":
            theirs = flux_pipelines_call(model.denoiser, x, t, condition)
        else:
            theirs = model.denoiser(x, timestep=t, **as_diffusers_spells_it(name, condition)).sample
    assert ours.shape == x.shape
    assert torch.equal(ours, theirs[:, : x.shape[1]])
    assert (theirs.shape[1] == 2 * x.shape[1]) == (name in ("dit", "pixart"))  # a learned variance


def test_the_example_is_accepted(named: tuple[str, DiffusionModel, Path]) -> None:
    _, model, _ = named
    with torch.no_grad():
        assert predict(model.denoiser, *model.example).shape == (1, *model.sample_shape)


def test_a_folder_is_diffusers_own_and_gives_the_model_back(named: tuple[str, DiffusionModel, Path]) -> None:
    name, model, folder = named
    part = "unet" if name.endswith("unet") else "transformer"
    assert read_json(folder / "model_index.json")[part] == ["diffusers", type(model.denoiser).__name__]
    assert model_index(model.denoiser, model.scheduler_config)["_class_name"] == "DiffusionPipeline"
    again = untrained_denoiser(read_json(folder / part / "config.json"), "config")
    again.load_state_dict(model.denoiser.state_dict())
    assert load_model(str(folder)).digest == model.digest


@pytest.mark.parametrize(
    ("kind", "takes"), [("timestep", "class_labels () int64 in [0, 1000)"), ("identity", "class_labels (64) float32")]
)
def test_labels_may_be_embedded_as_time_steps_or_come_embedded(kind: str, takes: str, tmp_path: Path) -> None:
    model = saved("class_unet", tmp_path / "model", class_embed_type=kind, num_class_embeds=None)
    assert [str(wanted) for wanted in model.condition_inputs] == [takes]
    with torch.no_grad():
        assert predict(model.denoiser, *model.example).shape == (1, *model.sample_shape)


def test_labels_are_never_dropped_at_random(tmp_path: Path) -> None:
    """DiT drops a tenth of its labels in training, which would teach the student another class's prediction."""
    model = saved("dit", tmp_path / "dit")
    labels = torch.arange(4).repeat(64)
    x, t = torch.zeros(len(labels), *model.sample_shape), torch.full((len(labels),), 500)
    with torch.no_grad():
        still = predict(model.denoiser.eval(), x, t, {"class_labels": labels})
        assert torch.equal(predict(model.denoiser.train(), x, t, {"class_labels": labels}), still)


def test_another_size_of_x_t_may_be_asked_for(tmp_path: Path) -> None:
    for name, size in (("text_unet", 12), ("sd3", 12), ("flux", 12)):
        saved(name, tmp_path / name)
        model = load_model(str(tmp_path / name), size)
        assert model.sample_shape == (4, size, size)
        with torch.no_grad():
            assert predict(model.denoiser, *model.example).shape == (1, 4, size, size)
    assert model.digest != load_model(str(tmp_path / "flux")).digest
    for name, size, fault in (
        ("dit", 12, "model.sample_size: got 12; allowed null: DiT"),
        ("flux", 7, "sample_size: got 7; allowed even"),
    ):
        saved(name, tmp_path / name)
        with pytest.raises(ModelError, match=fault):
            load_model(str(tmp_path / name), size)


def test_flux_has_the_size_of_its_pipeline_and_the_shift_of_that_size(tmp_path: Path) -> None:
    saved("flux", tmp_path / "flux")
    config = tmp_path / "flux" / "transformer" / "config.json"
    plain = read_json(config)
    del plain["sample_size"]  # a folder of diffusers has none
    config.write_text(json.dumps(plain))
    scheduler = tmp_path / "flux" / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps({**FLOW, "use_dynamic_shifting": True}))
    model = load_model(str(tmp_path / "flux"))
    assert model.sample_shape == (4, 128, 128)
    assert DiffusionModel(untrained_denoiser(plain, "config"), {}, "config", "").sample_shape == (4, 128, 128)
    assert model.scheduler_config["shift"] == pytest.approx(math.exp(1.15))  # 4096 patches: the upper end
    smaller = load_model(str(tmp_path / "flux"), 32)
    assert smaller.scheduler_config["shift"] == pytest.approx(math.exp(0.5))  # 256: the lower


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_times_are_not_rounded_in_mixed_precision(name: str, tmp_path: Path) -> None:
    model, seen = saved(name, tmp_path / name).denoiser, []
    handle = model.time_text_embed.time_proj.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        predict(model, torch.randn(2, 4, 8, 8), 899.6, conditions(name, 2))
    handle.remove()
    torch.testing.assert_close(torch.stack(seen), torch.tensor([[899.6] * 2, [3500.0] * 2][: len(seen)]))


@pytest.mark.parametrize(
    ("model", "fault"),
    [
        (lambda: text_unet(addition_embed_type="text"), "addition_embed_type: got 'text'; allowed None, text_time"),
        (lambda: pixart(use_additional_conditions=True), "use_additional_conditions: got true"),
        (lambda: dit(out_channels=6), r"out_channels: got 6; allowed 4, as in_channels, or 8, with a learned variance"),
        (lambda: class_unet(sample_size=None), "sample_size: got null"),
        (lambda: sd3(sample_size=18), "sample_size: got 18; allowed multiples of 2 up to 16"),
        (lambda: flux(patch_size=2), "patch_size: got 2; allowed 1"),
    ],
)
def test_what_cannot_be_taken_is_refused_by_its_key(model: Any, fault: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    with pytest.raises(ModelError, match=fault):  # noqa: PT012
        save_model(model(), SCHEDULER, tmp_path / "model")
        assert load_model(str(tmp_path / "model")).sample_shape


def test_an_unknown_class_is_refused_with_those_that_are_known(tmp_path: Path) -> None:
    saved("dit", tmp_path / "model")
    config = tmp_path / "model" / "transformer" / "config.json"
    config.write_text(json.dumps({**read_json(config), "_class_name": "SanaTransformer2DModel"}))
    with pytest.raises(ModelError, match=f"got 'SanaTransformer2DModel'; allowed {', '.join(families())}"):
        load_model(str(tmp_path / "model"))


def test_sizes_of_sdxl_may_be_whole_numbers_or_floats() -> None:
    torch.manual_seed(0)
    model, condition = text_and_size_unet().eval(), conditions("text_and_size_unet", 2)
    x = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        whole = predict(model, x, 5, condition)
        assert torch.equal(predict(model, x, 5, {**condition, "time_ids": condition["time_ids"].float()}), whole)


def test_a_plain_module_is_a_source() -> None:
    torch.manual_seed(0)
    plain = Plain()
    own = OwnModel("plain", lambda: plain, (1, 8, 8), SCHEDULER, conditions=(ConditionInput("tone", (2,), "float32"),))
    model = load_model(own.source, own=own)
    assert (model.sample_shape, model.latent, [str(wanted) for wanted in model.condition_inputs]) == (
        (1, 8, 8),
        False,
        ["tone (2) float32"],
    )
    x, tone = torch.randn(2, 1, 8, 8), torch.randn(2, 2)
    with torch.no_grad():
        assert torch.equal(predict(model.denoiser, x, 7, {"tone": tone}), plain(x, torch.tensor([7, 7]), tone))


def test_what_builds_no_module_is_refused() -> None:
    own = OwnModel("number", lambda: 3, (1, 8, 8), SCHEDULER)  # type: ignore[arg-type,return-value]
    with pytest.raises(ModelError, match=r"got int from its build function; allowed a torch\.nn\.Module"):
        load_model(own.source, own=own)
