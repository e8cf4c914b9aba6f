"""A real run from policy to report: what it leaves, what it proves, and what others can do with the folder it ships.

Not here: runs that are cut short (test_kills.py), the report's looks (test_report_files.py).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import REPOSITORY, SCHEDULER, FinishedRun, without_images, without_page
from torch import nn

from pqcad_qat.commands.run import run
from pqcad_qat.data.calibration import read_calibration
from pqcad_qat.errors import ExportError
from pqcad_qat.export.execution import INT8, ExecutionReport, refuse_float
from pqcad_qat.machine.content_store import LOCKS
from pqcad_qat.models.denoiser import DiffusionModel, predict
from pqcad_qat.policy.loading import load_policy
from pqcad_qat.policy.schema import Policy
from pqcad_qat.policy.variants import (
    FIXED_BIT,
    FLOAT_STEPS,
    FP32,
    FP32_HALF,
    NNCF_INT8,
    OV_BF16,
    OV_FP32,
    PQ,
    PQ_DISTILLED,
    PQ_HALF,
    PQCAD,
    PQCAD_OPENVINO,
    PTQ,
    STEP_COSTS,
    default_variants,
    exporting,
)
from pqcad_qat.quality.feature_network import load_features
from pqcad_qat.quality.fidelity import evaluate_images
from pqcad_qat.quantization.conversion import frozen_weights, quantize_model, quantized_layers
from pqcad_qat.quantization.layer_state import blend_state, read_bits
from pqcad_qat.quantization.plan_facts import float_layers
from pqcad_qat.quantization.student_folder import load_quantized
from pqcad_qat.report.sample_sheets import sheet_size
from pqcad_qat.sampling.schedulers import DDIM_KEYS
from pqcad_qat.sampling.trajectory import initial_noise
from pqcad_qat.serving.runtime import OVUNet2DModel
from pqcad_qat.stages.prepared import prepare
from pqcad_qat.stages.samplers import openvino_variant, sample_images
from pqcad_qat.training.callback import TrainState
from pqcad_qat.training.training_stage import StageSettings, train_stage

LEFT = (  # DESIGN section 4
    "policy.yaml",
    "plan.json",
    "calibration/trajectories.safetensors",
    "models/pq.safetensors",
    "logs",
    "student/model_index.json",
    "student/unet/config.json",
    "student/unet/diffusion_pytorch_model.safetensors",
    "student/scheduler/scheduler_config.json",
    "openvino/model_index.json",
    "openvino/unet/openvino_model.xml",
    "openvino/unet/openvino_model.bin",
    "openvino/unet/config.json",
    "openvino/scheduler/scheduler_config.json",
    "openvino/manifest.json",
    "samples.png",
    "report.json",
    "report.html",
)
KEYS = {
    "schema_version",
    "policy",
    "seed",
    "hardware",
    "variants",
    "fid_protocol",
    "bit_schedule",
    "parity",
    "execution",
    "timings_s",
}
BLOCKED = (
    "torch",
    "torchvision",
    "brevitas",
    "nncf",
    "diffusers",
    "accelerate",
    "transformers",
    "safetensors",
    "pydantic",
    "rich",
    "fire",
)


@pytest.fixture(scope="module")
def report(tiny_run: FinishedRun) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((tiny_run.path / "report.json").read_text())
    return found


@pytest.fixture(scope="module")
def rows(report: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in report["variants"]}


@pytest.fixture(scope="module")
def plan(tiny_run: FinishedRun) -> dict[str, dict[str, Any]]:
    """plan.json's layers by name."""
    content = json.loads((tiny_run.path / "plan.json").read_text())
    return {layer["name"]: layer for layer in content["layers"]}


# ---- what a run leaves
# -----------------------------------------------------------------------------------------------------------


def test_everything_that_a_run_promises_is_there(tiny_run: FinishedRun) -> None:
    assert [path for path in LEFT if not (tiny_run.path / path).exists()] == []
    assert tiny_run.page == tiny_run.path / "report.html"
    trained = {PTQ, FIXED_BIT, PQ, PQ_DISTILLED, PQCAD}
    assert {path.stem for path in (tiny_run.path / "models").glob("*.safetensors")} == trained
    assert not (tiny_run.path / "checkpoints").exists()


