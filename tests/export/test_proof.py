"""What the deployed folder executes in, and its integers against the quantized PyTorch layers'."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deployed_fixture import Quantized, deployed_unet, quantized_small
from tiny_runs import REPOSITORY, SUPPORT
from vnni_here import NEEDS_VNNI

from pqcad_qat.errors import ExportError
from pqcad_qat.export.execution import execution_precision
from pqcad_qat.export.proof import end_to_end_psnr, layer_parity
from pqcad_qat.serving.runtime import OVUNet2DModel

W4: dict[str, Any] = {"bits": 4}
A8: dict[str, Any] = {"bits": 8, "symmetric": False}


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Quantized:
    return deployed_unet(tmp_path_factory).quantized


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return deployed_unet(tmp_path_factory).int8


@pytest.mark.parametrize(
    ("weights", "inputs"),
    [
        (W4, {"bits": 4, "symmetric": True, "signed": True}),
        pytest.param(
            {"bits": 8, "granularity": "per_tensor"},
            {"bits": 8, "symmetric": True, "signed": True},
            marks=NEEDS_VNNI,
        ),
        ({"bits": 4, "symmetric": False}, {"bits": 7, "symmetric": False}),
        ({"bits": 3}, {"bits": 6, "symmetric": True, "signed": True}),
        ({"bits": 2}, {"bits": 5, "symmetric": True, "signed": "auto"}),
        ({"bits": 7, "symmetric": False}, {"bits": 3, "symmetric": False}),
    ],
    ids=lambda spec: "-".join(map(str, spec.values())),
)
def test_every_layer_executes_in_int8_and_gives_pytorchs_integers(
    weights: dict[str, Any], inputs: dict[str, Any], tmp_path: Path
) -> None:
    quantized = quantized_small(weights, inputs)
    folder = quantized.export(tmp_path / "openvino")
    executed = execution_precision(folder, quantized.layers)
    assert executed.float_layers == ()
    assert executed.executed_int8 == executed.planned == len(quantized.layers)
    parity = layer_parity(folder, quantized.layers, quantized.inputs)
    assert parity.layers_exact == parity.layers_checked == len(quantized.layers)
    assert parity.worst_error == 0
    assert max(layer.resolution for layer in parity.layers) < 0.25


def test_every_layer_of_a_unet_executes_in_int8_and_gives_pytorchs_integers(quantized: Quantized, folder: Path) -> None:
    executed = execution_precision(folder, quantized.layers)
    assert executed.float_layers == ()
    assert executed.executed_int8 == executed.planned == len(quantized.layers)
    parity = layer_parity(folder, quantized.layers, quantized.inputs)
    assert parity.layers_exact == parity.layers_checked == len(quantized.layers)


def test_packed_weights_give_the_same_integers(tmp_path: Path) -> None:
    quantized = quantized_small({"bits": 4, "symmetric": False}, A8)
    parity = layer_parity(quantized.export(tmp_path / "openvino", "packed"), quantized.layers, quantized.inputs)
    assert parity.layers_exact == parity.layers_checked


def test_ties_are_few_and_counted(quantized: Quantized, folder: Path) -> None:
    name = next(iter(quantized.layers))
    layer = quantized.layers[name]
    on_a_tie = np.full_like(quantized.inputs[name], 2.5 * np.float32(layer.input_scale))
    parity = layer_parity(folder, {name: layer}, {name: on_a_tie})
    assert parity.layers[0].ties == on_a_tie.size
    assert parity.layers_exact == 1
    real = layer_parity(folder, quantized.layers, quantized.inputs).layers
    assert sum(layer.ties for layer in real) < 1e-3 * sum(layer.inputs for layer in real)


@pytest.mark.parametrize("change", ["weight", "input_scale", "bias", "input_high"])
def test_a_layer_that_differs_from_the_plan_is_found_and_named(quantized: Quantized, folder: Path, change: str) -> None:
    name = next(name for name, layer in quantized.layers.items() if layer.kind == "Conv2d" and layer.bias is not None)
    layer = quantized.layers[name]
    assert layer.bias is not None
    flipped = layer.weight_int.copy()
    flipped.flat[5] += 1 if flipped.flat[5] < 7 else -1
    step = layer.input_scale * float(np.max(layer.weight_scale))
    changed = {
        "weight": replace(layer, weight_int=flipped),
        "input_scale": replace(layer, input_scale=layer.input_scale * 1.01),
        "bias": replace(layer, bias=layer.bias + np.float32(step)),
        "input_high": replace(layer, input_high=layer.input_high - 40),
    }[change]
    parity = layer_parity(folder, {**quantized.layers, name: changed}, quantized.inputs)
    assert parity.layers_exact == parity.layers_checked - 1
    assert parity.worst_layer == name
    assert parity.worst_error >= 1


def test_a_layer_that_left_int8_is_reported_with_its_precision(tmp_path: Path) -> None:
    quantized = quantized_small({"bits": 8, "symmetric": False}, A8)  # a zero point that int8 cannot absorb
    folder = quantized.export(tmp_path / "openvino")
    executed = execution_precision(folder, quantized.layers, {"INFERENCE_PRECISION_HINT": "f32"})
    assert "conv_in" in executed.float_layers
    assert executed.precisions["conv_in"] == "f32"
    assert executed.executed_int8 == executed.planned - len(executed.float_layers)
    assert executed.inference_precision == "f32"


def test_a_layer_that_the_graph_has_not_is_absent(folder: Path) -> None:
    assert execution_precision(folder, ["conv_in", "no.such.layer"]).float_layers == ("no.such.layer",)


def test_node_types_count_what_executed(quantized: Quantized, folder: Path) -> None:
    nodes = execution_precision(folder, quantized.layers).node_types
    convolutions = sum(count for (kind, _), count in nodes.items() if kind == "Convolution")
    assert convolutions == sum(layer.kind == "Conv2d" for layer in quantized.layers.values())


def test_a_planned_layer_without_an_input_is_refused(quantized: Quantized, folder: Path) -> None:
    inputs = {name: x for name, x in quantized.inputs.items() if name != "conv_in"}
    with pytest.raises(ExportError, match="conv_in"):
        layer_parity(folder, quantized.layers, inputs)


def test_psnr_is_its_closed_form() -> None:
    reference = np.linspace(-1, 1, 100, dtype=np.float32)
    assert end_to_end_psnr(reference + 0.02, reference) == pytest.approx(40, abs=1e-3)  # peak 2, error 0.02
    assert end_to_end_psnr(reference, reference) == float("inf")


def test_end_to_end_the_folder_is_close_to_the_quantized_model(quantized: Quantized, folder: Path) -> None:
    prediction = OVUNet2DModel.from_pretrained(folder).predict(quantized.states.numpy(), quantized.timesteps.numpy())
    assert end_to_end_psnr(prediction, quantized.prediction) > 35


# ---- CPUs without VNNI
# -----------------------------------------------------------------------------------------------------------


UNDER_AN_OLDER_CPU = """
import json, sys
from pathlib import Path
import numpy as np
from deployed_fixture import quantized_small
from pqcad_qat.export.traceable_modules import needs_vnni
from pqcad_qat.serving.vnni import has_vnni
from pqcad_qat.export.proof import layer_parity

