"""Text-to-image folders whose graph takes any batch and size: what it computes there, and in which precision."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
import torch

pytest.importorskip("transformers")

from text_pipelines import FLOAT, DeployedPipeline, deployed, float_pipeline

from pqcad_qat.errors import ModelError
from pqcad_qat.export.execution import execution_at_any_size
from pqcad_qat.export.model_server import server_graph
from pqcad_qat.models.denoiser import predict
from pqcad_qat.serving.deployed_folder import copy_folder, read_manifest
from pqcad_qat.serving.graph_checks import port_of
from pqcad_qat.serving.graph_inputs import port_values, prediction
from pqcad_qat.serving.runtime import OVUNet2DModel

F32 = {"INFERENCE_PRECISION_HINT": "f32"}
NEAR_DB = 30.0
"""Smallest PSNR in dB of predictions in INT8: values beside a rounding boundary fall to either side of it."""

KINDS = (
    "stable-diffusion",
    pytest.param("stable-diffusion-2", marks=pytest.mark.long),
    pytest.param("stable-diffusion-xl", marks=pytest.mark.long),
    pytest.param("stable-diffusion-3", marks=pytest.mark.long),
    "flux",
)


@pytest.fixture(scope="module", params=KINDS)
def where(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> DeployedPipeline:
    if request.param == "stable-diffusion-2":
        return two_levels(tmp_path_factory)
    return float_pipeline(request.param, tmp_path_factory)


def two_levels(factory: pytest.TempPathFactory) -> DeployedPipeline:
    """A pipeline of two levels; with 4 bits the convolution of an upsampled image is computed before the upsampling."""
    if not _TWO_LEVELS:
        _TWO_LEVELS.append(deployed("stable-diffusion-2", factory.mktemp("two-levels"), FLOAT, bits=4))
    return _TWO_LEVELS[0]


_TWO_LEVELS: list[DeployedPipeline] = []


def inputs_of(folder: Path, count: int, size: tuple[int, int]) -> tuple[np.ndarray, float, Mapping[str, np.ndarray]]:
    """A batch of noise of this size, a time, and conditions."""
    manifest, dice = read_manifest(folder), np.random.default_rng(0)
    conditions = {
        entry["name"]: (
            dice.standard_normal((count, *entry["shape"])).astype(np.float32)
            if entry["bound"] is None
            else np.full((count, *entry["shape"]), 16, entry["dtype"])
        )
        for entry in manifest["conditions"]
    }
    conditions |= {"guidance": np.full(count, 3.5, np.float32)} if "guidance" in conditions else {}
    x = dice.standard_normal((count, manifest["sample_shape"][0], *size)).astype(np.float32)
    return x, 500.0, conditions


def predicted(model: torch.nn.Module, x: np.ndarray, t: float, conditions: Mapping[str, np.ndarray]) -> np.ndarray:
    """What PyTorch predicts; sizes are whole numbers there."""
    whole = {name: torch.from_numpy(value) for name, value in conditions.items()}
    time: Any = torch.tensor([t] * len(x))
    with torch.no_grad():
        return predict(model, torch.from_numpy(x), time if "guidance" in whole else time.long(), whole).numpy()


@pytest.mark.parametrize(("count", "size"), [(3, (16, 8)), (1, (12, 16))])
def test_it_predicts_what_pytorch_predicts_at_every_size(
    where: DeployedPipeline, count: int, size: tuple[int, int]
) -> None:
    x, t, conditions = inputs_of(where.folder, count, size)
    found = OVUNet2DModel.from_pretrained(where.folder, properties=F32).predict(x, t, conditions)
    wanted = predicted(where.model, x, t, conditions)
    assert 20 * np.log10(np.ptp(wanted) / np.sqrt(np.mean((found - wanted) ** 2))) > NEAR_DB


def test_a_program_that_compiles_the_file_as_it_is_gets_the_same(where: DeployedPipeline) -> None:
    """As OpenVINO GenAI and optimum-intel do: any batch and size, and one time for the whole batch."""
    runtime = OVUNet2DModel.from_pretrained(where.folder, properties=F32)
    graph = ov.Core().read_model(where.folder / runtime.manifest["graph"])
    compiled = ov.Core().compile_model(graph, "CPU", F32)
    for count, size in ((2, (8, 8)), (2, (12, 16))):
        x, t, conditions = inputs_of(where.folder, count, size)
        ports = [port.get_names() for port in compiled.inputs]
        named = port_values(
            ports, {"sample": x, "timestep": np.array([t]).astype(runtime._timestep_dtype), **conditions}
        )
        found = prediction(compiled(named)[0], *size)
        wanted = runtime.predict(x, t, conditions)
        assert 20 * np.log10(np.ptp(wanted) / max(1e-9, np.sqrt(np.mean((found - wanted) ** 2)))) > NEAR_DB
    layers = runtime.manifest["layers"]
    assert execution_at_any_size(where.folder, layers, {}).executed_int8 == len(layers) > 20


def test_the_ports_of_the_file_leave_batch_and_size_open(where: DeployedPipeline) -> None:
    manifest = read_manifest(where.folder)
    assert manifest["any_size"] is True
    graph = ov.Core().read_model(where.folder / manifest["graph"])
    ports = {port.get_any_name(): port_of(port)[0] for port in graph.inputs}
    assert ports["timestep"] == [-1]
    assert all(shape[0] == -1 for name, shape in ports.items() if name != "txt_ids")
    states = ports.get("sample", ports.get("hidden_states"))
    assert states in ([-1, 4, -1, -1], [-1, -1, 16])
    # OpenVINO GenAI hands over sizes as float32
    assert "time_ids" not in ports or port_of(graph.input("time_ids")) == ([-1, 6], "float32")


def test_a_copy_in_another_format_takes_any_size_too(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    original = two_levels(tmp_path_factory).folder
    copy_folder(original, tmp_path / "packed", "packed")
    x, t, conditions = inputs_of(original, 1, (12, 8))
    found, wanted = (
        OVUNet2DModel.from_pretrained(folder, properties=F32).predict(x, t, conditions)
        for folder in (tmp_path / "packed", original)
    )
    np.testing.assert_array_equal(found, wanted)


def test_a_size_that_the_levels_cannot_halve_is_refused(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = two_levels(tmp_path_factory).folder
    x, t, conditions = inputs_of(folder, 1, (9, 8))
    with pytest.raises(
        ModelError, match=r"got shape \(1, 4, 9, 8\); allowed \(B, 4, H, W\) with H and W multiples of 2"
    ):
        OVUNet2DModel.from_pretrained(folder).predict(x, t, conditions)
    x, t, conditions = inputs_of(folder, 1, (8, 8))
    with pytest.raises(ModelError, match=r"got shape \(1, 3, 8, 8\); allowed \(B, 4, H, W\)"):
        OVUNet2DModel.from_pretrained(folder).predict(x[:, :3], t, conditions)


def test_a_pipeline_that_genai_does_not_have_keeps_its_one_size(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = float_pipeline("pixart", tmp_path_factory).folder
    manifest = read_manifest(folder)
    assert manifest["any_size"] is False
    assert "vae_encoder" not in manifest["parts"]
    assert not ov.Core().read_model(folder / manifest["graph"]).is_dynamic()


def test_patches_lie_where_pytorch_has_them(tmp_path: Path) -> None:
    """In floating point, where a wrong place shows; the float steps' graph takes other sizes too."""
    where = deployed("flux", tmp_path, FLOAT, bits=None, float_from=500.0)
    runtime = OVUNet2DModel.from_pretrained(where.folder, properties=F32)
    for size in ((12, 16), (16, 4), (4, 16)):  # the last ones have as many patches as the folder's own
        x, _, conditions = inputs_of(where.folder, 1, size)
        for t in (300.0, 700.0):
            wanted = predicted(where.model, x, t, conditions)
            found = runtime.predict(x, t, conditions)
            assert 20 * np.log10(np.ptp(wanted) / np.sqrt(np.mean((found - wanted) ** 2))) > 60


