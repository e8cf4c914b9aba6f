"""What a deployed folder says of itself is checked when it is loaded, also where every digest is right: one error names
file and key.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fuzzing import bounded
from tiny_deployed import BATCH, LAYER, SHAPE, TOKENS, WIDTH, resealed, tiny_deployed

from pqcad_qat.cli import main
from pqcad_qat.errors import ModelError
from pqcad_qat.serving.deployed_folder import copy_folder, read_manifest
from pqcad_qat.serving.runtime import OVUNet2DModel
from pqcad_qat.serving.text_to_image import TextToImage

X, TEXT = np.zeros((BATCH, *SHAPE), np.float32), np.ones((BATCH, TOKENS, WIDTH), np.float32)


pytestmark = pytest.mark.filterwarnings("ignore:.*called at time")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_deployed(tmp_path_factory.mktemp("deployed") / "openvino")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_deployed(tmp_path_factory.mktemp("deployed") / "packed", "packed")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "openvino"))


def rewrite(folder: Path, name: str, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON file, as if it had been written so."""
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))
    if name != "manifest.json":
        resealed(folder, name)


def refused(folder: Path, message: str, load: Callable[[Path], object] = OVUNet2DModel.from_pretrained) -> None:
    with bounded(), pytest.raises(ModelError, match=message) as told:
        load(folder)
    assert len(str(told.value)) < 4000
    assert "\n" not in str(told.value)


def test_the_whole_folder_predicts_and_draws(whole: Path) -> None:
    model = OVUNet2DModel.from_pretrained(whole)
    assert np.abs(model(X, 99, TEXT).sample - model(X, 0, 0 * TEXT).sample).max() > 0.05
    assert TextToImage.from_pretrained(whole)("a cat").std() > 10


CONDITION = {"name": "encoder_hidden_states", "shape": [TOKENS, WIDTH], "dtype": "float32", "bound": None}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"sample_shape": [4, 4]},
            r"manifest.json: sample_shape: got \[4, 4\]; allowed three whole numbers from 1 to 65536",
        ),
        ({"sample_shape": [4, "4", 4]}, "sample_shape: got .*; allowed three whole numbers"),
        ({"sample_shape": [4, 10**9, 10**9]}, "sample_shape: got .*; allowed three whole numbers"),
        ({"sample_shape": [4, 65536, 65536]}, r"sample_shape: got .*; allowed 268435456 values in a batch of 2"),
        ({"sample_shape": [4, 4, 8]}, r"openvino_model.xml: got 3 inputs, .*allowed .*sample \[2, 4, 4, 8\] float32"),
        ({"batch_size": True}, "batch_size: got True; allowed a whole number from 1"),
        ({"batch_size": 0}, "batch_size: got 0; allowed"),
        ({"batch_size": 3}, r"allowed .*timestep \[3\] int64"),
        ({"train_timesteps": 10**9}, "train_timesteps: got 1000000000; allowed a whole number from 1 to 1000000"),
        ({"train_timesteps": 2.5}, "train_timesteps: got 2.5; allowed"),
        ({"timestep_dtype": "int8"}, "timestep_dtype: got 'int8'; allowed int64 or float32"),
        ({"timestep_dtype": "float32"}, r"allowed .*timestep \[2\] float32"),
        ({"conditions": {}}, "conditions: got {}; allowed a list"),
        ({"conditions": [7]}, "conditions: 0: got 7; allowed an object"),
        (
            {"conditions": [{**CONDITION, "more": 1}]},
            "conditions: 0: got .*'more'.*; allowed name, shape, dtype, bound",
        ),
        (
            {"conditions": [{key: CONDITION[key] for key in ("name", "shape", "dtype")}]},
            "conditions: 0: got .*; allowed name, shape, dtype, bo",
        ),
        ({"conditions": [{**CONDITION, "shape": [TOKENS, -1]}]}, "conditions: 0: shape: got"),
        (
            {"conditions": [{**CONDITION, "dtype": "float64"}]},
            "conditions: 0: dtype: got 'float64'; allowed float32 or int64",
        ),
        ({"conditions": [{**CONDITION, "bound": "7"}]}, "conditions: 0: bound: got '7'; allowed null"),
        ({"conditions": [{**CONDITION, "name": "timestep"}]}, "conditions: 0: name: got 'timestep'"),
        (
            {"conditions": [CONDITION, CONDITION]},
            "conditions: 1: name: got 'encoder_hidden_states'; allowed every name once",
        ),
        ({"conditions": []}, r"got 3 inputs.*; allowed timestep \[2\] int64, sample"),
        ({"layers": []}, r"layers: got \[\]; allowed an object"),
        ({"layers": {"x": None}}, "layers: x: got null; allowed an object"),
        (
            {"layers": {"x": {"kind": "Linear", "input_group": "x", "needs_vnni": "no"}}},
            "layers: x: needs_vnni: got 'no'; allowed true",
        ),
        (
            {"layers": {"x": {"kind": "Linear", "input_group": "x"}}},
            "openvino_model.xml: got no layer 'x'; allowed .*that the manifest lists",
        ),
        ({"parts": {"vae": {}}}, "parts: got .*; allowed an object of vae_decoder, text_encoder"),
        (
            {"parts": {"text_encoder_2": {"class": "CLIPTextModel", "format": "float"}}},
            "files: got no text_encoder_2/openvino_model.xml; allowed",
        ),
        ({"provenance": {"sampling_steps": "5"}}, "provenance: got .*; allowed an object whose sampling_steps"),
        ({"weights": {"format": "int2"}}, "weights: got .*; allowed an object with format: int8, packed"),
        ({"weights": {"format": "packed"}}, "graph: got .*; allowed openvino_model.xml.gz of these weights"),
        ({"graph": "transformer/openvino_model.xml"}, "files: got no transformer/openvino_model.xml; allowed"),
        ({"files": []}, "files: got .*; allowed an object of files"),
    ],
)
def test_a_manifests_values_are_checked_and_against_the_graph(
    folder: Path, change: dict[str, Any], message: str
) -> None:
    rewrite(folder, "manifest.json", lambda manifest: manifest.update(change))
    refused(folder, message)