def findings(bits, inputs, folder):
    quantized = quantized_small({"bits": bits}, inputs)
    quantized.export(folder)
    # every input at the end of its range: the largest sums that there can be
    extreme = {
        name: np.full_like(quantized.inputs[name], (layer.input_high - layer.input_zero_point) * layer.input_scale)
        for name, layer in quantized.layers.items()
    }
    parity = layer_parity(folder, quantized.layers, extreme)
    needing = [name for name, layer in quantized.layers.items() if needs_vnni(layer)]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert needing == [name for name, layer in manifest["layers"].items() if layer["needs_vnni"]]
    wrong = [layer.name for layer in parity.layers if not layer.exact]
    return {"vnni": has_vnni(), "needing": needing, "wrong": wrong}

print(json.dumps({
    f"{bits}-{inputs}": findings(bits, spec, Path(sys.argv[2]) / f"{bits}-{inputs}")
    for bits in (8, 7, 4)
    for inputs, spec in json.loads(sys.argv[1]).items()
}))
"""
INPUTS = {"unsigned": A8, "signed": {"bits": 8, "symmetric": True, "signed": True}}


@pytest.fixture(scope="module")
def under_an_older_cpu(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process without VNNI finds for weights of 8, 7 and 4 bits with all `INPUTS`, by bits and inputs."""
    command = [sys.executable, "-c", UNDER_AN_OLDER_CPU, json.dumps(INPUTS), str(tmp_path_factory.mktemp("older"))]
    older = {
        **os.environ,
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "PYTHONPATH": os.pathsep.join(map(str, (REPOSITORY, SUPPORT))),
    }
    done = subprocess.run(command, env=older, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    findings: dict[str, Any] = json.loads(done.stdout)
    return findings


@pytest.mark.parametrize(("bits", "overflows"), [(8, True), (7, False), (4, False)])
@pytest.mark.parametrize("inputs", INPUTS)
def test_layers_that_overflow_without_vnni_are_those_that_are_said_to(
    bits: int, overflows: bool, inputs: str, under_an_older_cpu: dict[str, Any]
) -> None:
    found = under_an_older_cpu[f"{bits}-{inputs}"]
    assert found["vnni"] is False
    assert bool(found["wrong"]) == bool(found["needing"]) == overflows
    assert set(found["wrong"]) <= set(found["needing"])