OPTIONS = {
    **dict.fromkeys(("models_path", "device", "plugin_config", "max_resolution", "default_resolution"), str),
    **dict.fromkeys(("resolution",), str),
    **dict.fromkeys(("max_num_images_per_prompt", "default_num_inference_steps", "max_num_inference_steps"), int),
    **dict.fromkeys(("num_images_per_prompt",), int),
    "guidance_scale": float,
}
"""Options of OpenVINO Model Server's ImageGenCalculator, and their types, as its page documents them."""


def test_the_file_for_openvino_model_server_is_as_documented(where: DeployedPipeline) -> None:
    text = (where.folder / "graph.pbtxt").read_text()
    assert 'input_side_packet: "IMAGE_GEN_NODE_RESOURCES:pipes"' in text  # without it the server serves nothing
    assert text.count("{") == text.count("}") == 3
    body = text.partition("ImageGenCalculatorOptions]: {")[2].partition("}")[0]
    options = dict(line.strip().split(": ", 1) for line in body.strip().splitlines())
    values = {key: json.loads(value) for key, value in options.items()}
    assert all(isinstance(value, OPTIONS[key]) for key, value in values.items())
    # the student's number of steps is what runs where a request names none
    assert values == {
        "models_path": "./",
        "device": "CPU",
        "default_resolution": "16x16",
        "default_num_inference_steps": 3,
    }
    assert "graph.pbtxt" in read_manifest(where.folder)["files"]
    assert 'default_resolution: "24x16"' in server_graph((16, 24), 3)


def test_packed_weights_are_not_for_other_programs(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    copy_folder(two_levels(tmp_path_factory).folder, tmp_path / "packed", "packed")
    assert "graph.pbtxt" not in read_manifest(tmp_path / "packed")["files"]
