"""The stage `float-steps`, and what a run with float steps leaves: a measured number, rows that say it, a folder whose
runtime computes these steps in full precision, and a student that does so too.

Not here: which network computes a step (sampling/test_precision_by_time.py).
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from tiny_runs import POLICIES, QUIET, SCHEDULER, saved_tiny_unet, tiny_overrides, without_images, without_trials

from pqcad_qat.commands.benchmark import measure_here
from pqcad_qat.commands.benchmark_subject import Candidates, open_subject
from pqcad_qat.commands.run import run
from pqcad_qat.errors import ModelError, PolicyError
from pqcad_qat.models.denoiser import predict
from pqcad_qat.models.model_loading import load_model
from pqcad_qat.policy.loading import load_policy
from pqcad_qat.policy.schema import Policy
from pqcad_qat.policy.variants import FP32, NNCF_INT8, PQ, PQ_HALF, PQCAD, PQCAD_OPENVINO, PTQ, VARIANTS
from pqcad_qat.sampling.ddim import split_prediction
from pqcad_qat.sampling.trajectory import initial_noise, landing, noise_schedule, trajectory
from pqcad_qat.serving.deployed_folder import copy_folder
from pqcad_qat.serving.manifest import FLOAT_GRAPH, FLOAT_WEIGHTS
from pqcad_qat.serving.runtime import OVUNet2DModel
from pqcad_qat.stages.float_steps import WORTH, measured, parts_measured, wanted
from pqcad_qat.stages.run_folder import RunFolder
from pqcad_qat.stages.samplers import open_folder, sample_images
from pqcad_qat.stages.stage_records import FloatStepsRecord
from pqcad_qat.timing.hardware import NATIVE

EPSILON = {**SCHEDULER, "prediction_type": "epsilon", "clip_sample": True, "clip_sample_range": 1.0}
MADE = (PTQ, PQ, PQ_HALF, PQCAD, PQCAD_OPENVINO, NNCF_INT8)


@dataclass(frozen=True)
class Ended:
    path: Path
    policy: Policy

    @property
    def rows(self) -> dict[str, Any]:
        report = json.loads((self.path / "report.json").read_text())
        return {row["name"]: row for row in report["variants"]}


@pytest.fixture(scope="module")
def epsilon_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that predicts epsilon, on a schedule that begins with hardly any signal."""
    return saved_tiny_unet(tmp_path_factory.mktemp("epsilon") / "model", EPSILON)


@pytest.fixture(scope="module")
def ended(epsilon_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """A run whose policy leaves the number of float steps to the measurement; it is not looked at what NNCF's graph
    computes in its other steps.
    """
    few = (*QUIET, "progressive.steps=2", "distillation.steps=2", "evaluation.images=4", "evaluation.features=none")
    overrides = tiny_overrides(epsilon_folder, *few, f"evaluation.variants=[{', '.join(MADE)}]")
    policy = load_policy(POLICIES / "smoke.yaml", overrides)
    path = tmp_path_factory.mktemp("runs") / "epsilon"
    with without_trials():
        run(policy, path, "command", Console(quiet=True))
    return Ended(path, policy)


# ---- how many --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("psnrs", "count"),
    [
        ([23.2, 38.6, 38.7, 38.9], 1),
        ([20.0, 20.0 + WORTH, 20.0 + 2 * WORTH, 20.1 + 2 * WORTH], 2),
        ([20.0, 20.1, 20.0 + 2 * WORTH], 2),  # two help together where one does not
        ([30.0, 30.5, 30.9], 0),
        ([41.0, 90.0], 0),  # an eye sees no difference
        ([float("inf")], 0),
        ([], 0),
    ],
)
def test_a_step_in_float_has_to_be_worth_its_time(psnrs: list[float], count: int) -> None:
    assert wanted(psnrs) == count


def test_a_step_in_four_parts_has_to_be_worth_three_calls() -> None:
    psnrs = [20.0, 20.0 + 2.5 * WORTH, 20.0 + 6 * WORTH]
    assert [wanted(psnrs[:2], calls=3), wanted(psnrs[:2], calls=2), wanted(psnrs, calls=3)] == [0, 1, 2]


