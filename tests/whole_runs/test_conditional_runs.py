"""Conditional models from plan to deployed folder: executed in INT8, integers equal, called as diffusers calls them,
guided.

Not here: what they take (test_architectures.py), and runs of unconditional models (test_run.py).
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conditional_models import Plain, conditions, saved
from rich.console import Console
from safetensors.torch import load_file, save_file
from tiny_runs import POLICIES, QUIET, SCHEDULER, TINY, without_page
from torch import Tensor, nn

from pqcad_qat.commands.run import run
from pqcad_qat.data.calibration import read_calibration
from pqcad_qat.errors import ModelError
from pqcad_qat.export.execution import execution_precision
from pqcad_qat.export.export_model import ExportRequest, export_model
from pqcad_qat.export.layer_inputs import recorded_inputs
from pqcad_qat.export.proof import layer_parity
from pqcad_qat.models.conditions import ConditionSet, exported_inputs
from pqcad_qat.models.denoiser import predict
from pqcad_qat.models.families.family import ConditionInput
from pqcad_qat.models.model_loading import load_model
from pqcad_qat.models.own_model import OwnModel
from pqcad_qat.policy.layer_rules import LayerRule, numbered
from pqcad_qat.policy.loading import load_policy
from pqcad_qat.policy.schema import ConditionsPolicy
from pqcad_qat.policy.variants import FP32_HALF, PQCAD_OPENVINO, SIMULATED, VARIANTS
from pqcad_qat.quantization.conversion import calibrate_ranges, frozen_weights, integer_layers, quantize_model
from pqcad_qat.quantization.plan import plan_layers
from pqcad_qat.serving.runtime import OVUNet2DModel
from pqcad_qat.stages.samplers import open_folder, sample_states

pytest.importorskip("transformers")

from shipped_runs import ShippedRun, shipped_run

BATCH = 2


@dataclass(frozen=True)
class Deployed:
    """A quantized model and its folder, with what it was exported on."""

    name: str
    model: nn.Module
    x: Tensor
    t: Tensor
    condition: dict[str, Tensor]
    folder: Path


@pytest.fixture(scope="module", params=["class_unet", "text_and_size_unet", "pixart"])
def deployed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Deployed:
    """Every layer at 7 bits, ranges from two states, not trained."""
    folder = tmp_path_factory.mktemp(request.param)
    full = saved(request.param, folder / "model")
    model, condition = copy.deepcopy(full.denoiser), conditions(request.param, BATCH)
    x, t = torch.randn(BATCH, *full.sample_shape, generator=torch.Generator().manual_seed(0)), torch.tensor([40, 999])
    rule = {"match": ["*"], "weights": {"bits": 7}, "inputs": {"bits": 8, "symmetric": False}}
    quantize_model(model, plan_layers(model, numbered([LayerRule.model_validate(rule)]), (7,), full.example))
    calibrate_ranges(model, [(x, t, condition)])
    inputs = exported_inputs(full.condition_inputs, ConditionSet(condition))
    layers = integer_layers(model)
    exported = ExportRequest(model.eval(), SCHEDULER, layers, full.sample_shape, batch_size=BATCH, conditions=inputs)
    export_model(exported, folder / "openvino")
    return Deployed(request.param, model, x, t, condition, folder / "openvino")


@pytest.fixture(scope="module")
def runtime(deployed: Deployed) -> OVUNet2DModel:
    return OVUNet2DModel.from_pretrained(deployed.folder)


def test_every_layer_executes_in_int8_and_gives_pytorchs_integers(deployed: Deployed) -> None:
    layers = integer_layers(deployed.model)
    assert execution_precision(deployed.folder, layers).float_layers == ()
    with recorded_inputs(
        deployed.model, (deployed.x, deployed.t, deployed.condition), deployed.folder.parent
    ) as inputs:
        parity = layer_parity(deployed.folder, layers, inputs)
    assert parity.layers_exact == parity.layers_checked == len(layers) > 10


def test_the_runtime_is_called_as_diffusers_calls_the_model(deployed: Deployed, runtime: OVUNet2DModel) -> None:
    added = {key: deployed.condition[key] for key in ("text_embeds", "time_ids") if key in deployed.condition}
    rest: dict[str, Any] = {key: value for key, value in deployed.condition.items() if key not in added}
    found = runtime(
        deployed.x, timestep=deployed.t, **rest, added_cond_kwargs=added, cross_attention_kwargs=None
    ).sample
    with torch.no_grad(), frozen_weights(deployed.model):
        wanted = predict(deployed.model, deployed.x, deployed.t, deployed.condition)
    assert (found - wanted).square().mean() < 1e-2 * wanted.square().mean()
    plain = runtime.predict(
        deployed.x.numpy(), deployed.t.numpy(), {key: value.numpy() for key, value in deployed.condition.items()}
    )
    np.testing.assert_array_equal(plain, found.numpy())


def test_the_index_of_a_conditional_denoiser_alone_names_no_pipeline_that_would_call_it_without_conditions(
    deployed: Deployed,
) -> None:
    index = json.loads((deployed.folder / "model_index.json").read_text())
    assert index["_class_name"] == "DiffusionPipeline"
    part = "transformer" if deployed.name == "pixart" else "unet"
    assert index[part] == ["pqcad_qat.serving.runtime", "OVUNet2DModel"]
    assert (deployed.folder / part / "openvino_model.xml").is_file()


def test_samples_keep_their_conditions_in_any_batch(deployed: Deployed, runtime: OVUNet2DModel) -> None:
    arrays = {key: value.numpy() for key, value in deployed.condition.items()}
    x, order = deployed.x.numpy(), [1, 0, 1]
    whole = runtime.predict(x, 500, arrays)
    np.testing.assert_allclose(
        runtime.predict(x[order], 500, {key: value[order] for key, value in arrays.items()}), whole[order], atol=1e-5
    )
    shared = runtime.predict(x, 500, {key: value[:1] for key, value in arrays.items()})
    np.testing.assert_array_equal(shared[0], whole[0])


def test_the_manifest_says_what_the_graph_takes_and_anything_else_is_refused(
    deployed: Deployed, runtime: OVUNet2DModel
) -> None:
    listed = {
        entry["name"]: (tuple(entry["shape"]), entry["dtype"])
        for entry in json.loads((deployed.folder / "manifest.json").read_text())["conditions"]
    }
    assert listed == {
        # diffusers' pipelines hand sizes over as floats
        key: (tuple(value.shape[1:]), "float32" if key == "time_ids" else str(value.dtype).removeprefix("torch."))
        for key, value in deployed.condition.items()
    }
    x, arrays = deployed.x.numpy(), {key: value.numpy() for key, value in deployed.condition.items()}
    name = next(iter(arrays))
    with pytest.raises(ModelError, match=rf"conditions: got none; allowed {name}"):
        runtime.predict(x, 5)
    with pytest.raises(ModelError, match=r"got .*mask"):
        runtime(x, timestep=5, **arrays, mask=x)
    with pytest.raises(ModelError, match=rf"{name}: got shape .*; allowed \(2"):
        runtime.predict(x, 5, {**arrays, name: np.concatenate([arrays[name]] * 2)})


def test_a_label_outside_the_table_is_refused_at_run_time(deployed: Deployed, runtime: OVUNet2DModel) -> None:
    whole = [entry for entry in runtime.conditions if entry["bound"] is not None]
    for entry in whole:
        wrong = {key: value.numpy() for key, value in deployed.condition.items()}
        wrong[entry["name"]] = wrong[entry["name"]] * 0 + entry["bound"]
        with pytest.raises(
            ModelError, match=rf"(?s){entry['name']}: got .*; allowed whole numbers in \[0, {entry['bound']}\)"
        ):
            runtime.predict(deployed.x.numpy(), 5, wrong)


# ---- whole runs
# ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dit_run(tmp_path_factory: pytest.TempPathFactory) -> ShippedRun:
    """Class labels and a learned variance; the student keeps both passes of guidance."""
    return shipped_run("w4a8-dit", tmp_path_factory)


@pytest.fixture(scope="module")
def text_run(tmp_path_factory: pytest.TempPathFactory) -> ShippedRun:
    """Cross attention to text; the student learns the guided prediction."""
    return shipped_run("w4a8-sd15", tmp_path_factory)


@pytest.mark.parametrize(("run_of", "passes"), [("dit_run", 2), pytest.param("text_run", 1, marks=pytest.mark.long)])
def test_a_run_of_latents_ends_in_a_report_of_what_can_be_said(
    run_of: str, passes: int, request: pytest.FixtureRequest
) -> None:
    found: ShippedRun = request.getfixturevalue(run_of)
    path, report = found.path, found.report
    assert (
        report["execution"]["executed_int8"] == report["execution"]["planned"] == report["parity"]["layers_exact"] > 10
    )
    assert report["parity"]["end_to_end_psnr"] > 30
    assert report["fid_protocol"] is None
    assert "No Frechet distance: evaluation.features names no feature network" in report["quality_note"]
    assert report["quality_note"] in (path / "report.html").read_text().replace("&#39;", "'")
    rows = {row["name"]: row for row in report["variants"]}
    assert {name: row["passes"] for name, row in rows.items()} == {
        name: passes if VARIANTS[name].distilled else 2 for name in rows
    }
    for name, row in rows.items():
        step = row["latency_ms_per_step"]
        assert (step is None) == (VARIANTS[name].runtime == SIMULATED)
        whole = None if step is None else pytest.approx(row["steps"] * row["passes"] * step)
        assert row["latency_ms_per_image"] == whole
        assert (row["fid_real"], row["ssim_fp"]) == (None, None)
    assert 0 < rows[PQCAD_OPENVINO]["psnr_fp"] < 80
    assert not [target for target in report["targets"] if "Frechet" in target["name"]]


@pytest.mark.long
def test_the_set_of_a_guided_run_holds_both_passes(text_run: ShippedRun) -> None:
    model, found = load_model(str(text_run.source)), read_calibration(text_run.path / "calibration")
    unconditional = {
        name: value.expand(len(found.states), *value.shape[1:]) for name, value in found.unconditional.items()
    }
    assert found.unconditional_predictions is not None
    with torch.no_grad():
        for column, t in enumerate(found.timesteps):
            x = found.states[:, column]
            torch.testing.assert_close(predict(model.denoiser, x, t, found.condition), found.predictions[:, column])
            torch.testing.assert_close(
                predict(model.denoiser, x, t, unconditional), found.unconditional_predictions[:, column]
            )
    parts = list(found.inputs(8, 4))
    rows = torch.cat([condition["encoder_hidden_states"] for _, _, condition in parts])
    assert [bool(torch.equal(row, found.unconditional["encoder_hidden_states"][0])) for row in rows] == [
        False,
        True,
    ] * 4


@pytest.mark.parametrize(("run_of", "scale"), [("dit_run", 3.0), pytest.param("text_run", 1.0, marks=pytest.mark.long)])
def test_a_folder_is_sampled_as_it_was_distilled(run_of: str, scale: float, request: pytest.FixtureRequest) -> None:
    found: ShippedRun = request.getfixturevalue(run_of)
    path = found.path
    sampled = load_file(path / "samples" / f"{PQCAD_OPENVINO}.safetensors")["latents"]
    for folder in ("openvino", "student"):
        variant = open_folder(str(path / folder), conditions=found.conditions)
        assert (variant.guidance_scale, variant.steps, variant.latent) == (scale, 2, True)
        again = sample_states(variant, len(sampled), 1234, len(sampled))
        error = float((again - sampled).square().mean() / sampled.square().mean())
        assert error < (1e-6 if folder == "openvino" else 1e-2)
    manifest = json.loads((path / "openvino" / "manifest.json").read_text())
    assert manifest["provenance"]["guidance_scale"] == scale


def test_a_learned_variance_is_no_part_of_what_is_deployed(dit_run: ShippedRun) -> None:
    config = json.loads((dit_run.path / "openvino" / "transformer" / "config.json").read_text())
    assert (config["in_channels"], config["out_channels"]) == (4, 4)
    model = OVUNet2DModel.from_pretrained(dit_run.path / "openvino")
    assert model(torch.zeros(1, 4, 8, 8), 5, class_labels=torch.tensor([3])).sample.shape == (1, 4, 8, 8)


def test_latents_beside_a_feature_network_are_refused_before_anything_is_made(tmp_path: Path) -> None:
    saved("dit", tmp_path / "model")
    own = [f"model.source={tmp_path / 'model'}", "evaluation.features=embedded:digits"]
    policy = load_policy(POLICIES / "w4a8-dit.yaml", own)
    with pytest.raises(
        ModelError, match=r"evaluation\.features: got 'embedded:digits'; .* makes latents of 4 channels.*allowed none"
    ):
        run(policy, tmp_path / "run", "command", Console(quiet=True))
    assert not (tmp_path / "run").exists()


def test_a_plain_module_goes_all_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return Plain()

    own = OwnModel("tiny", build, (1, 16, 16), SCHEDULER, conditions=(ConditionInput("tone", (2,), "float32"),))
    monkeypatch.setattr("pqcad_qat.timing.latency.usable_cores", lambda: 1)
    save_file({"tone": torch.randn(3, 2)}, tmp_path / "tones.safetensors")
    rules = '[{match: "*", weights: {bits: 4}, inputs: {bits: 8}}]'
    overrides = [
        f"conditions.embeddings={tmp_path / 'tones.safetensors'}",
        f"quantization.layers={rules}",
        f"evaluation.variants=[{FP32_HALF},{PQCAD_OPENVINO}]",
    ]
    few = ("progressive.steps=2", "distillation.steps=2", "evaluation.features=none", *QUIET)
    policy = load_policy(POLICIES / "smoke.yaml", [*TINY, *overrides, *few])
    with without_page():
        path = run(policy, tmp_path / "runs" / "plain", "command", Console(quiet=True), model=own).parent
    report = json.loads((path / "report.json").read_text())
    assert (
        report["execution"]["executed_int8"] == report["execution"]["planned"] == report["parity"]["layers_exact"] == 3
    )
    section = ConditionsPolicy(embeddings=str(tmp_path / "tones.safetensors"))
    ours, theirs = (
        sample_states(open_folder(str(path / folder), conditions=section, own=own), 4, 0, 4)
        for folder in ("openvino", "student")
    )
    assert (ours - theirs).square().mean() < 1e-2 * theirs.square().mean()