def test_nothing_half_written_is_left(tiny_run: FinishedRun) -> None:
    hidden = [path.name for path in tiny_run.path.rglob(".*") if path.name != ".lock"]
    assert hidden == []


def test_the_policy_is_kept_as_resolved(tiny_run: FinishedRun) -> None:
    assert load_policy(tiny_run.path / "policy.yaml") == tiny_run.policy


def test_the_calibration_link_holds_when_all_runs_move(tiny_run: FinishedRun) -> None:
    link = tiny_run.path / "calibration"
    assert link.is_symlink()
    assert not Path(os.readlink(link)).is_absolute()
    found = read_calibration(link)
    assert found.states.shape == (4, 5, 1, 32, 32)


def logged(run: FinishedRun, stage: str = "") -> EventAccumulator:
    """What TensorBoard has of a stage, or of the run as a whole."""
    events = EventAccumulator(str(run.path / "logs" / stage))
    events.Reload()
    return events


def test_training_is_in_tensorboard_with_every_quantity_of_the_schedule(tiny_run: FinishedRun) -> None:
    tags = {stage: set(logged(tiny_run, stage).Tags()["scalars"]) for stage in (PQ, FIXED_BIT, PQ_DISTILLED, PQCAD)}
    assert all({"loss", "held_out", "mean_bits"} <= found for found in tags.values())
    assert {"weight_change", "more/pace"} <= tags[PQ]
    assert {"loss/teacher", "loss/calibration"} <= tags[PQCAD]
    progressive, student = logged(tiny_run, PQ), logged(tiny_run, PQCAD)
    for layer in json.loads((tiny_run.path / "plan.json").read_text())["layers"]:
        of_layer = f"more/layer/{layer['name']}"
        watched = {f"{of_layer}/{what}" for what in ("bits", "weight_range", "input_range")}
        assert watched <= tags[PQCAD]
        assert watched | {f"{of_layer}/perturbation"} <= tags[PQ]
        ends = progressive.Scalars(f"{of_layer}/bits")
        assert layer["weights"]["bits"] < ends[0].value <= 8  # the first step moves a little already
        assert student.Scalars(f"{of_layer}/bits")[-1].value == layer["weights"]["bits"]
        assert all(event.value > 0 for event in student.Scalars(f"{of_layer}/weight_range"))
    assert len(progressive.Scalars("loss")) == tiny_run.policy.progressive.steps


def test_tensorboard_shows_samples_of_the_same_noise_through_training_the_policy_and_the_plan(
    tiny_run: FinishedRun,
) -> None:
    """At every fourth step, and at the last."""
    for stage, steps in ((PQ, [4, 8, 9]), (FIXED_BIT, [4, 8, 9]), (PQ_DISTILLED, [4, 6]), (PQCAD, [4, 6])):
        grids = logged(tiny_run, stage).Images("samples")
        assert [grid.step for grid in grids] == steps
        assert all(grid.width >= 4 * 32 for grid in grids)  # four images of 32 pixels in a row
    texts = {
        tag: logged(tiny_run).Tensors(tag)[0].tensor_proto.string_val[0].decode()
        for tag in ("policy/text_summary", "plan/text_summary")
    }
    assert "learning_rate: 1.0e-05" in texts["policy/text_summary"]
    assert "down_blocks.0.resnets.0.conv1" in texts["plan/text_summary"]


def test_samples_are_one_picture_with_a_row_a_variant(tiny_run: FinishedRun) -> None:
    with Image.open(tiny_run.path / "samples.png") as picture:
        assert picture.width > 8 * 64
        assert picture.height > 8 * 64


# ---- the report
# ------------------------------------------------------------------------------------------------------------------


