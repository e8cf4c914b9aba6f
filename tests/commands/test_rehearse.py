"""An architecture with random weights, to a proven folder: what is made, what is told, and that saving memory changes
no byte.

Not here: full-size architectures, whose plans alone are made in tests (test_large_policies.py).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from conditional_models import saved
from tiny_runs import POLICIES

from pqcad_qat.commands.rehearse import REPORT, rehearse
from pqcad_qat.export import proof
from pqcad_qat.export.export_model import ExportRequest, export_model
from pqcad_qat.export.layer_inputs import recorded_inputs
from pqcad_qat.export.proof import layer_parity
from pqcad_qat.models.denoiser import DiffusionModel, predict
from pqcad_qat.models.untrained import architecture_configs, fixed_inputs, noise_inputs
from pqcad_qat.policy.loading import load_policy
from pqcad_qat.quantization.conversion import integer_layers, quantized_layers, taken_integers
from pqcad_qat.report.rehearsal_record import Rehearsal
from pqcad_qat.report.tables import stages_table
from pqcad_qat.serving.deployed_folder import read_manifest
from pqcad_qat.stages.untrained_models import blueprint, quantized_untrained

STAGES = (
    "plan",
    "random weights",
    "quantize",
    "ranges",
    "inputs of layers",
    "integers",
    "convert and write",
    "load and run",
    "compare integers",
    "pack",
)


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("openvino_model*")
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a text-conditional UNet with shortcuts to split."""
    folder = tmp_path_factory.mktemp("model")
    saved("text_unet", folder)
    return str(folder)


@pytest.fixture(scope="module")
def found(source: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Rehearsal, Path]:
    folder = tmp_path_factory.mktemp("rehearsed")
    policy = load_policy(POLICIES / "w4a8-sd15.yaml", [f"model.source={source}"])
    rehearsal, record = rehearse(policy, folder, "rehearse", lambda _: None)
    assert record == folder / REPORT
    return rehearsal, folder


def test_every_planned_layer_is_seen_in_int8_and_exact_and_every_stage_is_told(
    found: tuple[Rehearsal, Path], source: str
) -> None:
    rehearsal, folder = found
    assert (
        rehearsal.planned
        == rehearsal.executed_int8
        == rehearsal.exact
        == len(read_manifest(folder / "openvino")["layers"])
        > 10
    )
    assert tuple(cost.name for cost in rehearsal.stages) == STAGES
    assert rehearsal.peak_bytes >= max(cost.kept_bytes or 0 for cost in rehearsal.stages)
    assert rehearsal.parameters == sum(
        weights.numel() for weights in saved("text_unet", folder / "again").denoiser.parameters()
    )
    assert rehearsal.sizes["packed"] < rehearsal.sizes["int8"]
    assert {path.name for path in folder.iterdir()} >= {"openvino", "packed"}


def test_its_record_is_the_table_that_is_shown(found: tuple[Rehearsal, Path]) -> None:
    rehearsal, folder = found
    assert json.loads((folder / REPORT).read_text()) == json.loads(json.dumps(asdict(rehearsal)))
    assert [column.header for column in stages_table(rehearsal).columns] == [
        "stage",
        "seconds",
        "MB at the peak",
        "MB kept",
    ]
    assert stages_table(rehearsal).row_count == len(STAGES) + 1


@pytest.fixture
def model(source: str) -> DiffusionModel:
    """What the rehearsal exported, with its weights."""
    configs = architecture_configs(source)
    assert configs is not None
    return quantized_untrained(
        configs, blueprint(configs, source, load_policy(POLICIES / "w4a8-sd15.yaml").quantization), (1,)
    )


def test_letting_go_of_weights_changes_no_integer_and_no_byte_of_the_export(
    found: tuple[Rehearsal, Path], model: DiffusionModel, tmp_path: Path
) -> None:
    kept, conditions = integer_layers(model.denoiser), fixed_inputs(model.condition_inputs)
    request = ExportRequest(
        model.denoiser, model.scheduler_config, kept, model.sample_shape, batch_size=1, conditions=conditions
    )
    export_model(request, tmp_path)
    assert digests(tmp_path) == digests(found[1] / "openvino")
    taken = taken_integers(model.denoiser)
    assert {layer.weight.numel() for layer in quantized_layers(model.denoiser).values()} == {0}
    assert all(np.array_equal(kept[name].weight_int, taken[name].weight_int) for name in kept)


def test_inputs_of_layers_are_those_that_the_model_reads_and_are_gone_afterwards(
    model: DiffusionModel, tmp_path: Path
) -> None:
    layers, states = quantized_layers(model.denoiser), noise_inputs(model, 2)
    read: dict[str, torch.Tensor] = {}
    for name, layer in layers.items():
        layer.register_forward_pre_hook(lambda _, given, name=name: read.update({name: given[0].clone()}))
    with recorded_inputs(model.denoiser, states, tmp_path) as inputs:
        read.clear()
        with torch.no_grad():
            predict(model.denoiser, *states)
        assert inputs.keys() == layers.keys() == read.keys()
        for name in inputs:
            np.testing.assert_array_equal(inputs[name], read[name].numpy())
        files = list(tmp_path.rglob("*.npy"))
    assert 0 < len(files) == len({layer.plan.input_group for layer in layers.values()}) < len(layers)
    assert not any(tmp_path.iterdir())


def test_layers_compared_in_parts_are_found_as_all_at_once(
    found: tuple[Rehearsal, Path], model: DiffusionModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers, folder = integer_layers(model.denoiser), found[1] / "openvino"
    with recorded_inputs(model.denoiser, noise_inputs(model, 1), tmp_path) as inputs:
        whole = layer_parity(folder, layers, inputs)
        monkeypatch.setattr(proof, "BUNDLE_VALUES", 3000)
        assert layer_parity(folder, layers, inputs) == whole
    assert whole.layers_exact == len(layers)
