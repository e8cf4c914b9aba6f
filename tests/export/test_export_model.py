"""What export_model writes, and what it leaves alone."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
import torch
from deployed_fixture import BATCH, PROVENANCE, SHAPE, Quantized, deployed_unet, quantized_small
from tiny_runs import SCHEDULER
from torch import nn

from pqcad_qat.errors import ExportError, ModelError
from pqcad_qat.export.export_model import ExportRequest, export_model
from pqcad_qat.export.time_tables import TimestepTable
from pqcad_qat.export.traceable_modules import QuantizedInput, effective_weights
from pqcad_qat.machine.files import file_digest
from pqcad_qat.sampling.schedulers import DDIM_KEYS
from pqcad_qat.serving.denoiser_graphs import read_graph
from pqcad_qat.serving.deployed_folder import read_manifest
from pqcad_qat.serving.packing import LAYER
from pqcad_qat.serving.runtime import OVUNet2DModel

INPUTS = {"bits": 8, "symmetric": False}


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> Quantized:
    return deployed_unet(tmp_path_factory).quantized


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return deployed_unet(tmp_path_factory).int8


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return deployed_unet(tmp_path_factory).packed


@pytest.fixture(scope="module")
def small() -> Quantized:
    return quantized_small({"bits": 8}, INPUTS)


def matrix_nodes(graph: ov.Model) -> dict[str, ov.Node]:
    kinds = ("Convolution", "GroupConvolution", "MatMul")
    return {
        node.get_friendly_name().removeprefix(LAYER): node
        for node in graph.get_ordered_ops()
        if node.get_type_name() in kinds
    }


def weights_of(node: ov.Node) -> tuple[np.ndarray, np.ndarray]:
    """(integers, scales) of a Multiply(Convert(integers), scales), behind the Reshape of a convolution in groups.

    A convolution before an upsampling computes its own from both.
    """
    multiply = node.input_value(1).get_node()
    if multiply.get_type_name() == "Reshape":
        multiply = multiply.input_value(0).get_node()
    return root_of(multiply.input_value(0)), root_of(multiply.input_value(1))


def root_of(value: ov.Output) -> np.ndarray:
    """The constant that a value is computed from, by first inputs."""
    node = value.get_node()
    return root_of(node.input_value(0)) if node.get_input_size() else node.data  # type: ignore[no-any-return]


def test_weights_and_scales_are_on_disk_exactly_as_pytorch_has_them(unet: Quantized, folder: Path) -> None:
    nodes = matrix_nodes(ov.Core().read_model(folder / "unet" / "openvino_model.xml"))
    for name, layer in unet.layers.items():
        integers, scales = weights_of(nodes[name])
        assert integers.dtype == np.int8
        np.testing.assert_array_equal(integers, layer.weight_int)
        assert scales.dtype == np.float32
        np.testing.assert_array_equal(scales.ravel(), np.ravel(layer.weight_scale))


def test_layers_of_one_input_group_read_one_fake_quantize(unet: Quantized, folder: Path) -> None:
    nodes = matrix_nodes(read_graph(folder, ov.Core()))
    groups = Counter(layer.input_group for layer in unet.layers.values())
    shared = [group for group, count in groups.items() if count > 1]
    assert shared  # to_q, to_k and to_v
    for group in shared:
        members = [name for name, layer in unet.layers.items() if layer.input_group == group]
        assert len({nodes[name].input_value(0).get_node().get_friendly_name() for name in members}) == 1


def test_the_model_is_left_as_it_was(unet: Quantized, tmp_path: Path) -> None:
    modules = dict(unet.model.named_modules())
    unet.model.train()
    unet.export(tmp_path / "openvino")
    assert unet.model.training
    unet.model.eval()
    assert all(module is modules[name] for name, module in unet.model.named_modules())
    with torch.no_grad():
        np.testing.assert_array_equal(unet.model(unet.states, unet.timesteps).sample.numpy(), unet.prediction)


def test_packed_weights_unpack_to_the_int8_graph_bit_for_bit(folder: Path, packed: Path) -> None:
    plain, unpacked = (read_graph(path, ov.Core()).get_ordered_ops() for path in (folder, packed))
    assert [node.get_type_name() for node in plain] == [node.get_type_name() for node in unpacked]
    for ours, theirs in zip(plain, unpacked, strict=True):
        if ours.get_type_name() == "Constant":
            assert ours.get_element_type() == theirs.get_element_type()
            np.testing.assert_array_equal(ours.data, theirs.data)


def test_packed_and_int8_folders_predict_alike_bitwise(unet: Quantized, folder: Path, packed: Path) -> None:
    plain, small = (
        OVUNet2DModel.from_pretrained(path).predict(unet.states.numpy(), unet.timesteps.numpy())
        for path in (folder, packed)
    )
    np.testing.assert_array_equal(plain, small)


def test_packed_weights_take_half_the_room(unet: Quantized, folder: Path, packed: Path) -> None:
    count = sum(layer.weight_int.size for layer in unet.layers.values())
    plain, small = (path / "unet" / "openvino_model.bin" for path in (folder, packed))
    assert plain.stat().st_size - small.stat().st_size == pytest.approx(count / 2, rel=0.01)
    assert "needed for plain OpenVINO" in json.loads((packed / "manifest.json").read_text())["weights"]["note"]


def test_plain_openvino_runs_the_int8_folder(unet: Quantized, folder: Path) -> None:
    core = ov.Core()
    request = core.compile_model(core.read_model(folder / "unet" / "openvino_model.xml"), "CPU").create_infer_request()
    request.infer({"sample": unet.states.numpy(), "timestep": unet.timesteps.numpy()})
    ours = OVUNet2DModel.from_pretrained(folder).predict(unet.states.numpy(), unet.timesteps.numpy())
    np.testing.assert_array_equal(request.get_tensor("out_sample").data, ours)


def test_the_manifest_says_what_is_inside(unet: Quantized, folder: Path, packed: Path) -> None:
    manifest = read_manifest(folder)
    assert manifest["provenance"] == PROVENANCE
    assert (manifest["sample_shape"], manifest["batch_size"], manifest["train_timesteps"]) == (list(SHAPE), BATCH, 1000)
    assert {name: entry["weight_bits"] for name, entry in manifest["layers"].items()} == dict.fromkeys(unet.layers, 4)
    assert {entry["stored_bits"] for entry in manifest["layers"].values()} == {8}
    assert {entry["stored_bits"] for entry in read_manifest(packed)["layers"].values()} == {4}
    on_disk = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert set(manifest["files"]) == on_disk - {"manifest.json"}
    assert all(entry["sha256"] == file_digest(folder / name) for name, entry in manifest["files"].items())


def test_the_folder_has_the_layout_of_a_diffusers_pipeline(unet: Quantized, folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    assert (index["_class_name"], index["scheduler"]) == ("DDIMPipeline", ["diffusers", "DDIMScheduler"])
    config = json.loads((folder / "unet" / "config.json").read_text())
    assert config["block_out_channels"] == list(unet.model.config["block_out_channels"])  # type: ignore[index]
    assert json.loads((folder / "scheduler" / "scheduler_config.json").read_text()) == {**DDIM_KEYS, **SCHEDULER}


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
def test_an_input_quantizer_of_any_width_is_torchs_in_openvino(small: Quantized, bits: int, symmetric: bool) -> None:
    low, high, zero = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1, 0) if symmetric else (0, 2**bits - 1, 2**bits // 3)
    layer = replace(small.layers["conv_in"], input_scale=0.0371, input_low=low, input_high=high, input_zero_point=zero)
    module, x = QuantizedInput(layer), torch.randn(1, 4096) * 0.0371 * 2**bits
    reference = torch.fake_quantize_per_tensor_affine(x, layer.input_scale, zero, low, high)
    compiled = ov.compile_model(ov.convert_model(module, example_input=x), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    np.testing.assert_allclose(compiled(x)[0], reference, rtol=2e-6, atol=1e-6)
    assert len(np.unique(reference)) == min(2**bits, high - low + 1)


def test_a_time_step_table_is_its_module(small: Quantized) -> None:
    t = torch.tensor([0, 999, 17])
    table = TimestepTable(Sinusoid(), 1000)
    torch.testing.assert_close(table(t), Sinusoid()(t), rtol=0, atol=0)
    layer = replace(small.layers["conv_in"], input_scale=1 / 64, input_low=0, input_high=255, input_zero_point=100)
    on_grid = torch.fake_quantize_per_tensor_affine(Sinusoid()(t), 1 / 64, 100, 0, 255)
    torch.testing.assert_close(TimestepTable(Sinusoid(), 1000, layer)(t), on_grid, rtol=0, atol=0)


class Sinusoid(nn.Module):
    def forward(self, t: torch.Tensor) -> torch.Tensor:
        return torch.sin(t.float()[:, None] * torch.tensor([1.0, 0.1, 0.01]))


def test_asymmetric_weights_below_8_bits_become_signed_integers_without_a_zero_point(tmp_path: Path) -> None:
    quantized = quantized_small({"bits": 4, "symmetric": False}, INPUTS)
    nodes = matrix_nodes(read_graph(quantized.export(tmp_path / "openvino"), ov.Core()))
    for name, layer in quantized.layers.items():
        assert np.any(layer.weight_zero_point)
        np.testing.assert_array_equal(
            weights_of(nodes[name])[0].reshape(layer.weight_int.shape), effective_weights(layer)
        )


def test_a_deployed_folder_is_replaced_and_any_other_refused(small: Quantized, tmp_path: Path) -> None:
    folder = small.export(tmp_path / "openvino", batch=1)
    assert read_manifest(small.export(folder, batch=3))["batch_size"] == 3
    assert [path.name for path in tmp_path.iterdir()] == ["openvino"]
    foreign = tmp_path / "photographs"
    foreign.mkdir()
    (foreign / "one.jpg").write_bytes(b"mine")
    with pytest.raises(ExportError, match="photographs"):
        small.export(foreign)
    assert (foreign / "one.jpg").read_bytes() == b"mine"


def test_a_failed_export_leaves_the_older_folder_whole(small: Quantized, tmp_path: Path) -> None:
    folder = small.export(tmp_path / "openvino")
    beyond = replace(small, layers={**small.layers, "conv_in": replace(small.layers["conv_in"], input_zero_point=300)})
    with pytest.raises(ExportError, match="conv_in"):
        beyond.export(folder)
    read_manifest(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["openvino"]


def test_a_planned_layer_that_the_model_has_not_is_named(small: Quantized, tmp_path: Path) -> None:
    layers = {**small.layers, "no.such": replace(small.layers["conv_in"], name="no.such")}
    with pytest.raises(ExportError, match=r"no\.such"):
        replace(small, layers=layers).export(tmp_path / "openvino")


@pytest.mark.parametrize("steps", [None, 0, "1000"])
def test_a_scheduler_config_without_time_steps_is_refused(small: Quantized, tmp_path: Path, steps: object) -> None:
    with pytest.raises(ModelError, match="num_train_timesteps"):
        export_model(
            ExportRequest(small.model, {**SCHEDULER, "num_train_timesteps": steps}, small.layers, SHAPE, batch_size=1),
            tmp_path / "openvino",
        )