def test_the_report_has_the_keys_that_other_programs_read(report: Mapping[str, Any]) -> None:
    assert set(report) >= KEYS
    assert report["schema_version"] == 2
    assert report["policy"]["name"] == "tiny"
    assert set(report["hardware"]) >= {"cpu", "isa", "cores", "versions"}
    assert set(report["fid_protocol"]) == {
        "images",
        "features",
        "features_sha256",
        "reference",
        "sampler",
        "steps",
        "seed",
        "reference_kind",
        "floor",
    }
    transition = {"step", "layer", "from", "to", "perturbation", "cause", "began"}
    assert set(report["bit_schedule"][0]) == transition
    assert set(report["parity"]) == {"layers_checked", "layers_exact", "worst_layer", "worst_error", "end_to_end_psnr"}
    told = {"planned", "executed_int8", "float_layers", "needs_vnni", "attention", "any_size_int8"}
    assert set(report["execution"]) == told
    stages = {
        "calibration",
        FLOAT_STEPS,
        STEP_COSTS,
        PTQ,
        PQ,
        FIXED_BIT,
        "teacher",
        PQ_DISTILLED,
        PQCAD,
        exporting(PQCAD),
        "baselines",
        "benchmark",
        "evaluation",
    }
    assert set(report["timings_s"]) >= stages


def test_every_variant_is_a_row_in_the_order_of_the_tables(rows: Mapping[str, Any], report: Mapping[str, Any]) -> None:
    absent = set() if report["hardware"]["native_bf16"] else {OV_BF16}
    expected = [name for name in default_variants((PQCAD,)) if name not in absent]
    assert list(rows) == expected
    keys = {
        "name",
        "runtime",
        "weight_bits",
        "activation_bits",
        "steps",
        "size_bytes",
        "latency_ms_per_step",
        "latency_ms_per_image",
        "float_steps",
        "float_calls",
        "passes",
        "did_not_run",
        "kid_real",
        "kid_real_error",
        "precision",
        "recall",
        "clip_score",
        "clip_score_error",
    }
    assert all(set(row) == keys | {"fid_real", "fid_fp", "psnr_fp", "ssim_fp"} for row in rows.values())


def test_every_planned_layer_executed_in_int8_and_gave_pytorchs_integers(
    tiny_run: FinishedRun, report: Mapping[str, Any], plan: Mapping[str, Any]
) -> None:
    prepared = prepare(tiny_run.policy)
    left = float_layers(prepared.split, prepared.plan)
    attention = report["execution"].pop("attention")
    assert len(attention) == 1
    assert set(attention.values()) <= set(INT8)
    assert report["execution"] == {
        "planned": len(plan),
        "executed_int8": len(plan),
        "float_layers": list(left),
        "needs_vnni": [],
        "any_size_int8": None,
    }
    assert report["parity"]["layers_checked"] == report["parity"]["layers_exact"] == len(plan)
    assert report["parity"]["worst_error"] == 0
    assert report["parity"]["end_to_end_psnr"] > 30


def test_the_bit_schedule_takes_every_layer_down_to_its_target(
    report: Mapping[str, Any], plan: Mapping[str, Any]
) -> None:
    width = {name: layer["ladder"][0] for name, layer in plan.items()}
    for move in report["bit_schedule"]:
        assert width[move["layer"]] == move["from"] > move["to"]
        width[move["layer"]] = move["to"]
    assert width == {name: layer["weights"]["bits"] for name, layer in plan.items()}


def test_distilled_variants_take_half_the_steps(rows: Mapping[str, Any]) -> None:
    halved = {FP32_HALF, PQ_HALF, PQ_DISTILLED, PQCAD, PQCAD_OPENVINO}
    assert {name: row["steps"] for name, row in rows.items()} == {name: 2 if name in halved else 4 for name in rows}


def test_an_image_costs_its_steps(rows: Mapping[str, Any]) -> None:
    timed = [row for row in rows.values() if row["latency_ms_per_step"] is not None]
    assert {row["name"] for row in timed} >= {FP32, FP32_HALF, OV_FP32, NNCF_INT8, PQCAD_OPENVINO}
    for row in timed:
        assert row["latency_ms_per_image"] == pytest.approx(row["steps"] * row["latency_ms_per_step"])


def test_sizes_are_those_of_the_files(
    rows: Mapping[str, Any], tiny_run: FinishedRun, tiny_model: DiffusionModel
) -> None:
    shipped = sum(path.stat().st_size for path in (tiny_run.path / "openvino").rglob("*") if path.is_file())
    assert rows[PQCAD_OPENVINO]["size_bytes"] == shipped
    assert rows[FP32]["size_bytes"] == 4 * sum(parameter.numel() for parameter in tiny_model.denoiser.parameters())


