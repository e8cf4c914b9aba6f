"""Layouts of model folders that people have: each is the same model, or one line with the reason; and what configs and
indexes refuse.

Not here: the folders that we write ourselves (test_denoiser.py), nor damage of any kind (test_fuzz_models.py).
"""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conditional_models import class_unet, dit, flux, pixart, saved, sd3, text_unet
from diffusers import UNet2DModel
from safetensors.torch import load_file, save_file
from tiny_runs import SCHEDULER

from pqcad_qat.errors import ModelError
from pqcad_qat.export.export_model import ExportRequest, export_model
from pqcad_qat.export.layer_inputs import recorded_inputs
from pqcad_qat.export.proof import layer_parity
from pqcad_qat.machine.json_files import LARGEST_FILE, read_json
from pqcad_qat.models import model_folder
from pqcad_qat.models.config_values import LARGEST_SIDE
from pqcad_qat.models.denoiser import DiffusionModel, check_time_table, predict
from pqcad_qat.models.model_folder import downloaded_pipeline
from pqcad_qat.models.model_loading import load_model, save_model
from pqcad_qat.models.untrained import shapes_of
from pqcad_qat.policy.layer_rules import LayerRule, numbered
from pqcad_qat.policy.schema import ModelPolicy
from pqcad_qat.quantization.conversion import calibrate_ranges, integer_layers, quantize_model
from pqcad_qat.quantization.plan import plan_layers
from pqcad_qat.quantization.shortcuts import split_shortcuts
from pqcad_qat.serving.runtime import OVUNet2DModel

STEM = "diffusion_pytorch_model"
WEIGHTS, INDEX = f"{STEM}.safetensors", f"{STEM}.safetensors.index.json"
BIN = f"{STEM}.bin"


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refused(folder: Path, words: str, planned: bool = True) -> None:
    """By `plan` and by `run` in the same words, or by `run` alone where weights are at fault."""
    with pytest.raises(ModelError, match=words) as run:
        load_model(str(folder))
    assert len(str(run.value)) < 4096
    if planned:
        with pytest.raises(ModelError) as plan:
            shapes_of(str(folder))
        assert str(plan.value) == str(run.value)


# ---- layouts
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("indexed", [True, False])
def test_files_that_all_lie_at_the_top_are_the_model_of_the_usual_layout(
    folder: Path, tiny_model: DiffusionModel, indexed: bool
) -> None:
    for path in [*(folder / "unet").iterdir(), *(folder / "scheduler").iterdir()]:
        path.rename(folder / path.name)
    if not indexed:
        (folder / "model_index.json").unlink()
    assert load_model(str(folder)).digest == tiny_model.digest
    shapes = shapes_of(str(folder))
    assert (shapes.sample_shape, shapes.scheduler_config) == (tiny_model.sample_shape, tiny_model.scheduler_config)


@pytest.mark.parametrize("sharded", [True, False])
def test_weights_of_another_precision_alone_are_taken_as_float32_of_their_values(folder: Path, sharded: bool) -> None:
    halved = {name: value.half() for name, value in load_file(folder / "unet" / WEIGHTS).items()}
    (folder / "unet" / WEIGHTS).unlink()
    if sharded:
        shards = {
            name: f"{STEM}.fp16-0000{1 + (number > 9)}-of-00002.safetensors" for number, name in enumerate(halved)
        }
        for shard in set(shards.values()):
            save_file({name: value for name, value in halved.items() if shards[name] == shard}, folder / "unet" / shard)
        (folder / "unet" / f"{STEM}.safetensors.index.fp16.json").write_text(json.dumps({"weight_map": shards}))
    else:
        save_file(halved, folder / "unet" / f"{STEM}.fp16.safetensors")
    own = load_model(str(folder)).denoiser.state_dict()
    assert all(
        own[name].dtype == torch.float32 and torch.equal(own[name], value.float()) for name, value in halved.items()
    )


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_names_that_wrappers_put_before_every_tensor_are_passed_over(
    folder: Path, tiny_model: DiffusionModel, prefix: str
) -> None:
    save_file(
        {prefix + name: value for name, value in load_file(folder / "unet" / WEIGHTS).items()},
        folder / "unet" / WEIGHTS,
    )
    assert load_model(str(folder)).digest == tiny_model.digest


