"""Float baselines, their sizes and profiles; nothing here asserts a speed.

Not here: timing in turns (test_turns.py), the machine's description (test_hardware.py), and the deployed INT8 folder
(test_export_model.py).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
import torch
from diffusers import UNet2DModel
from tiny_runs import fixed_batch_graph

from pqcad_qat.commands.benchmark import time_denoisers
from pqcad_qat.errors import ModelError
from pqcad_qat.policy.variants import FP32, OV_FP32
from pqcad_qat.timing.baseline_trials import nncf_baseline, save_openvino
from pqcad_qat.timing.float_graph import convert_float, example_inputs
from pqcad_qat.timing.graph_sources import FixedBatchError
from pqcad_qat.timing.latency import (
    F32,
    compile_for_latency,
    openvino_candidate,
    size_bytes,
    torch_candidate,
)
from pqcad_qat.timing.node_profile import node_profile

SHAPE = (1, 8, 8)


# ---- float model, NNCF baseline


@pytest.fixture(scope="module")
def unet() -> UNet2DModel:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=16,
        norm_num_groups=4,
    ).eval()


@pytest.fixture(scope="module")
def converted(unet: UNet2DModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[ov.Model, Path]:
    folder, before, keys = tmp_path_factory.mktemp("float"), unet.time_proj, list(unet.state_dict())
    unet.train()
    model = convert_float(unet, SHAPE, 2, folder, times=1000)
    assert unet.training, "the model must be left as it was"
    assert unet.time_proj is before
    assert list(unet.state_dict()) == keys
    unet.eval()
    return model, folder / "openvino_model.xml"


@pytest.fixture(scope="module")
def baseline(converted: tuple[ov.Model, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    inputs = [example_inputs(SHAPE, 2, seed) for seed in range(3)]
    return nncf_baseline(converted[1], inputs, tmp_path_factory.mktemp("nncf"))


def output(candidate: Callable[[], Any]) -> np.ndarray:
    (found,) = candidate().values()
    return np.asarray(found)


def test_float_conversion_computes_the_same_function_in_f32(
    unet: UNet2DModel, converted: tuple[ov.Model, Path]
) -> None:
    for seed in range(3):
        inputs = example_inputs(SHAPE, 2, seed)
        expected = torch_candidate(unet, inputs)().numpy()
        np.testing.assert_allclose(output(openvino_candidate(converted[1], F32, inputs)), expected, atol=2e-5)


def test_float_conversion_is_static_and_named_as_the_export(converted: tuple[ov.Model, Path]) -> None:
    model, _ = converted
    assert [(port.get_any_name(), list(port.shape)) for port in model.inputs] == [
        ("sample", [2, 1, 8, 8]),
        ("timestep", [2]),
    ]
    assert [(port.get_any_name(), list(port.shape)) for port in model.outputs] == [("out_sample", [2, 1, 8, 8])]


def test_float_model_is_saved_without_rounding(unet: UNet2DModel, converted: tuple[ov.Model, Path]) -> None:
    read = ov.Core().read_model(converted[1])
    constants = [op for op in read.get_ops() if op.get_type_name() == "Constant"]
    assert not any(op.get_element_type() == ov.Type.f16 for op in constants)
    saved = {op.data.astype(np.float32).tobytes() for op in constants if op.get_element_type() == ov.Type.f32}
    assert unet.conv_in.weight.detach().numpy().tobytes() in saved


def test_nncf_baseline_stores_and_executes_int8(converted: tuple[ov.Model, Path], baseline: Path) -> None:
    assert size_bytes(baseline.with_suffix(".bin")) < 0.5 * size_bytes(converted[1].with_suffix(".bin"))
    rows = node_profile(baseline, {}, example_inputs(SHAPE, 2), runs=3)
    convolutions = {row.precision for row in rows if row.kind == "Convolution"}
    assert convolutions & {"i8", "u8"}


def test_nncf_baseline_leaves_the_float_model_alone(converted: tuple[ov.Model, Path], baseline: Path) -> None:
    assert baseline.is_file()
    assert "FakeQuantize" not in {op.get_type_name() for op in converted[0].get_ops()}


def test_nncf_baseline_needs_calibration(converted: tuple[ov.Model, Path], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="got no calibration input; allowed one or more"):
        nncf_baseline(converted[1], [], tmp_path)


def test_only_what_is_asked_for_is_timed_beside_full_precision_and_torchs_threads_stay(
    unet: UNet2DModel, converted: tuple[ov.Model, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pqcad_qat.timing.latency.usable_cores", lambda: 2)
    inputs = example_inputs(SHAPE, 2)
    assert set(time_denoisers(unet, {OV_FP32: converted[1]}, inputs, runs=1)) == {FP32, OV_FP32}
    assert set(time_denoisers(unet, {}, inputs, runs=1)) == {FP32}
    assert torch.get_num_threads() == 1


def test_profile_of_a_float_model_has_no_int8_and_is_sorted(converted: tuple[ov.Model, Path]) -> None:
    rows = node_profile(converted[1], F32, example_inputs(SHAPE, 2), runs=3)
    times = [row.milliseconds for row in rows]
    assert times == sorted(times, reverse=True)
    assert min(times) > 0
    assert {row.precision for row in rows if row.kind == "Convolution"} == {"f32"}
    assert sum(row.nodes for row in rows if row.kind == "Convolution") == sum(
        isinstance(m, torch.nn.Conv2d) for m in all_modules()
    )


def all_modules() -> list[torch.nn.Module]:
    with torch.device("meta"):
        config = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 16}
        blocks = {
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        }
        return list(UNet2DModel(sample_size=8, in_channels=1, out_channels=1, **config, **blocks).modules())


def test_candidates_from_missing_or_damaged_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="allowed an OpenVINO model's xml or a deployed folder"):
        openvino_candidate(tmp_path / "absent.xml", {}, example_inputs(SHAPE, 1))
    (tmp_path / "damaged.xml").write_text("<net", encoding="utf-8")
    with pytest.raises(ModelError, match=r"damaged\.xml: got a file that OpenVINO cannot read: .*; allowed"):
        openvino_candidate(tmp_path / "damaged.xml", {}, example_inputs(SHAPE, 1))


def test_a_graph_that_is_free_in_its_batch_takes_another_with_the_same_results(tmp_path: Path) -> None:
    ports = [
        ov.opset13.parameter([1, 4], np.float32, name="sample"),
        ov.opset13.parameter([1], np.int64, name="timestep"),
    ]
    doubled = ov.opset13.multiply(ports[0], np.float32(2))
    free = save_openvino(ov.Model([ov.opset13.result(doubled)], ports), tmp_path / "free")
    rows = np.arange(12, dtype=np.float32).reshape(3, 4)
    np.testing.assert_array_equal(compile_for_latency(free, F32, 3)([rows, np.zeros(3, np.int64)])[0], 2 * rows)
    assert list(compile_for_latency(free, F32).input(0).shape) == [1, 4]


def test_a_graph_whose_batch_is_a_constant_refuses_another(tmp_path: Path) -> None:
    with pytest.raises(FixedBatchError, match="got a batch of 5; allowed 2, which is fixed in its graph"):
        compile_for_latency(fixed_batch_graph(2, SHAPE, tmp_path), F32, 5)


def test_size_counts_all_files_below(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "one").write_bytes(bytes(10))
    (tmp_path / "a" / "b" / "two").write_bytes(bytes(7))
    assert size_bytes(tmp_path) == 17
    assert size_bytes(tmp_path / "a" / "b" / "two") == 7
    with pytest.raises(ModelError, match="got no such file or folder; allowed"):
        size_bytes(tmp_path / "absent")