def test_quality_figures_are_those_of_the_kept_images(rows: Mapping[str, Any], tiny_run: FinishedRun) -> None:
    features = load_features("embedded:fashion-mnist")
    images = {name: load_file(tiny_run.path / "samples" / f"{name}.safetensors")["images"] for name in (FP32, PQCAD)}
    assert images[PQCAD].shape == (8, 1, 32, 32)
    again = evaluate_images(images[PQCAD], images[FP32], features)
    row = rows[PQCAD]
    assert row["fid_real"] == pytest.approx(again.fid_real, rel=1e-6)
    assert (row["psnr_fp"], row["ssim_fp"]) == (
        pytest.approx(again.psnr_fp, rel=1e-5),
        pytest.approx(again.ssim_fp, rel=1e-5),
    )


def test_the_page_needs_no_other_file_and_no_network(tiny_run: FinishedRun) -> None:
    page = tiny_run.page.read_text(encoding="utf-8")
    sources = re.findall(r"""(?:src|href|data|poster)\s*=\s*["']([^"']*)""", page) + re.findall(r"url\(([^)]*)\)", page)
    assert [source[:60] for source in sources if not source.startswith(("data:", "#"))] == []
    assert "@import" not in page
    for name in (PQCAD_OPENVINO, FIXED_BIT, NNCF_INT8, "tiny"):
        assert name in page


def test_the_report_says_how_to_make_it_again(report: Mapping[str, Any], tiny_run: FinishedRun) -> None:
    assert report["reproduction"]["command"] == "python -m pqcad_qat run tiny.yaml"
    assert report["policy"] == tiny_run.policy.model_dump(mode="json")


def quiet(policy: Policy) -> Policy:
    """The policy without checkpoints and samples on the way, for runs of which only the end is looked at."""
    training = policy.training.model_copy(update={"checkpoint_every": 1000, "samples_every": 0})
    return policy.model_copy(update={"training": training})


@pytest.mark.parametrize(
    ("schedule", "steps"),
    [("momentum", 5), *(pytest.param(*case, marks=pytest.mark.long) for case in (("fixed", 5), ("momentum", 1)))],
)
def test_a_deadline_at_the_very_end_still_ends_at_the_targets(tiny_run: FinishedRun, schedule: str, steps: int) -> None:
    policy = tiny_run.policy
    progressive = policy.progressive.model_copy(update={"deadline": 1.0, "schedule": schedule, "steps": steps})
    evaluation = policy.evaluation.model_copy(update={"variants": (PQ,), "images": 2, "features": "none"})
    late = quiet(policy.model_copy(update={"progressive": progressive, "evaluation": evaluation}))
    beside = tiny_run.path.with_name(f"late-{schedule}-{steps}")  # it finds the calibration set
    with without_images():
        path = run(late, beside, "command", Console(quiet=True)).parent
    prepared = prepare(late)
    model = quantize_model(prepared.split, prepared.plan)
    model.load_state_dict(load_file(path / "models" / "pq.safetensors"))
    layers = quantized_layers(model).values()
    assert all(blend_state(layer) is None and read_bits(layer)[0] == layer.plan.weights.bits for layer in layers)


# ---- runs of few variants
# --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def partial_run(tiny_run: FinishedRun) -> Path:
    """Beside the whole run, with the same policy but for the variants."""
    asked = tiny_run.policy.evaluation.model_copy(update={"variants": (FP32_HALF, PTQ, FIXED_BIT)})
    policy = tiny_run.policy.model_copy(update={"evaluation": asked})
    return run(policy, tiny_run.path.with_name("partial"), "command", Console(quiet=True)).parent