def test_of_a_hub_id_another_precision_is_fetched_where_a_part_has_nothing_else(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[list[str]] = []

    def snapshot_download(_source: str, allow_patterns: list[str]) -> str:
        fetched.append(allow_patterns)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    downloaded_pipeline("org/name")
    assert fetched == [list(model_folder.WEIGHTS_AND_CONFIGS)]
    (folder / "unet" / WEIGHTS).unlink()
    downloaded_pipeline("org/name")
    assert f"unet/{STEM}.fp16.safetensors" in fetched[2]
    assert all(pattern.startswith(f"unet/{STEM}") for pattern in fetched[2])


def test_a_scheduler_that_is_missing_is_told_by_plan_and_by_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda _source, allow_patterns: str(folder))
    shutil.rmtree(folder / "scheduler")
    refused(folder, r"scheduler_config\.json: got no such file")
    for path in (folder / "model_index.json", folder / "unet" / WEIGHTS):
        path.unlink()
    assert shapes_of(str(folder)).sample_shape == (1, 32, 32)  # an architecture
    with pytest.raises(ModelError, match=r"scheduler_config\.json: got no such file"):
        shapes_of("org/name")


def test_a_checkpoint_in_a_single_file_says_what_makes_a_folder_of_it(tmp_path: Path) -> None:
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1)}, tmp_path / "v1-5.safetensors")
    for source in (tmp_path / "v1-5.safetensors", tmp_path):
        refused(
            source,
            r"v1-5\.safetensors: got a checkpoint in a single file; "
            r".*which `assemble FILE\.safetensors --out FOLDER --config FOLDER` makes of one",
        )


def test_a_config_alone_has_no_weights(folder: Path) -> None:
    assert shapes_of(str(folder / "unet" / "config.json")).sample_shape == (1, 32, 32)
    with pytest.raises(ModelError, match=r"config\.json: got a file, which holds no weights; allowed a folder"):
        load_model(str(folder / "unet" / "config.json"))


def test_a_folder_with_two_denoisers_is_the_one_that_its_index_names(folder: Path, tiny_model: DiffusionModel) -> None:
    saved("dit", folder.parent / "dit")
    shutil.copytree(folder.parent / "dit" / "transformer", folder / "transformer")
    assert load_model(str(folder)).digest == tiny_model.digest
    (folder / "model_index.json").unlink()
    refused(folder, r"model_index\.json: got unet and transformer in its folder; allowed one of them")


# ---- weights
# ---------------------------------------------------------------------------------------------------------------------


def test_tensors_that_do_not_fit_are_counted_and_the_first_few_named(folder: Path) -> None:
    weights = load_file(folder / "unet" / WEIGHTS)
    save_file({f"of.another.model.{name * 20}": value for name, value in weights.items()}, folder / "unet" / WEIGHTS)
    count = len(weights)
    refused(
        folder, rf"{count} missing: [^;]*, and {count - 5} more; {count} not of this model: of\.another", planned=False
    )
    weights["conv_in.weight"] = weights["conv_in.weight"][:, :, :1].contiguous()
    weights["conv_in.bias"] = weights["conv_in.bias"].int()
    save_file(weights, folder / "unet" / WEIGHTS)
    words = (
        r"1 of another shape: conv_in\.weight \[16, 1, 1, 3\], not \[16, 1, 3, 3\]; 1 not in floating point: "
        r"conv_in\.bias I32"
    )
    refused(folder, words, planned=False)


