"""A quantized model on disk: the same predictions after a round trip, plain diffusers on its unet/, and damaged
folders.

Not here: the deployed folder (test_export_model.py), nor how a student is trained.
"""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, UNet2DModel
from safetensors.torch import load_file, save_file
from tiny_runs import POLICIES, SCHEDULER, tiny_overrides
from torch import Tensor, nn

from pqcad_qat.errors import ModelError
from pqcad_qat.models.denoiser import DiffusionModel, predict
from pqcad_qat.models.model_loading import load_model
from pqcad_qat.policy.loading import load_policy
from pqcad_qat.quantization.conversion import calibrate_ranges, quantize_model, quantized_layers
from pqcad_qat.quantization.layer_state import quantized_weight, set_weight_bits
from pqcad_qat.quantization.plan import LayerPlan, plan_layers
from pqcad_qat.quantization.shortcuts import merge_shortcuts, split_shortcuts
from pqcad_qat.quantization.student_folder import is_quantized_folder, load_quantized, save_quantized
from pqcad_qat.sampling.schedulers import DDIM_KEYS

STATE = Path("quantization") / "model.safetensors"
PLAN = Path("quantization") / "plan.json"


def quantized(model: DiffusionModel, source: Path, splits: bool) -> tuple[nn.Module, tuple[LayerPlan, ...]]:
    """The tiny model with the default policy's quantizers at their target widths, ranges from noise."""
    policy = load_policy(POLICIES / "smoke.yaml", tiny_overrides(source))
    denoiser = copy.deepcopy(model.denoiser)
    if splits:
        split_shortcuts(denoiser, model.example)
    plan = plan_layers(denoiser, policy.quantization.layers, policy.progressive.ladder, model.example)
    quantize_model(denoiser, plan)
    calibrate_ranges(denoiser, [noise(0)])
    layers = quantized_layers(denoiser)
    for layer in plan:
        set_weight_bits(layers[layer.name], layer.weights.bits)
    return denoiser.eval(), plan


def noise(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 1, 32, 32, generator=generator), torch.tensor([10, 300, 600, 999])


@pytest.fixture(scope="module")
def saved(
    tiny_model: DiffusionModel, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, nn.Module, tuple[LayerPlan, ...]]:
    """(folder, the model that was saved, its plan), with its shortcuts split."""
    return save(tiny_model, tiny_folder, True, tmp_path_factory.mktemp("student") / "student")


def save(
    model: DiffusionModel, source: Path, splits: bool, folder: Path
) -> tuple[Path, nn.Module, tuple[LayerPlan, ...]]:
    denoiser, plan = quantized(model, source, splits)
    save_quantized(folder, denoiser, plan, splits, scheduler_config=model.scheduler_config, steps=2)
    return folder, denoiser, plan


@pytest.fixture
def folder(saved: tuple[Path, nn.Module, tuple[LayerPlan, ...]], tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(saved[0], tmp_path / "student"))


def test_a_round_trip_gives_identical_predictions_the_plan_and_the_steps(
    saved: tuple[Path, nn.Module, tuple[LayerPlan, ...]],
) -> None:
    folder, model, plan = saved
    loaded, loaded_plan, steps = load_quantized(folder)
    assert (loaded_plan, steps) == (plan, 2)
    assert loaded.sample_shape == (1, 32, 32)
    with torch.no_grad():
        assert torch.equal(predict(loaded.denoiser, *noise(1)), predict(model, *noise(1)))


def test_a_model_whose_shortcuts_are_whole_comes_back_too(
    tiny_model: DiffusionModel, tiny_folder: Path, tmp_path: Path
) -> None:
    folder, model, plan = save(tiny_model, tiny_folder, False, tmp_path / "student")
    assert not any(layer.name.endswith((".left", ".right")) for layer in plan)
    loaded, loaded_plan, _ = load_quantized(folder)
    assert loaded_plan == plan
    with torch.no_grad():
        assert torch.equal(predict(loaded.denoiser, *noise(1)), predict(model, *noise(1)))


def test_a_second_round_trip_writes_the_same_bytes(
    saved: tuple[Path, nn.Module, tuple[LayerPlan, ...]], tmp_path: Path
) -> None:
    folder, _, _ = saved
    loaded, plan, steps = load_quantized(folder)
    save_quantized(
        tmp_path / "again", loaded.denoiser, plan, True, scheduler_config=loaded.scheduler_config, steps=steps
    )
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert files == sorted(
        path.relative_to(tmp_path / "again") for path in (tmp_path / "again").rglob("*") if path.is_file()
    )
    for file in files:
        assert (tmp_path / "again" / file).read_bytes() == (folder / file).read_bytes(), file


