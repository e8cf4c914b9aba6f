"""Full-precision denoisers: what a folder gives back, what decides its digest, and folders that are refused.

Not here: quantized folders (test_student_folder.py).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from tiny_runs import SCHEDULER, tiny_unet

from pqcad_qat.errors import ModelError
from pqcad_qat.machine.json_files import read_json
from pqcad_qat.models.denoiser import DiffusionModel, predict
from pqcad_qat.models.model_folder import WEIGHTS_AND_CONFIGS, embedded_models
from pqcad_qat.models.model_loading import load_model, model_index, save_model

WEIGHTS = Path("unet") / "diffusion_pytorch_model.safetensors"
CONFIG = Path("unet") / "config.json"
SCHEDULER_CONFIG = Path("scheduler") / "scheduler_config.json"


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_saved_model_comes_back_with_the_same_weights_configs_and_predictions(
    tiny_model: DiffusionModel, tmp_path: Path
) -> None:
    save_model(tiny_model.denoiser, tiny_model.scheduler_config, tmp_path / "copy")
    copied = load_model(str(tmp_path / "copy"))
    for name, value in tiny_model.denoiser.state_dict().items():
        assert torch.equal(copied.denoiser.state_dict()[name], value)
    assert copied.scheduler_config == tiny_model.scheduler_config == SCHEDULER
    x, t = torch.randn(2, 1, 32, 32), torch.tensor([3, 700])
    with torch.no_grad():
        assert torch.equal(predict(copied.denoiser, x, t), predict(tiny_model.denoiser, x, t))
    assert copied.digest == tiny_model.digest


def test_a_saved_model_is_a_pipeline_that_plain_diffusers_loads(tiny_folder: Path, tiny_model: DiffusionModel) -> None:
    pipeline = DDIMPipeline.from_pretrained(tiny_folder, use_safetensors=True)
    assert read_json(tiny_folder / "model_index.json") == model_index(tiny_model.denoiser, tiny_model.scheduler_config)
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    x = torch.randn(1, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(pipeline.unet(x, 10).sample, predict(tiny_model.denoiser, x, 10))


def test_a_prediction_takes_one_time_step_or_one_a_sample(tiny_model: DiffusionModel) -> None:
    x = torch.randn(3, 1, 32, 32)
    with torch.no_grad():
        one = predict(tiny_model.denoiser, x, 500)
        torch.testing.assert_close(predict(tiny_model.denoiser, x, torch.tensor([500, 500, 500])), one)
        each = predict(tiny_model.denoiser, x, torch.tensor([1, 500, 900]))
    torch.testing.assert_close(each[1], one[1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(each[0], one[0], atol=1e-4)


def test_a_loaded_model_is_float32_in_evaluation_mode_and_knows_its_shape(folder: Path) -> None:
    halved = {name: value.half() for name, value in load_file(folder / WEIGHTS).items()}
    save_file(halved, folder / WEIGHTS)
    model = load_model(str(folder))
    assert {parameter.dtype for parameter in model.denoiser.parameters()} == {torch.float32}
    assert not model.denoiser.training
    assert model.sample_shape == (1, 32, 32)
    assert [tuple(part.shape) for part in model.example[:2]] == [(1, 1, 32, 32), (1,)]


def test_the_digest_changes_with_a_weight_and_with_the_scheduler_and_not_with_the_place(
    folder: Path, tiny_model: DiffusionModel
) -> None:
    assert load_model(str(folder)).digest == tiny_model.digest
    edit(folder / SCHEDULER_CONFIG, prediction_type="epsilon")
    other_scheduler = load_model(str(folder)).digest
    edit(folder / SCHEDULER_CONFIG, prediction_type="v_prediction")
    weights = load_file(folder / WEIGHTS)
    weights["conv_in.bias"][0] = torch.nextafter(weights["conv_in.bias"][0], torch.tensor(9.0))
    save_file(weights, folder / WEIGHTS)
    assert len({tiny_model.digest, other_scheduler, load_model(str(folder)).digest}) == 3


def test_a_folder_that_is_not_there_is_named_without_reaching_for_a_network() -> None:
    with pytest.raises(ModelError, match=r"got 'no/such-model', which is no folder"):
        load_model("no/such-model")


def test_an_unknown_embedded_model_is_refused_with_the_names_that_exist() -> None:
    with pytest.raises(ModelError, match=r"got 'embedded:nothing'; allowed .*a diffusers folder"):
        load_model("embedded:nothing")


@pytest.mark.parametrize("missing", [CONFIG, SCHEDULER_CONFIG, WEIGHTS])
def test_a_missing_file_is_named(folder: Path, missing: Path) -> None:
    (folder / missing).unlink()
    with pytest.raises(ModelError, match=f"{missing.name}: (got )?no such file"):
        load_model(str(folder))


@pytest.mark.parametrize("damaged", [CONFIG, SCHEDULER_CONFIG])
@pytest.mark.parametrize("content", ["{", "[1, 2]", ""])
def test_a_config_that_is_no_json_object_is_named(folder: Path, damaged: Path, content: str) -> None:
    (folder / damaged).write_text(content)
    with pytest.raises(ModelError, match=damaged.name):
        load_model(str(folder))


def test_truncated_weights_are_an_error_that_names_the_folder(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelError, match="safetensors: got a file that is not readable as safetensors"):
        load_model(str(folder))


def test_weights_of_another_architecture_are_an_error(folder: Path) -> None:
    edit(folder / CONFIG, block_out_channels=[8, 32])
    with pytest.raises(ModelError, match="got weights that do not fit; allowed those of the UNet2DModel"):
        load_model(str(folder))


def test_weights_with_a_parameter_missing_are_an_error_and_not_filled_with_noise(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    del weights["conv_out.weight"]
    save_file(weights, folder / WEIGHTS)
    with pytest.raises(ModelError, match=r"conv_out\.weight"):
        load_model(str(folder))


def test_another_class_of_denoiser_is_refused(folder: Path) -> None:
    edit(folder / CONFIG, _class_name="UNet3DConditionModel")
    with pytest.raises(ModelError, match="_class_name: got 'UNet3DConditionModel'; allowed UNet2DModel"):
        load_model(str(folder))


def test_pickled_weights_are_never_loaded(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "unet" / "diffusion_pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    with pytest.raises(ModelError, match="allowed safetensors, as diffusers' save_pretrained writes"):
        load_model(str(folder))


def test_the_embedded_model_is_listed_small_and_predicts_the_velocity_it_was_trained_for() -> None:
    assert "embedded:fashion-mnist" in embedded_models()
    model = load_model("embedded:fashion-mnist")
    parameters = sum(parameter.numel() for parameter in model.denoiser.parameters())
    assert model.sample_shape == (1, 32, 32)
    assert 1_000_000 < parameters < 6_500_000
    assert any("attentions" in name for name, _ in model.denoiser.named_modules())
    # at almost no signal, v is -x_0: its mean over images is that of clothes on black, well below 0 at the border
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((4, 1, 32, 32), dtype=np.float32))
    with torch.no_grad():
        x_0 = -predict(model.denoiser, x, 999)
    assert x_0[:, :, :2, :].mean() < -0.8
    assert x_0[:, :, 12:20, 12:20].mean() > x_0[:, :, :2, :].mean() + 0.3


def test_the_untrained_model_of_these_tests_has_attention() -> None:
    assert any("attentions" in name for name, _ in tiny_unet().named_modules())


def test_of_a_hub_id_a_whole_pipeline_is_taken_and_no_variant_of_its_weights() -> None:
    shard = "-00001-of-00002.safetensors"
    wanted = {
        "model_index.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        f"unet/diffusion_pytorch_model{shard}",
        "unet/diffusion_pytorch_model.safetensors.index.json",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        f"text_encoder_2/model{shard}",
        "text_encoder_2/model.safetensors.index.json",
        "tokenizer/vocab.json",
        "tokenizer/merges.txt",
        "tokenizer_2/tokenizer_config.json",
    }
    other = {
        "README.md",
        "v1-5-pruned.safetensors",
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.non_ema.safetensors",
        "unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
        "vae/diffusion_pytorch_model.fp16.safetensors",
        "text_encoder/model.fp16.safetensors",
        "text_encoder/pytorch_model.bin",
        "safety_checker/model.safetensors",
        "unet/modeling.py",
    }
    assert set(filter_repo_objects(sorted(wanted | other), allow_patterns=list(WEIGHTS_AND_CONFIGS))) == wanted