def test_a_shard_that_is_missing_is_named(folder: Path) -> None:
    (folder / "unet" / WEIGHTS).rename(folder / "unet" / "a.safetensors")
    for shards, words in (
        (
            {"x": "a.safetensors", "y": "b.safetensors"},
            r"b\.safetensors: got no such file; allowed all 2 shards that .* lists, of which 1 are missing",
        ),
        (
            {"x": "../a.safetensors"},
            r"weight_map: got '\.\./a\.safetensors'; allowed names of \.safetensors files beside it",
        ),
        ({}, r"weight_map: got \{\}; allowed the name of a file for each tensor"),
    ):
        (folder / "unet" / INDEX).write_text(json.dumps({"weight_map": shards}))
        refused(folder, words, planned=False)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (BIN, b"pickle", rf"got {BIN} alone, which may run code when it is read; allowed safetensors"),
        (
            f"{STEM}.non_ema.safetensors",
            b"",
            r"got .*non_ema\.safetensors alone; allowed this name, or one with \.fp32",
        ),
        (
            WEIGHTS,
            b"version https://git-lfs.github.com/spec/v1\n",
            "got git-lfs's pointer in place of the weights; allowed the weights, which `git lfs pull` fetches",
        ),
    ],
)
def test_weights_in_another_form_are_refused_with_the_reason(
    folder: Path, name: str, content: bytes, words: str
) -> None:
    (folder / "unet" / WEIGHTS).unlink()
    (folder / "unet" / name).write_bytes(content)
    refused(folder, words, planned=False)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(folder: Path, value: float) -> None:
    weights = load_file(folder / "unet" / WEIGHTS)
    weights["mid_block.resnets.0.conv1.weight"][0, 0, 0, 0] = value
    save_file(weights, folder / "unet" / WEIGHTS)
    refused(folder, r"mid_block\.resnets\.0\.conv1\.weight: got values that are not finite", planned=False)


# ---- configs
# ---------------------------------------------------------------------------------------------------------------------