def test_a_model_of_epsilon_without_signal_gets_float_steps_by_measurement(ended: Ended) -> None:
    record = RunFolder(ended.path).read("float-steps", FloatStepsRecord)
    assert record is not None
    assert record.count >= 1
    measured = [trial.psnr for trial in record.trials if trial.steps == ended.policy.sampler.steps]
    assert measured[1] > measured[0] + WORTH


def test_students_steps_are_taken_in_parts_where_that_brings_images_nearer_to_those_of_all_steps(ended: Ended) -> None:
    record = RunFolder(ended.path).read("float-steps", FloatStepsRecord)
    assert record is not None
    psnrs = [trial.psnr for trial in record.parts_trials]
    factor = ended.policy.sampler.steps // ended.policy.distillation.student_steps
    assert len(psnrs) == 1 + -(-record.count // factor)
    assert len(record.stops) == wanted(psnrs, factor - 1) > 0
    assert psnrs[len(record.stops)] > psnrs[0] + WORTH
    schedule = noise_schedule(load_model(ended.policy.model.source).scheduler_config)
    visited = [t for t, _ in schedule.walk(ended.policy.sampler.steps)]
    assert list(record.stops[0]) == visited[: factor + 1]


def test_a_guided_run_takes_no_step_in_parts(tiny_folder: Path) -> None:
    schedule = noise_schedule(EPSILON)
    students = load_policy(POLICIES / "smoke.yaml", tiny_overrides(tiny_folder, f"evaluation.variants=[{PQCAD}]"))
    assert parts_measured(students, schedule)
    for override in ("sampler.guidance_scale=2", f"evaluation.variants=[{PQ}]", "sampler.float_steps=0"):
        overrides = tiny_overrides(tiny_folder, f"evaluation.variants=[{PQCAD}]", override)
        assert not parts_measured(load_policy(POLICIES / "smoke.yaml", overrides), schedule)


def test_a_student_that_learns_guidance_has_no_float_steps(tiny_folder: Path) -> None:
    keeps, learns = ["sampler.guidance_scale=2"], ["sampler.guidance_scale=2", "distillation.guidance=distill"]
    for overrides, asked in ((keeps, True), (learns, False)):
        policy = load_policy(POLICIES / "smoke.yaml", tiny_overrides(tiny_folder, *overrides))
        assert measured(policy, noise_schedule(EPSILON)) is asked
    with pytest.raises(PolicyError, match=r"float_steps.*got 1; allowed auto or 0, as full precision has not learned"):
        load_policy(POLICIES / "smoke.yaml", tiny_overrides(tiny_folder, *learns, "sampler.float_steps=1"))


def test_a_policys_own_number_is_taken_and_a_model_of_v_needs_none(ended: Ended, tiny_folder: Path) -> None:
    for source, number, count in ((tiny_folder, "auto", 0), (tiny_folder, "2", 2)):
        overrides = tiny_overrides(
            source, f"sampler.float_steps={number}", f"evaluation.variants=[{PTQ}]", "evaluation.images=4"
        )
        path = ended.path.parent / f"number-{number}"
        with without_images():
            run(load_policy(POLICIES / "smoke.yaml", overrides), path, "command", Console(quiet=True))
        record = RunFolder(path).read("float-steps", FloatStepsRecord)
        assert record is not None
        assert (record.count, record.trials) == (count, ())


# ---- what is reported ------------------------------------------------------------------------------------------------


def test_rows_count_the_float_steps_of_quantized_variants_alone(ended: Ended) -> None:
    record = RunFolder(ended.path).read("float-steps", FloatStepsRecord)
    assert record is not None
    factor = ended.policy.sampler.steps // ended.policy.distillation.student_steps
    more = (factor - 1) * len(record.stops)  # a step in parts is as many calls as its teacher takes
    assert more > 0
    for name, row in ended.rows.items():
        spec = VARIANTS[name]
        count = -(-record.count // factor) if spec.student_steps else record.count
        assert row["float_steps"] == (count if spec.quantized else 0), name
        assert row["float_calls"] == row["float_steps"] + more * (spec.student_steps and spec.quantized), name
        assert row["steps"] == ended.policy.sampling_steps(name), name
    assert "in full precision" in (ended.path / "report.html").read_text()


def test_an_image_takes_the_time_of_both_kinds_of_step(ended: Ended) -> None:
    record = json.loads((ended.path / "stages" / "benchmark.json").read_text())
    for name in (PQCAD_OPENVINO, NNCF_INT8):  # few steps in INT8, and several
        row = ended.rows[name]
        in_int8 = row["steps"] - row["float_steps"]
        whole = in_int8 * row["latency_ms_per_step"] + row["float_calls"] * record["float_step"]["median_ms"]
        assert row["latency_ms_per_image"] == pytest.approx(whole), name
    assert in_int8 > 1


@pytest.mark.long
def test_a_benchmark_of_the_folder_counts_its_float_steps_and_times_their_graph(ended: Ended, tmp_path: Path) -> None:
    row = ended.rows[PQCAD_OPENVINO]
    subject = open_subject(str(ended.path), Path("unread"), tmp_path)
    assert (subject.float_steps, subject.float_calls) == (row["float_steps"], row["float_calls"])
    timed = Candidates(subject.config, {PQCAD_OPENVINO: subject.folder}, subject.sample_shape, batch=2)
    found = {measured.name: measured for measured in measure_here(timed, NATIVE, 2, throughput=True).rows}
    for name in (FP32, PQCAD_OPENVINO):
        in_float = found[name].float_latency, found[name].float_throughput
        assert [time is not None for time in in_float] == [name == PQCAD_OPENVINO] * 2


# ---- what is deployed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["int8", "packed"])
def test_the_runtime_computes_these_steps_in_full_precision(ended: Ended, weights: Any, tmp_path: Path) -> None:
    deployed = _deployed(ended, tmp_path / "folder", weights, float_stops=[])
    full = load_model(ended.policy.model.source).denoiser.eval()
    times = [t for t, _ in noise_schedule(deployed.scheduler_config).walk(ended.policy.distillation.student_steps)]
    x = initial_noise(3, 0, len(times), deployed.sample_shape)
    with torch.no_grad():
        wanted_values = predict(full, torch.from_numpy(x), torch.tensor(times)).numpy()
    found = deployed.predict(x, np.array(times))  # times of both kinds in one call
    off = np.abs(found - wanted_values).max(axis=(1, 2, 3)) / np.abs(wanted_values).max()
    in_float = np.array(times) >= deployed.in_float.start
    assert in_float.any()
    assert not in_float.all()
    assert off[in_float].max() < 1e-3
    assert off[~in_float].min() > 1e-3
    one_by_one = np.concatenate([deployed.predict(x[[k]], times[k]) for k in range(len(times))])
    np.testing.assert_array_equal(found, one_by_one)


def test_the_runtime_lands_where_the_parts_of_a_step_land(ended: Ended, tmp_path: Path) -> None:
    deployed = OVUNet2DModel.from_pretrained(ended.path / "openvino", properties=F32)
    full = _deployed(ended, tmp_path / "folder", float_start=0, float_stops=[])  # one that never computes in INT8
    schedule = noise_schedule(deployed.scheduler_config)
    first = schedule.walk(ended.policy.distillation.student_steps)[0]
    parts = deployed.in_float.parts[first[0]]
    x = initial_noise(3, 0, 2, deployed.sample_shape)
    landed = schedule.step(deployed.predict(x, first[0]), x, *first)
    expected = landing(parts, full.predict, x, schedule)
    inverse = schedule.inverse(x, expected, *first)
    x_0, _ = split_prediction(inverse, x, schedule.alpha_bar_at(first[0]), "epsilon")
    within = np.abs(x_0) < 0.95  # an untrained net asks for more elsewhere, which the sampler clips
    assert within.mean() > 0.5
    # where there is hardly any signal, rounding a prediction to float32 moves x_0 by a thousandth
    np.testing.assert_allclose(landed[within], expected[within], atol=1e-2)
    in_one = schedule.step(full.predict(x, first[0]), x, *first)
    assert np.abs(in_one - expected)[within].max() > 0.1
    for damaged in ([[1000, 999, 900]], [[999, 998, 997]]):
        with pytest.raises(ModelError, match=r"float_stops: got \[\d+, \d+, \d+\]; allowed parts of the steps 999 to"):
            _deployed(ended, tmp_path / "other", float_stops=damaged)


F32 = {"INFERENCE_PRECISION_HINT": "f32"}


def _deployed(ended: Ended, folder: Path, weights: Any = None, **changes: Any) -> OVUNet2DModel:
    """The run's deployed folder, with these keys of its manifest changed."""
    copy_folder(ended.path / "openvino", folder, weights)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, **changes}))
    return OVUNet2DModel.from_pretrained(folder, properties=F32)