@pytest.mark.parametrize(
    ("name", "entry", "message"),
    [
        (
            "/etc/passwd",
            {"bytes": 1, "sha256": "0" * 64},
            "files: got /etc/passwd, which lies outside the folder; allowed",
        ),
        ("unet/../../x", {"bytes": 1, "sha256": "0" * 64}, "files: got unet/../../x, which lies outside"),
        ("a\0b", {"bytes": 1, "sha256": "0" * 64}, r"files: got a\\x00b, which lies outside"),
        ("unet/x", {"bytes": -1, "sha256": "0" * 64}, "files: unet/x: bytes: got -1; allowed a whole number"),
        ("unet/x", {"bytes": 1, "sha256": 7}, "files: unet/x: sha256: got 7; allowed 64 hexadecimal digits"),
        ("unet/x", 5, "files: unet/x: got 5; allowed an object"),
        (
            "x" * 5000,
            {"bytes": 1, "sha256": "0" * 64},
            r"files: got x+\.*, which cannot be read: File name too long; allowed",
        ),
    ],
)
def test_the_list_of_files_is_checked(folder: Path, name: str, entry: Any, message: str) -> None:
    rewrite(folder, "manifest.json", lambda manifest: manifest["files"].update({name: entry}))
    refused(folder, message)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "unet/config.json",
            {"in_channels": 3},
            "unet/config.json: in_channels: got 3; allowed 4, as sample_shape in the manifest",
        ),
        ("unet/config.json", {"in_channels": []}, r"in_channels: got \[\]; allowed 4, as sample_shape in the manifest"),
        (
            "unet/config.json",
            {"sample_size": "big"},
            "sample_size: got 'big'; allowed null, or one or two whole numbers",
        ),
        ("unet/config.json", {"_class_name": None}, "_class_name: got null; allowed the name of the denoiser's class"),
        (
            "scheduler/scheduler_config.json",
            {"num_inference_steps": "2"},
            "num_inference_steps: got '2'; allowed 1 to 100 sampling steps",
        ),
        (
            "scheduler/scheduler_config.json",
            {"guidance_scale": [3]},
            r"guidance_scale: got \[3\]; allowed a number from 1",
        ),
        (
            "scheduler/scheduler_config.json",
            {"unconditional_class": -1},
            "unconditional_class: got -1; allowed a class's label",
        ),
        (
            "scheduler/scheduler_config.json",
            {"num_train_timesteps": 10**9},
            "num_train_timesteps: got 1000000000; allowed a whole number",
        ),
        ("scheduler/scheduler_config.json", {"beta_end": [7]}, "scheduler_config.json: beta_end: got "),
        (
            "scheduler/scheduler_config.json",
            {"prediction_type": "x0"},
            "scheduler_config.json: .*prediction_type: got 'x0'; allowed",
        ),
    ],
)
def test_configs_are_checked_against_the_manifest(
    folder: Path, name: str, change: dict[str, Any], message: str
) -> None:
    rewrite(folder, name, lambda config: config.update(change))
    refused(folder, message)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "vae_decoder/config.json",
            {"scaling_factor": 0},
            "vae_decoder/config.json: scaling_factor: got 0; allowed a number other than 0",
        ),
        (
            "vae_decoder/config.json",
            {"block_out_channels": [8] * 99},
            "block_out_channels: got .*; allowed a list of 1 to 12",
        ),
        (
            "vae_decoder/config.json",
            {"block_out_channels": [8]},
            r"got the output .*; allowed \(\[1, 3, 4, 4\], 'float32'\), of the input",
        ),
        (
            "vae_decoder/config.json",
            {"latents_mean": [0.0]},
            "latents_mean: got .*; allowed null or 4 numbers, one a channel",
        ),
        ("tokenizer/tokenizer.json", {"model": None}, "tokenizer.json: got a file that is no tokenizer: "),
        ("tokenizer/tokenizer_config.json", {"pad_token": 7}, "pad_token: got 7; allowed a token of the vocabulary"),
        (
            "model_index.json",
            {"_class_name": 7},
            "model_index.json: _class_name: got '7'; allowed for a prompt StableDiffusionPipeline",
        ),
        ("scheduler/scheduler_config.json", {"num_inference_steps": None}, "got no num_inference_steps"),
    ],
)
def test_the_parts_of_a_prompt_are_checked(folder: Path, name: str, change: dict[str, Any], message: str) -> None:
    rewrite(folder, name, lambda config: config.update(change))
    refused(folder, message, TextToImage.from_pretrained)