LEVELS: dict[str, Any] = {
    "block_out_channels": (16,) * 3,
    "down_block_types": ("DownBlock2D",) * 3,
    "up_block_types": ("UpBlock2D",) * 3,
}
TWO_LEVELS: dict[str, Any] = {
    "block_out_channels": (16, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
REFUSED = {
    "levels": (
        class_unet,
        "sample_size: got 18; allowed multiples of 4, which its 3 levels halve 2 times",
        {"sample_size": 18, **LEVELS},
    ),
    "refiner": (
        lambda: text_unet(
            addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=1280 + 40
        ),
        "projection_class_embeddings_input_dim: got 1320; allowed 1328: SDXL's refiner",
    ),
    "lcm": (
        lambda: text_unet(time_cond_proj_dim=16),
        "time_cond_proj_dim: got 16; allowed null: the guidance that LCM's denoisers read",
    ),
    "gligen": (lambda: text_unet(attention_type="gated"), "attention_type: got 'gated'; allowed default"),
    "two texts": (
        lambda: text_unet(dual_cross_attention=True),
        "dual_cross_attention: got True; allowed null: a second text",
    ),
    "image prompt": (
        lambda: text_unet(encoder_hid_dim_type="image_proj", encoder_hid_dim=8),
        "encoder_hid_dim_type: got 'image_proj'; allowed None, text_proj",
    ),
    "score": (
        lambda: class_unet(time_embedding_type="fourier"),
        "time_embedding_type: got 'fourier'; allowed positional, learned",
    ),
    "patches": (lambda: sd3(sample_size=18), "sample_size: got 18; allowed multiples of 2 up to 16"),
    "dit's patches": (lambda: dit(), "sample_size: got 9; allowed multiples of 2, as patch_size", {"sample_size": 9}),
    "flux's patches": (lambda: flux(), "sample_size: got 9; allowed even numbers", {"sample_size": 9}),
    "resolution": (lambda: pixart(use_additional_conditions=True), "use_additional_conditions: got true"),
    "inpainting": (
        lambda: text_unet(),
        "in_channels: got 9; allowed 4, as out_channels: 5 more channels",
        {"in_channels": 9},
    ),
}
EDITED = {
    "sample_size": (10**9, f"allowed a whole number from 1 to {LARGEST_SIDE}"),
    "attention_head_dim": (0, "allowed a whole number from 1"),
    "layers_per_block": (10**9, "allowed a whole number from 1 to 64"),
    "block_out_channels": ([16, -32], "allowed a list of which each is a whole number from 1"),
    "norm_num_groups": (5, r"allowed divisors of 16, of block_out_channels \[16, 32\]"),
    "in_channels": (0, "allowed a whole number from 1"),
    "act_fn": ("tanhish", "allowed swish, silu, mish"),
    "down_block_types": (["DownBlock2D"], "allowed 2 blocks, as many as block_out_channels"),
    "up_block_types": (["AttnUpBlock2D", "Made"], "allowed UpBlock2D, AttnUpBlock2D"),
    "norm_eps": (float("nan"), "allowed a number from 0 to 1"),
    "time_embedding_type": ("learned", ""),
    "quantization_config": ({"load_in_4bit": True}, "allowed null: full precision"),
    "_class_name": (["UNet2DModel"], "allowed UNet2DModel, UNet2DConditionModel"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_a_config_asks_for_and_is_not_given_is_refused_by_plan_and_run_alike(kind: str, tmp_path: Path) -> None:
    build, words, *changes = REFUSED[kind]
    torch.manual_seed(0)
    save_model(build(), SCHEDULER, tmp_path / "model")
    config = next((tmp_path / "model").glob("*/config.json"))
    edit(config, **(changes[0] if changes else {}))
    refused(tmp_path / "model", words)


@pytest.mark.parametrize("key", EDITED)
def test_a_value_that_no_model_has_is_refused_before_anything_is_built(folder: Path, key: str) -> None:
    value, rule = EDITED[key]
    edit(folder / "unet" / "config.json", **{key: value})
    refused(folder, f"config.json: {key if key != 'time_embedding_type' else 'num_train_timesteps'}: got .*{rule}")


def test_a_model_of_absurd_size_is_given_up_while_it_is_described(folder: Path) -> None:
    edit(folder / "unet" / "config.json", block_out_channels=[2**20, 2**20])
    refused(folder, r"got a config of more than 100,000,000,000 parameters")


def test_a_transformer_of_absurdly_many_layers_is_refused(tmp_path: Path) -> None:
    saved("dit", tmp_path / "dit")
    edit(tmp_path / "dit" / "transformer" / "config.json", num_layers=1000)
    refused(tmp_path / "dit", "num_layers: got 1000; allowed a whole number from 1 to 200")


def test_a_learned_table_of_times_is_as_long_as_the_schedule(tmp_path: Path) -> None:
    model = saved("class_unet", tmp_path / "model", time_embedding_type="learned", num_train_timesteps=100)
    check_time_table(model, 100)
    with pytest.raises(
        ModelError, match=r"num_train_timesteps: got 100 in the denoiser's config.*allowed 1000 or more"
    ):
        check_time_table(shapes_of(str(tmp_path / "model")), 1000)


@pytest.mark.parametrize("size", [[16, 24], (24, 16), [16, 16], 24])
def test_height_and_width_may_differ_by_config_and_by_policy(folder: Path, size: Any) -> None:
    wanted = (1, size, size) if isinstance(size, int) else (1, *size)
    asked = ModelPolicy.model_validate({"source": "x", "sample_size": size}).sample_size
    assert load_model(str(folder), asked).sample_shape == shapes_of(str(folder), asked).sample_shape == wanted
    edit(folder / "unet" / "config.json", sample_size=size)
    assert load_model(str(folder)).sample_shape == shapes_of(str(folder)).sample_shape == wanted
    with pytest.raises(ModelError, match=r"model\.sample_size: got \[16, 17\]; allowed multiples of 2"):
        load_model(str(folder), (16, 17))


def test_a_rectangle_of_a_transformer_survives_its_own_folder(tmp_path: Path) -> None:
    saved("sd3", tmp_path / "sd3")
    model = load_model(str(tmp_path / "sd3"), (8, 12))
    save_model(model.denoiser, model.scheduler_config, tmp_path / "again")
    again = load_model(str(tmp_path / "again"))
    assert (again.sample_shape, again.digest) == ((4, 8, 12), model.digest)


@pytest.mark.long
def test_a_rectangle_is_deployed_with_the_integers_of_pytorch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, norm_num_groups=8, **TWO_LEVELS
    )
    save_model(unet.eval(), SCHEDULER, tmp_path / "model")
    full = load_model(str(tmp_path / "model"), (8, 12))
    model = copy.deepcopy(full.denoiser)
    rule = {"match": ["*"], "weights": {"bits": 7}, "inputs": {"bits": 8, "symmetric": False}}
    split_shortcuts(model, full.example)
    quantize_model(model, plan_layers(model, numbered([LayerRule.model_validate(rule)]), (7,), full.example))
    states = (torch.randn(2, 1, 8, 12), torch.tensor([40, 999]), {})
    calibrate_ranges(model, [states])
    layers, deployed = integer_layers(model.eval()), tmp_path / "openvino"
    with recorded_inputs(model, states, tmp_path) as recorded:
        export_model(ExportRequest(model, full.scheduler_config, layers, full.sample_shape, batch_size=2), deployed)
        assert layer_parity(deployed, layers, recorded).layers_exact == len(layers)
    runtime = OVUNet2DModel.from_pretrained(deployed)
    assert (runtime.sample_shape, list(runtime.config["sample_size"])) == ((1, 8, 12), [8, 12])
    with torch.no_grad():
        wanted = predict(model, states[0], 40).numpy()
    assert np.abs(runtime.predict(states[0].numpy(), 40) - wanted).max() < 0.1 * np.ptp(wanted)


# ---- the index
# -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"unet": []}, r"model_index\.json: unet: got \[\]; allowed \[library, class\]"),
        ({"unet": None}, "unet: got null"),
        ({"vae": "AutoencoderKL"}, "vae: got 'AutoencoderKL'"),
        ({"unet": ["diffusers", "UNet2DModel", "x"]}, "unet: got "),
        (
            {"unet": ["diffusers", "UNet3DConditionModel"]},
            "unet: got 'UNet3DConditionModel'; allowed 'UNet2DModel', as its config says",
        ),
        (
            {"controlnet": ["diffusers", "ControlNetModel"]},
            "controlnet: got 'ControlNetModel'; allowed null: what it gives",
        ),
        ({"adapter": ["diffusers", "T2IAdapter"]}, "adapter: got 'T2IAdapter'"),
        ({"image_encoder": ["transformers", "CLIPVisionModelWithProjection"]}, "image_encoder: got 'CLIPVision"),
        (
            {"_class_name": "StableDiffusionControlNetPipeline"},
            "_class_name: got 'StableDiffusionControlNetPipeline'; allowed pipelines",
        ),
        ({"requires_aesthetics_score": True}, "requires_aesthetics_score: got true; allowed false: SDXL's refiner"),
    ],
)
def test_a_pipeline_whose_denoiser_reads_more_than_it_is_given_is_refused_by_name(
    folder: Path, changes: Any, words: str
) -> None:
    edit(folder / "model_index.json", **changes)
    refused(folder, words)


def test_parts_that_give_the_denoiser_nothing_are_passed_over(folder: Path, tiny_model: DiffusionModel) -> None:
    others = {
        "safety_checker": ["x", "Y"],
        "feature_extractor": ["x", "Y"],
        "image_encoder": [None, None],
        "requires_safety_checker": True,
    }
    edit(folder / "model_index.json", **others)
    assert load_model(str(folder)).digest == tiny_model.digest


def test_what_a_pipeline_decodes_are_latents_whatever_their_channels(folder: Path) -> None:
    assert not load_model(str(folder)).latent
    edit(folder / "model_index.json", vqvae=["diffusers", "VQModel"])
    assert load_model(str(folder)).latent
    assert shapes_of(str(folder)).latent


# ---- JSON
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[" * 100_000, "got JSON that is nested too deeply"),
        (b'{"a": 1, "a": 2}', "it has the key 'a' twice"),
        (b"[1]", "got a JSON list; allowed an object"),
        (b"\xff", "got text that is not JSON: 'utf-8' codec"),
        (b'{"a": ' + b"9" * 5000 + b"}", "got text that is not JSON: Exceeds the limit"),
        (b" " * (LARGEST_FILE + 1), "got 16777217 bytes; allowed 16777216"),
    ],
)
def test_json_that_is_no_object_is_one_error(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ModelError, match=rf"x\.json: .*{words}"):
        read_json(tmp_path / "x.json")


def test_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "x.json") == {"a": 1}


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path, words in (
        (tmp_path, "got no regular file"),
        (tmp_path / "absent", "got no such file"),
        (tmp_path / "loop", "got no such file"),
    ):
        with pytest.raises(ModelError, match=words):
            read_json(path)
    for source in ("~nobody-of-that-name/x", "x" * 5000, "a\x00b"):
        with pytest.raises(ModelError, match="which is no folder and cannot be loaded from the hub"):
            load_model(source)