def test_a_folder_without_its_float_graph_is_refused(ended: Ended, tmp_path: Path) -> None:
    copy_folder(ended.path / "openvino", tmp_path / "folder")
    (tmp_path / "folder" / "unet" / FLOAT_WEIGHTS).unlink()
    with pytest.raises(ModelError, match=FLOAT_WEIGHTS):
        OVUNet2DModel.from_pretrained(tmp_path / "folder")
    manifest = json.loads((tmp_path / "folder" / "manifest.json").read_text())
    for name in (FLOAT_WEIGHTS, FLOAT_GRAPH):
        del manifest["files"][f"unet/{name}"]
    (tmp_path / "folder" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ModelError, match=r"files: got no unet/float_steps\.xml"):
        OVUNet2DModel.from_pretrained(tmp_path / "folder")


def test_the_students_folder_samples_what_the_run_sampled(ended: Ended) -> None:
    from safetensors.torch import load_file

    student = open_folder(str(ended.path / "student"))
    again = sample_images(student, 4, ended.policy.evaluation.seed, 4)
    images = load_file(ended.path / "samples" / f"{PQCAD}.safetensors")["images"]
    assert (again.int() - images.int()).abs().max() <= 1
    full = load_file(ended.path / "samples" / f"{FP32}.safetensors")["images"]
    assert not torch.equal(again, full)