def test_saving_leaves_the_model_as_it_was(
    saved: tuple[Path, nn.Module, tuple[LayerPlan, ...]], tmp_path: Path
) -> None:
    _, model, plan = saved
    with torch.no_grad():
        before = predict(model, *noise(2))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    save_quantized(tmp_path / "student", model, plan, True, scheduler_config=SCHEDULER, steps=2)
    with torch.no_grad():
        assert torch.equal(predict(model, *noise(2)), before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_the_unet_is_the_original_architecture_with_weights_on_their_grid(
    saved: tuple[Path, nn.Module, tuple[LayerPlan, ...]], tiny_model: DiffusionModel
) -> None:
    folder, model, plan = saved
    plain = UNet2DModel.from_pretrained(folder / "unet", use_safetensors=True)
    assert {n: v.shape for n, v in plain.state_dict().items()} == {
        n: v.shape for n, v in tiny_model.denoiser.state_dict().items()
    }
    layers = quantized_layers(model)
    for layer in plan:
        if layer.name in dict(plain.named_modules()):
            rounded = plain.get_submodule(layer.name).weight
            assert torch.equal(rounded, quantized_weight(layers[layer.name]))
            values = max(len(channel.unique()) for channel in rounded.flatten(1))
            assert values <= 2**layer.weights.bits


def test_a_split_convolution_is_one_again_with_both_halves_rounded(
    saved: tuple[Path, nn.Module, tuple[LayerPlan, ...]], tiny_model: DiffusionModel
) -> None:
    folder, model, plan = saved
    halves = sorted({layer.name.rpartition(".")[0] for layer in plan if layer.name.endswith(".left")})
    assert halves
    weights, layers = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors"), quantized_layers(model)
    for name in halves:
        both = torch.cat([quantized_weight(layers[f"{name}.{side}"]) for side in ("left", "right")], dim=1)
        assert torch.equal(weights[f"{name}.weight"], both)


def test_plain_diffusers_samples_from_the_folder(saved: tuple[Path, nn.Module, tuple[LayerPlan, ...]]) -> None:
    pipeline = DDIMPipeline.from_pretrained(saved[0], use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        batch_size=1, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np"
    ).images
    assert images.shape == (1, 32, 32, 1)


def test_our_full_precision_loader_takes_the_unet_too(saved: tuple[Path, nn.Module, tuple[LayerPlan, ...]]) -> None:
    assert load_model(str(saved[0])).sample_shape == (1, 32, 32)


def test_the_scheduler_is_the_models_with_the_students_steps(
    saved: tuple[Path, nn.Module, tuple[LayerPlan, ...]], tiny_model: DiffusionModel
) -> None:
    written = json.loads((saved[0] / "scheduler" / "scheduler_config.json").read_text())
    assert written == {**DDIM_KEYS, **tiny_model.scheduler_config, "num_inference_steps": 2}


def test_a_quantized_folder_is_told_from_a_full_precision_one(
    saved: tuple[Path, nn.Module, tuple[LayerPlan, ...]], tiny_folder: Path
) -> None:
    assert is_quantized_folder(saved[0])
    assert not is_quantized_folder(tiny_folder)


def test_nothing_in_the_folder_is_pickled(saved: tuple[Path, nn.Module, tuple[LayerPlan, ...]]) -> None:
    assert {path.suffix for path in saved[0].rglob("*") if path.is_file()} == {".json", ".safetensors"}


@pytest.mark.parametrize("file", [STATE, PLAN, Path("unet/config.json"), Path("scheduler/scheduler_config.json")])
@pytest.mark.parametrize("fault", ["truncated", "missing"])
def test_a_damaged_folder_is_an_error_that_names_it(folder: Path, file: Path, fault: str) -> None:
    victim = folder / file
    content = victim.read_bytes()
    if fault == "missing":
        victim.unlink()
    else:
        victim.write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelError, match="student"):
        load_quantized(folder)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_parts_that_do_not_fit_together_are_an_error(folder: Path) -> None:
    state = load_file(folder / STATE)
    del state["conv_out.weight"]
    save_file(state, folder / STATE)
    with pytest.raises(ModelError, match=r"(?s)got a damaged folder of a quantized model.*conv_out\.weight"):
        load_quantized(folder)


def test_a_plan_of_another_model_is_an_error(folder: Path) -> None:
    entries = json.loads((folder / PLAN).read_text())["layers"]
    edit(folder / PLAN, layers=[{**entries[0], "name": "no.such.layer"}, *entries[1:]])
    with pytest.raises(ModelError, match="got a damaged folder of a quantized model"):
        load_quantized(folder)


def test_a_scheduler_without_the_students_steps_is_an_error(folder: Path, tiny_model: DiffusionModel) -> None:
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(tiny_model.scheduler_config))
    with pytest.raises(ModelError, match="num_inference_steps"):
        load_quantized(folder)


def test_merging_a_split_model_gives_the_original_function_back(tiny_model: DiffusionModel) -> None:
    split = split_shortcuts(copy.deepcopy(tiny_model.denoiser), tiny_model.example)
    merged = merge_shortcuts(split)
    with torch.no_grad():
        assert torch.equal(predict(merged, *noise(3)), predict(tiny_model.denoiser, *noise(3)))