def test_a_run_of_few_variants_makes_their_rows_and_trains_nothing_else(
    partial_run: Path, rows: Mapping[str, Any]
) -> None:
    report = json.loads((partial_run / "report.json").read_text())
    found = {row["name"]: row for row in report["variants"]}
    assert list(found) == [FP32, FP32_HALF, PTQ, FIXED_BIT]
    assert {path.stem for path in (partial_run / "models").glob("*.safetensors")} == {PTQ, FIXED_BIT}
    assert not (partial_run / "openvino").exists()
    assert {name: found[name]["fid_real"] for name in (FP32, FIXED_BIT)} == {
        name: rows[name]["fid_real"] for name in (FP32, FIXED_BIT)
    }
    assert found[PTQ]["steps"] == 4
    assert 0 < found[PTQ]["psnr_fp"] < 60


def test_a_report_of_few_variants_lacks_what_was_not_made(partial_run: Path) -> None:
    report = json.loads((partial_run / "report.json").read_text())
    assert (report["targets"], report["bit_schedule"], report["latency"], report["parity"], report["execution"]) == (
        [],
        [],
        {},
        None,
        None,
    )
    assert {series["stage"] for series in report["curves"]["losses"]} == {FIXED_BIT}
    page = (partial_run / "report.html").read_text()
    assert "does not hold" not in page
    assert 'id="costs"' not in page
    with Image.open(partial_run / "samples.png") as picture:
        assert picture.height == sheet_size(4, 8, 32, 32)[1]


def test_runs_side_by_side_share_the_images_of_full_precision(tiny_run: FinishedRun, partial_run: Path) -> None:
    shared = tiny_run.path.parent / ".shared"
    images = (tiny_run.path / "samples" / f"{FP32}.safetensors").read_bytes()
    files = [file for folder in shared.iterdir() if (file := folder / f"{FP32}.safetensors").exists()]
    assert sum(file.read_bytes() == images for file in files) == 1  # runs of fewer images have files of their own
    assert [folder.name for folder in shared.iterdir() if folder.name.startswith(".")] == [LOCKS]
    for name in (FP32, FP32_HALF):
        one, other = (
            load_file(path / "samples" / f"{name}.safetensors")["images"] for path in (tiny_run.path, partial_run)
        )
        assert torch.equal(one, other)


