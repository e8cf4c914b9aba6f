"""Stable Diffusion 3's and Flux's denoisers in the runs of the policies that ship for them, and diffusers' own
scheduler with what was deployed.

Not here: flow matching itself (test_flow.py), and what the classes take (test_architectures.py).
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
import torch
from conditional_models import saved
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file
from tiny_runs import POLICIES
from torch import Tensor
from vnni_here import NEEDS_VNNI, VNNI, exact_or_excused

from pqcad_qat.data.calibration import read_calibration
from pqcad_qat.errors import ModelError
from pqcad_qat.export.time_tables import GUIDANCES, TimestepTable, known_times
from pqcad_qat.machine.files import file_digest
from pqcad_qat.models.denoiser import predict
from pqcad_qat.models.families.latent_rows import packed, places, unpacked
from pqcad_qat.policy.loading import load_policy
from pqcad_qat.policy.variants import FP32, PQCAD_OPENVINO, VARIANTS
from pqcad_qat.quantization.conversion import frozen_weights
from pqcad_qat.quantization.student_folder import load_quantized
from pqcad_qat.sampling.trajectory import initial_noise, noise_schedule
from pqcad_qat.serving.graph_checks import port_of
from pqcad_qat.serving.packing import IN_FLOAT32
from pqcad_qat.serving.runtime import OVUNet2DModel
from pqcad_qat.serving.transformer import OVTransformer2DModel
from pqcad_qat.stages.prepared import prepare
from pqcad_qat.stages.samplers import open_folder, sample_states

pytest.importorskip("transformers")

from shipped_runs import GUIDANCE, ShippedRun, shipped_run
from text_pipelines import POOLED, T5_TOKENS, TEXT_TOKENS, WIDTH

pytestmark = pytest.mark.long

AXES = 3
"""Number of axes of a place in Flux: a time that is not used, a row and a column."""

SD3, FLUX = "w8a8-sd3", "w8a8-flux"


@pytest.fixture(scope="module", params=[SD3, FLUX])
def flow_run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ShippedRun:
    """Of SD3 guided in two passes; of Flux with the guidance that it is given as an input."""
    return shipped_run(request.param, tmp_path_factory)


def test_every_planned_layer_executes_in_int8_with_pytorchs_integers(flow_run: ShippedRun) -> None:
    report = flow_run.report
    execution = report["execution"]
    assert execution["executed_int8"] == execution["planned"] == exact_or_excused(report) > 25
    assert execution["float_layers"] == [{SD3: "pos_embed.proj", FLUX: "x_embedder"}[flow_run.name]]
    assert report["parity"]["end_to_end_psnr"] > 30 or not VNNI


def test_every_variant_is_sampled_and_compared_with_full_precision(flow_run: ShippedRun) -> None:
    rows = {row["name"]: row for row in flow_run.report["variants"]}
    assert {row["passes"] for row in rows.values()} == {2 if flow_run.name == SD3 else 1}
    assert all(rows[name]["psnr_fp"] > 15 for name in rows if VARIANTS[name].sampled and name != FP32)
    manifest = json.loads((flow_run.path / "openvino" / "manifest.json").read_text())
    assert (manifest["timestep_dtype"], manifest["provenance"]["sampler"]) == ("float32", "euler")


def test_the_set_holds_the_times_of_the_sampler_and_of_its_student(flow_run: ShippedRun) -> None:
    schedule = noise_schedule(
        json.loads((flow_run.path / "student" / "scheduler" / "scheduler_config.json").read_text())
    )
    times = read_calibration(flow_run.path / "calibration").timesteps
    assert set(times) == {t for steps in (4, 2) for t, _ in schedule.walk(steps)}


@NEEDS_VNNI
def test_a_folder_is_sampled_as_it_was_distilled(flow_run: ShippedRun) -> None:
    sampled = load_file(flow_run.path / "samples" / f"{PQCAD_OPENVINO}.safetensors")["latents"]
    for folder, least in (("openvino", 60.0), ("student", 25.0)):
        variant = open_folder(str(flow_run.path / folder), conditions=flow_run.conditions)
        assert (variant.steps, variant.sample_shape, variant.schedule.sampler) == (2, (4, 8, 8), "euler")
        assert decibels(sample_states(variant, len(sampled), 1234, len(sampled)), sampled) > least


def test_diffusers_scheduler_makes_the_same_image_with_the_deployed_transformer(flow_run: ShippedRun) -> None:
    """As StableDiffusion3Pipeline and FluxPipeline do it, which the library transformers keeps from being imported."""
    folder = flow_run.path / "openvino"
    transformer, ours = (
        OVTransformer2DModel.from_pretrained(folder),
        open_folder(str(folder), conditions=flow_run.conditions),
    )
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
    steps = scheduler.config.num_inference_steps
    latents = torch.from_numpy(initial_noise(7, 0, 3, ours.sample_shape))
    condition = ours.conditions.drawn(7, 0, 3)
    if flow_run.name == FLUX:
        # mu has no say: the shift is settled
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=1.0)
        latents = packed(latents)
    else:
        scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        if flow_run.name == FLUX:
            ids = {"img_ids": places(8, 8), "txt_ids": torch.zeros(T5_TOKENS, 3)}
            with transformer.cache_context("cond"):
                (velocity,) = transformer(latents, timestep=t.expand(3) / 1000, **ids, **condition, return_dict=False)
        else:
            other = {name: value.expand(3, *value.shape[1:]) for name, value in ours.conditions.unconditional.items()}
            doubled = {name: torch.cat([other[name], value]) for name, value in condition.items()}
            output = transformer(torch.cat([latents] * 2), timestep=t.expand(6), **doubled, joint_attention_kwargs=None)
            without, text = output.sample.chunk(2)  # type: ignore[union-attr]
            velocity = without + ours.guidance_scale * (text - without)
        latents = scheduler.step(velocity, t, latents, return_dict=False)[0]
    found = unpacked(latents, 8, 8) if flow_run.name == FLUX else latents
    assert decibels(found, sample_states(ours, 3, 7, 3)) > 60


@NEEDS_VNNI
@pytest.mark.parametrize("precision", ["f32", "bf16"])
def test_time_and_guidance_count_as_in_pytorch_in_any_precision(flow_run: ShippedRun, precision: str) -> None:
    """BF16 would round a time of 899.6 to 900 and a guidance of 3550 to 3552: sines of the fastest would mean something
    else.
    """
    deployed = OVUNet2DModel.from_pretrained(
        flow_run.path / "openvino", properties={"INFERENCE_PRECISION_HINT": precision}
    )
    model, _, _ = load_quantized(flow_run.path / "student")
    calibration = read_calibration(flow_run.path / "calibration")
    x, condition = calibration.states[:, 1], dict(calibration.condition)
    assert deployed.predict(x.numpy(), 899.6, arrays(condition)).shape == x.shape
    for t in calibration.timesteps:
        if "guidance" in condition:
            condition["guidance"] = torch.full((len(x),), 3.55)
        with torch.no_grad(), frozen_weights(model.denoiser):
            wanted = predict(model.denoiser, x, t, condition)
        assert decibels(torch.from_numpy(deployed.predict(x.numpy(), t, arrays(condition))), wanted) > 38


def test_the_graph_takes_no_sines_at_run_time(flow_run: ShippedRun) -> None:
    graph = ov.Core().read_model(flow_run.path / "openvino" / "transformer" / "openvino_model.xml")
    sines = [node for node in graph.get_ops() if node.get_type_name() in ("Sin", "Cos")]
    # those of Flux's patches are taken, where they lie, in float32 on every CPU; times and guidance are tables
    assert len(sines) == (0 if flow_run.name == SD3 else 2 * AXES)
    assert all("pos_embed" in node.get_friendly_name() for node in sines)
    assert all(node.get_friendly_name().endswith(IN_FLOAT32) for node in sines)
    assert graph.input("timestep").get_element_type() == ov.Type.f32


def test_the_graph_lies_where_optimum_intel_looks_and_takes_what_diffusers_pipeline_hands_over(
    flow_run: ShippedRun,
) -> None:
    folder = flow_run.path / "openvino"
    assert not (folder / "unet").exists()
    known = "SD3Transformer2DModel" if flow_run.name == SD3 else "FluxTransformer2DModel"
    assert json.loads((folder / "model_index.json").read_text())["transformer"] == ["diffusers", known]
    ports = {
        port.get_any_name(): port_of(port)[0]
        for port in ov.Core().read_model(folder / "transformer" / "openvino_model.xml").inputs
    }
    tokens = TEXT_TOKENS["stable-diffusion-3" if flow_run.name == SD3 else "flux"]
    text = {"encoder_hidden_states": [-1, tokens, WIDTH], "pooled_projections": [-1, POOLED]}
    if flow_run.name == SD3:
        assert ports == {"hidden_states": [-1, 4, -1, -1], "timestep": [-1], **text}
    else:
        more = {"guidance": [-1], "img_ids": [-1, 3], "txt_ids": [tokens, 3]}
        assert ports == {"hidden_states": [-1, -1, 16], "timestep": [-1], **text, **more}
        scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
        assert scheduler["embedded_guidance"] == GUIDANCE


def test_a_folder_of_before_that_has_its_transformer_in_unet_is_read(flow_run: ShippedRun, tmp_path: Path) -> None:
    if flow_run.name == FLUX:
        pytest.skip("its graph was another one")
    now, before, core = flow_run.path / "openvino", tmp_path / "before", ov.Core()
    shutil.copytree(now, before)
    (before / "transformer").rename(before / "unet")
    graph = core.read_model(now / "transformer" / "openvino_model.xml")
    graph.input("hidden_states").get_tensor().set_names({"sample"})
    ov.save_model(graph, before / "unet" / "openvino_model.xml", compress_to_fp16=False)
    manifest = json.loads((before / "manifest.json").read_text())
    names = [name.replace("transformer/", "unet/") for name in manifest["files"]]
    manifest["files"] = {
        name: {"bytes": (before / name).stat().st_size, "sha256": file_digest(before / name)} for name in names
    }
    (before / "manifest.json").write_text(json.dumps(manifest | {"graph": "unet/openvino_model.xml"}))
    variants = [open_folder(str(folder), conditions=flow_run.conditions) for folder in (before, now)]
    old, new = (sample_states(variant, 2, 1, 2) for variant in variants)
    assert decibels(old, new) > 60
    OVTransformer2DModel.from_pretrained(before).save_pretrained(tmp_path / "again", weights="packed")
    assert (tmp_path / "again" / "unet" / "openvino_model.xml.gz").is_file()


def test_other_times_and_latents_than_the_graph_takes_are_refused(flow_run: ShippedRun) -> None:
    transformer = OVTransformer2DModel.from_pretrained(flow_run.path / "openvino")
    condition = arrays(
        open_folder(str(flow_run.path / "openvino"), conditions=flow_run.conditions).conditions.drawn(0, 0, 1)
    )
    with pytest.raises(ModelError, match=r"times: got 1000.5; allowed \[0, 1000\]"):
        transformer.predict(np.zeros((1, 4, 8, 8), np.float32), 1000.5, condition)
    if flow_run.name == FLUX:
        rows = np.zeros((1, 16, 16), np.float32)
        with pytest.raises(ModelError, match=r"got shape .*; allowed \(B, 8, 16\), the rows that latents of 4x8"):
            transformer(rows, timestep=0.5, img_ids=places(4, 8), **condition)
    with pytest.raises(ModelError, match=r"conditions: got .*; allowed encoder_hidden_states"):
        transformer(rows if flow_run.name == FLUX else np.zeros((1, 4, 8, 8), np.float32), timestep=0.5)


def test_a_table_of_continuous_time_finds_the_nearest_that_it_knows() -> None:
    class Wave(torch.nn.Module):
        def forward(self, t: Tensor) -> Tensor:
            return torch.sin(t.float()[:, None] * torch.tensor([1.0, 0.01]))

    schedule = noise_schedule({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0})
    visited = [t for t, _ in schedule.walk(7)]
    table = TimestepTable(Wave(), known_times(schedule, visited))
    exact = torch.tensor([0.0, 0.0625, *visited, 1000.0])
    torch.testing.assert_close(table(exact), Wave()(exact), rtol=0, atol=0)
    other = torch.rand(200, generator=torch.Generator().manual_seed(0)) * 1000
    assert 0 < (table(other) - Wave()(other)).abs().max() <= 1 / 32
    assert GUIDANCES[70] == 3.5


def test_the_runtimes_packing_is_that_of_training() -> None:
    x = torch.randn(2, 4, 8, 6)
    np.testing.assert_array_equal(packed(x.numpy()), packed(x).numpy())
    np.testing.assert_array_equal(unpacked(packed(x.numpy()), 8, 6), unpacked(packed(x), 8, 6).numpy())
    np.testing.assert_array_equal(unpacked(packed(x.numpy()), 8, 6), x.numpy())


def test_a_sampler_that_is_not_the_models_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    saved("sd3", tmp_path / "sd3")
    own = [f"model.source={tmp_path / 'sd3'}", "sampler.name=ddim"]
    with pytest.raises(
        ModelError, match=r"sampler\.name: got 'ddim'; .*sd3 predicts the velocities of flow matching; allowed euler"
    ):
        prepare(load_policy(POLICIES / "w8a8-sd3.yaml", own))
    with pytest.raises(
        ModelError, match=r"sampler\.name: got 'euler'; embedded:fashion-mnist predicts .*; allowed ddim"
    ):
        prepare(load_policy(POLICIES / "w8a8.yaml", ["sampler.name=euler"]))


def arrays(condition: dict[str, Tensor]) -> dict[str, Any]:
    return {name: value.numpy() for name, value in condition.items()}


def decibels(found: Tensor, wanted: Tensor) -> float:
    """Power of what is wanted over that of the error."""
    error = float((found.double() - wanted.double()).square().mean())
    return math.inf if error == 0 else 10 * math.log10(float(wanted.double().square().mean()) / error)