def test_only_the_graph_that_the_manifest_names_is_read(whole: Path, tmp_path: Path) -> None:
    """An unet/ of another model beside a transformer/, which the manifest names, and the other way round."""
    folder = Path(shutil.copytree(whole, tmp_path / "openvino"))
    shutil.copytree(folder / "unet", folder / "transformer")
    (folder / "transformer" / "config.json").write_text(
        json.dumps({"_class_name": "PixArtTransformer2DModel", "in_channels": 4})
    )
    (folder / "transformer" / "openvino_model.xml").write_text("not a graph")
    assert OVUNet2DModel.from_pretrained(folder).config["_class_name"] == "UNet2DConditionModel"
    shutil.copyfile(whole / "unet" / "openvino_model.xml", folder / "transformer" / "openvino_model.xml")
    rewrite(folder, "manifest.json", lambda manifest: manifest.update(graph="transformer/openvino_model.xml"))
    resealed(folder, *(f"transformer/{name}" for name in ("openvino_model.xml", "openvino_model.bin", "config.json")))
    (folder / "unet" / "openvino_model.xml").write_text("not a graph")
    resealed(folder, "unet/openvino_model.xml")
    model = OVUNet2DModel.from_pretrained(folder)
    assert model.config["_class_name"] == "PixArtTransformer2DModel"
    expected = OVUNet2DModel.from_pretrained(whole)(X, 3, TEXT).sample
    np.testing.assert_array_equal(model.predict(X, 3, {"encoder_hidden_states": TEXT}), expected)


def test_a_graph_that_unfolds_to_gigabytes_is_refused_before_it_does(packed: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(packed, tmp_path / "openvino"))
    text = folder / "unet" / "openvino_model.xml.gz"
    text.write_bytes(200 * gzip.compress(b" " * 2**24))  # 3.4 GB
    resealed(folder, "unet/openvino_model.xml.gz")
    with bounded(60, 10**9), pytest.raises(ModelError, match=r"xml.gz: got a graph's text of more than 67108864 bytes"):
        OVUNet2DModel.from_pretrained(folder)