@pytest.mark.long
def test_runs_of_a_study_train_what_they_have_in_common_once(
    tiny_run: FinishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[str] = []

    def counted(model: nn.Module, callbacks: Any, batches: Any, settings: StageSettings, **rest: Any) -> TrainState:
        trained.append(settings.name)
        return train_stage(model, callbacks, batches, settings, **rest)

    monkeypatch.setattr("pqcad_qat.stages.training_task.train_stage", counted)
    few = {"variants": (FIXED_BIT, PQ), "images": 2, "features": "none"}
    whole = quiet(tiny_run.policy)
    blends = whole.model_copy(update={"evaluation": whole.evaluation.model_copy(update=few)})
    jumps = blends.model_copy(update={"progressive": blends.progressive.model_copy(update={"transition": "jump"})})
    for name, policy in (("blends", blends), ("jumps", jumps)):
        with without_page():
            run(policy, tmp_path / name, "sweep", Console(quiet=True), shares_training=True)
    assert sorted(trained) == [FIXED_BIT, PQ, PQ]
    one, other = (tmp_path / name for name in ("blends", "jumps"))
    for file in (f"models/{FIXED_BIT}.safetensors", f"logs/{FIXED_BIT}.jsonl", f"samples/{FIXED_BIT}.safetensors"):
        assert (one / file).read_bytes() == (other / file).read_bytes()
    assert (one / "models/pq.safetensors").read_bytes() != (other / "models/pq.safetensors").read_bytes()


# ---- the student
# -----------------------------------------------------------------------------------------------------------------


def test_the_student_that_is_kept_is_the_one_that_was_trained(tiny_run: FinishedRun) -> None:
    model, _, steps = load_quantized(tiny_run.path / "student")
    assert steps == 2
    trained = load_file(tiny_run.path / "models" / "pqcad.safetensors")
    kept = model.denoiser.state_dict()
    assert kept.keys() == trained.keys()
    assert all(torch.equal(kept[name], value) for name, value in trained.items())


def test_the_student_loads_with_plain_diffusers_and_its_scheduler_knows_its_steps(tiny_run: FinishedRun) -> None:
    student = tiny_run.path / "student"
    assert UNet2DModel.from_pretrained(student / "unet", use_safetensors=True).config.sample_size == 32
    scheduler = DDIMScheduler.from_pretrained(student / "scheduler")
    assert (scheduler.config.num_train_timesteps, scheduler.config.num_inference_steps) == (1000, 2)
    for folder in (student, tiny_run.path / "openvino"):
        written = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
        assert written == {**DDIM_KEYS, **SCHEDULER, "num_inference_steps": 2}


def test_both_distilled_students_started_from_the_quantized_teacher_and_went_their_own_ways(
    tiny_run: FinishedRun,
) -> None:
    models = {name: load_file(tiny_run.path / "models" / f"{name}.safetensors") for name in (PQ, PQ_DISTILLED, PQCAD)}
    weight = "mid_block.resnets.0.conv1.weight"
    moved = {name: (models[name][weight] - models[PQ][weight]).abs().max() for name in (PQ_DISTILLED, PQCAD)}
    assert all(0 < distance < 0.01 for distance in moved.values())
    assert not torch.equal(models[PQCAD][weight], models[PQ_DISTILLED][weight])


# ---- what ships
# ------------------------------------------------------------------------------------------------------------------


def states() -> tuple[np.ndarray, np.ndarray]:
    """(x_t (3, 1, 32, 32), t (3,))"""
    return np.random.default_rng(0).standard_normal((3, 1, 32, 32), dtype=np.float32), np.array([5, 400, 999])


def in_a_process_of_its_own(script: str, tmp_path: Path, *arguments: str | Path, path: str = "") -> np.ndarray:
    """Run a script with states.npz and out.npy in its folder; returns what it saved as out.npy."""
    x, t = states()
    np.savez(tmp_path / "states.npz", x=x, t=t)
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return np.asarray(np.load(tmp_path / "out.npy"))


def test_plain_openvino_runs_the_shipped_file_and_gives_what_our_runtime_gives(
    tiny_run: FinishedRun, tmp_path: Path
) -> None:
    script = (
        "import sys, numpy as np, openvino as ov\n"
        "assert not any(name.startswith(('pqcad', 'torch')) for name in sys.modules)\ncore = ov.Core()\n"
        "request = core.compile_model(core.read_model(sys.argv[1]), 'CPU').create_infer_request()\n"
        "given = np.load('states.npz')\n"
        "run = lambda x, t: request.infer({'sample': x[None], 'timestep': np.array([t], "
        "np.int64)})['out_sample'].copy()\n"
        "np.save('out.npy', np.concatenate([run(x, t) for x, t in zip(given['x'], given['t'])]))\n"
    )
    found = in_a_process_of_its_own(script, tmp_path, tiny_run.path / "openvino" / "unet" / "openvino_model.xml")
    np.testing.assert_allclose(
        found, OVUNet2DModel.from_pretrained(tiny_run.path / "openvino").predict(*states()), atol=1e-3
    )


def test_the_runtime_samples_where_every_training_library_is_absent(tiny_run: FinishedRun, tmp_path: Path) -> None:
    script = (
        f"import sys\nsys.modules.update(dict.fromkeys({BLOCKED!r}))  # an import of any of these fails from here on\n"
        "import numpy as np\nfrom pathlib import Path\n"
        "from pqcad_qat.serving.runtime import OVUNet2DModel\n"
        "model = OVUNet2DModel.from_pretrained(Path(sys.argv[1]))\n"
        "given = np.load('states.npz')\n"
        "assert str(model.dtype) == 'float32' and str(model.device) == 'cpu'\n"
        "out = model(given['x'], given['t']).sample\n"
        "assert isinstance(out, np.ndarray) and out.dtype == np.float32\n"
        "from pqcad_qat.sampling.trajectory import noise_schedule, trajectory\n"
        "schedule = noise_schedule({'_class_name': 'DDIMScheduler', 'beta_schedule': 'squaredcos_cap_v2'})\n"
        "walk = list(trajectory(model.predict, given['x'], schedule, 2))\n"
        "assert np.isfinite(walk[-1].x_s).all()\nnp.save('out.npy', out)\n"
    )
    found = in_a_process_of_its_own(script, tmp_path, tiny_run.path / "openvino", path=str(REPOSITORY))
    np.testing.assert_allclose(
        found, OVUNet2DModel.from_pretrained(tiny_run.path / "openvino").predict(*states()), atol=1e-3
    )


def test_a_diffusers_pipeline_with_our_unet_makes_our_images(
    tiny_run: FinishedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the same states: theirs differ in their last bits after a step, and then a value may be rounded to either
    side of a boundary.
    """
    folder = tiny_run.path / "openvino"
    variant, given = openvino_variant(PQCAD_OPENVINO, folder), []

    def recorded(x: np.ndarray, *rest: Any) -> np.ndarray:
        given.append(x.copy())
        return variant.predict(x, *rest)

    ours = sample_images(replace(variant, predict=recorded), 2, 3, 2).permute(0, 2, 3, 1).numpy() / 255
    unet, states_left = OVUNet2DModel.from_pretrained(folder), iter(given)
    predict = unet.predict

    def from_ours(x: np.ndarray, *rest: Any) -> np.ndarray:
        state = next(states_left)
        np.testing.assert_allclose(x, state, atol=1e-5)
        return predict(state, *rest)

    monkeypatch.setattr(unet, "predict", from_ours)
    pipeline = DDIMPipeline(unet=unet, scheduler=DDIMScheduler.from_pretrained(folder / "scheduler"))
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.from_numpy(initial_noise(3, 0, 2, (1, 32, 32)))
    monkeypatch.setattr("diffusers.pipelines.ddim.pipeline_ddim.randn_tensor", lambda *_, **__: noise)
    theirs = pipeline(batch_size=2, num_inference_steps=2, output_type="np").images  # (B, H, W, C) in [0, 1]
    assert len(given) == 2
    assert next(states_left, None) is None
    assert np.abs(theirs - ours).max() < 1.5 / 255


def test_the_deployed_predictions_are_near_the_quantized_models(tiny_run: FinishedRun) -> None:
    model, _, _ = load_quantized(tiny_run.path / "student")
    x, t = states()
    with torch.no_grad(), frozen_weights(model.denoiser):
        wanted = predict(model.denoiser, torch.from_numpy(x), torch.from_numpy(t)).numpy()
    found = OVUNet2DModel.from_pretrained(tiny_run.path / "openvino").predict(x, t)
    assert np.square(found - wanted).mean() < 1e-2 * np.square(wanted).mean()


def test_a_layer_that_left_int8_is_an_error_that_names_it_unless_the_policy_lists_it(tiny_run: FinishedRun) -> None:
    prepared = prepare(tiny_run.policy)
    precisions = {layer.name: "i8" for layer in prepared.plan} | {"mid_block.resnets.0.conv1": "bf16"}
    shipped = tiny_run.path / "openvino"
    with pytest.raises(
        ExportError, match=r"planned for INT8: got mid_block\.resnets\.0\.conv1 in bf16; allowed .*execution: float"
    ):
        refuse_float(prepared.plan, ExecutionReport(precisions, {}, "f32", {}), shipped)
    listed = [replace(layer, int8_exception=layer.name == "mid_block.resnets.0.conv1") for layer in prepared.plan]
    refuse_float(listed, ExecutionReport(precisions, {}, "f32", {"mid_block.attentions.0": "u8"}), shipped)
    with pytest.raises(
        ExportError,
        match=r"attention planned for INT8: got mid_block\.attentions\.0 in bf16; .*quantization\.attention: float",
    ):
        refuse_float(listed, ExecutionReport(precisions, {}, "f32", {"mid_block.attentions.0": "bf16"}), shipped)


def test_preparing_leaves_the_full_precision_model_as_it_was(tiny_run: FinishedRun, tiny_model: DiffusionModel) -> None:
    prepared = prepare(tiny_run.policy)
    assert prepared.model.digest == tiny_model.digest
    assert prepared.model.denoiser.state_dict().keys() == tiny_model.denoiser.state_dict().keys()
    assert prepared.split.state_dict().keys() != tiny_model.denoiser.state_dict().keys()
    x = torch.randn(1, 1, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(
            predict(prepared.split, x, 50), predict(tiny_model.denoiser, x, 50), rtol=1e-4, atol=1e-5
        )