def test_another_number_of_steps_or_guidance_takes_float_steps_whole(ended: Ended) -> None:
    own = ended.policy.distillation.student_steps
    for folder in ("openvino", "student"):
        ours, others = (open_folder(str(ended.path / folder), steps) for steps in (own, 2 * own))
        x = initial_noise(0, 0, 1, ours.sample_shape)
        first, shorter = (variant.schedule.walk(variant.steps)[0] for variant in (ours, others))
        assert first[0] == shorter[0]
        in_parts, whole = (variant.predict(x, first[0], {}) for variant in (ours, others))
        assert np.abs(in_parts - whole).max() > 1e-3
        full = open_folder(ended.policy.model.source)
        assert np.abs(whole - full.predict(x, first[0], {})).max() < 1e-2


def test_a_students_folder_with_damaged_stops_is_refused(ended: Ended, tmp_path: Path) -> None:
    shutil.copytree(ended.path / "student", tmp_path / "student")
    plan = tmp_path / "student" / "quantization" / "plan.json"
    content = json.loads(plan.read_text())
    plan.write_text(json.dumps({**content, "float_stops": [[999]]}))
    with pytest.raises(ModelError, match=r"plan\.json: float_stops: got \[\[999\]\]; allowed lists of three or more"):
        open_folder(str(tmp_path / "student"))
    plan.write_text(json.dumps({key: value for key, value in content.items() if key != "float_stops"}))
    assert open_folder(str(tmp_path / "student")).steps == ended.policy.distillation.student_steps


def test_diffusers_loop_gets_full_precision_for_these_steps(ended: Ended) -> None:
    """A loop that knows nothing of float steps calls the folder's model at every time."""
    deployed = OVUNet2DModel.from_pretrained(ended.path / "openvino")
    schedule, steps = noise_schedule(deployed.scheduler_config), ended.policy.distillation.student_steps
    noise = initial_noise(1, 0, 1, deployed.sample_shape)
    x = noise
    for step in trajectory(lambda state, t: deployed(state, t).sample, noise, schedule, steps):
        x = np.asarray(step.x_s, np.float32)
    assert np.isfinite(x).all()
