"""Every class of denoiser: what it takes, that our call is diffusers' own, its folder, and what is refused.

Not here: runs of them (test_conditional_runs.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conditional_models import MODELS, Plain, class_unet, conditions, dit, pixart, saved, text_and_size_unet, text_unet
from conftest import SCHEDULER
from torch import Tensor

from pqcad_qat.diffusion.architectures import ARCHITECTURES, ConditionInput
from pqcad_qat.diffusion.denoiser import DiffusionModel, load_model, model_index, predict, read_json, save_model, untrained_denoiser
from pqcad_qat.diffusion.registry import register_denoiser
from pqcad_qat.errors import ModelError

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
}


@pytest.fixture(scope="module", params=list(MODELS))
def named(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, DiffusionModel, Path]:
    folder = tmp_path_factory.mktemp(request.param) / "model"
    return request.param, saved(request.param, folder), folder


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
    part = "transformer" if name in ("dit", "pixart") else "unet"
    assert read_json(folder / "model_index.json")[part] == ["diffusers", type(model.denoiser).__name__]
    assert model_index(model.denoiser)["_class_name"] == "DiffusionPipeline"
    again, custom = untrained_denoiser(read_json(folder / part / "config.json"), "config")
    assert custom is None
    again.load_state_dict(model.denoiser.state_dict())
    assert load_model(str(folder)).digest == model.digest


@pytest.mark.parametrize(("kind", "takes"), [("timestep", "class_labels () int64 in [0, 1000)"), ("identity", "class_labels (64) float32")])
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


@pytest.mark.parametrize(
    ("model", "fault"),
    [
        (lambda: text_unet(addition_embed_type="text"), "addition_embed_type: got 'text'; allowed None, text_time"),
        (lambda: pixart(use_additional_conditions=True), "use_additional_conditions: got true"),
        (lambda: dit(out_channels=6), r"out_channels: got 6; allowed 4, as in_channels, or 8, with a learned variance"),
        (lambda: class_unet(sample_size=None), "sample_size: got null"),
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
    config.write_text(json.dumps({**read_json(config), "_class_name": "SD3Transformer2DModel"}))
    with pytest.raises(ModelError, match=f"got 'SD3Transformer2DModel'; allowed {', '.join(ARCHITECTURES)}"):
        load_model(str(tmp_path / "model"))


def test_sizes_of_sdxl_may_be_whole_numbers_or_floats() -> None:
    torch.manual_seed(0)
    model, condition = text_and_size_unet().eval(), conditions("text_and_size_unet", 2)
    x = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        whole = predict(model, x, 5, condition)
        assert torch.equal(predict(model, x, 5, {**condition, "time_ids": condition["time_ids"].float()}), whole)


def test_a_plain_module_is_a_source_once_it_is_registered() -> None:
    torch.manual_seed(0)
    plain = Plain()
    register_denoiser("plain", lambda: plain, (1, 8, 8), SCHEDULER, (ConditionInput("tone", (2,), "float32"),))
    model = load_model("registered:plain")
    assert (model.sample_shape, model.latent, [str(wanted) for wanted in model.condition_inputs]) == (
        (1, 8, 8),
        False,
        ["tone (2) float32"],
    )
    x, tone = torch.randn(2, 1, 8, 8), torch.randn(2, 2)
    with torch.no_grad():
        assert torch.equal(predict(model.denoiser, x, 7, {"tone": tone}), plain(x, torch.tensor([7, 7]), tone))


def test_what_nobody_registered_is_refused_with_what_was() -> None:
    register_denoiser("known", Plain, (1, 8, 8), SCHEDULER)
    with pytest.raises(ModelError, match=r"got 'registered:unknown'; registered in this process: .*registered:known"):
        load_model("registered:unknown")
    register_denoiser("number", lambda: 3, (1, 8, 8), SCHEDULER)  # type: ignore[arg-type,return-value]
    with pytest.raises(ModelError, match=r"its build function returned int; allowed a torch\.nn\.Module"):
        load_model("registered:number")