@pytest.mark.parametrize(
    "damage", [lambda content: content[:30], lambda content: content[:20] + b"x" * 9 + content[29:], lambda _: b""]
)
def test_a_damaged_archive_is_refused(packed: Path, tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    folder = Path(shutil.copytree(packed, tmp_path / "openvino"))
    text = folder / "unet" / "openvino_model.xml.gz"
    text.write_bytes(damage(text.read_bytes()))
    resealed(folder, "unet/openvino_model.xml.gz")
    refused(folder, r"openvino_model\.xml(\.gz)?: got a graph that OpenVINO cannot read: ")


def test_a_cut_file_of_weights_is_refused(folder: Path) -> None:
    weights = folder / "unet" / "openvino_model.bin"
    weights.write_bytes(weights.read_bytes()[:20])
    resealed(folder, "unet/openvino_model.bin")
    refused(folder, r"openvino_model\.xml(\.gz)?: got a graph that OpenVINO cannot read: ")


def test_links_out_of_the_folder_and_to_themselves_are_refused(folder: Path, tmp_path: Path) -> None:
    config = folder / "unet" / "config.json"
    shutil.move(config, tmp_path / "config.json")
    config.symlink_to(tmp_path / "config.json")
    refused(folder, "files: got unet/config.json, which lies outside the folder")
    config.unlink()
    config.symlink_to(config)
    refused(folder, "files: got unet/config.json, which cannot be read: .*Symlink loop")
    config.unlink()
    os.mkfifo(config)
    refused(folder, "got no file unet/config.json; allowed")


def test_a_matrix_the_other_way_round_which_ends_openvinos_process_is_refused(folder: Path) -> None:
    text = folder / "unet" / "openvino_model.xml"
    head, found, rest = text.read_text().partition('transpose_b="true"')
    assert found
    text.write_text(f'{head}transpose_b="false"{rest}')
    resealed(folder, "unet/openvino_model.xml")
    refused(folder, rf"{LAYER}: got weights \(inputs, outputs\)|got a graph that OpenVINO cannot read")


def test_a_folder_without_its_tokenizer_is_refused(folder: Path) -> None:
    shutil.rmtree(folder / "tokenizer")
    refused(folder, "got no file tokenizer/tokenizer.json; allowed", TextToImage.from_pretrained)
    rewrite(
        folder,
        "manifest.json",
        lambda m: m.update(files={name: e for name, e in m["files"].items() if "tokenizer" not in name}),
    )
    refused(folder, "files: got no tokenizer/tokenizer.json", TextToImage.from_pretrained)


def test_sample_of_a_damaged_folder_is_one_line_and_exit_code_2(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite(folder, "manifest.json", lambda manifest: manifest.update(sample_shape=["a", None, 10**9]))
    for prompt in ([], ["--prompt", "a cat"]):
        with pytest.raises(SystemExit) as ended:
            main(["sample", str(folder), *prompt, "--out", str(tmp_path / "grid.png")])
        assert ended.value.code == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert "manifest.json: sample_shape: got ['a', null, 1000000000]; allowed three whole numbers" in line
    assert not (tmp_path / "grid.png").exists()


def test_a_folder_of_other_formats_is_the_same_graph(packed: Path, whole: Path, tmp_path: Path) -> None:
    copy_folder(packed, tmp_path / "int8", "int8")
    assert read_manifest(tmp_path / "int8")["graph"] == "unet/openvino_model.xml"
    models = [OVUNet2DModel.from_pretrained(path) for path in (packed, whole, tmp_path / "int8")]
    one, *others = [model(X, 7, TEXT).sample for model in models]
    for other in others:
        np.testing.assert_array_equal(one, other)


def test_a_prompt_that_is_cut_says_what_is_left_out(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline = TextToImage.from_pretrained(whole)
    with pytest.warns(
        UserWarning, match=r"text_encoder reads 5 tokens of a prompt; left out of this one: 'dog, a cat'"
    ):
        pipeline("a cat a dog a dog, a cat")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipeline("a cat a dog a")
    main(
        [
            "sample",
            str(whole),
            "--prompt",
            "a cat",
            "--negative",
            "a dog a dog a cat",
            "--out",
            str(tmp_path / "grid.png"),
        ]
    )
    assert "warning: text_encoder reads 5 tokens of a prompt; left out of this one: 'cat'" in capsys.readouterr().out


@pytest.mark.parametrize("shape", ["1, 3", "4\x1a, 3", "4, 99", "99999999999, 3"])
def test_a_constant_whose_bytes_are_not_its_shapes_which_may_end_openvinos_process_is_refused(
    folder: Path, shape: str
) -> None:
    text = folder / "unet" / "openvino_model.xml"
    head, found, rest = text.read_text().partition('element_type="i8" shape="4, 3"')
    assert found
    text.write_text(f'{head}element_type="i8" shape="{shape}"{rest}')
    resealed(folder, "unet/openvino_model.xml")
    refused(folder, "openvino_model.xml: got a constant of shape .* in '12' bytes; allowed the bytes of its shape")
