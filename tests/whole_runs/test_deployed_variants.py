"""Runs that deploy something other than the student, and what `export` makes of a run afterwards: the folders compute
what the variants of the run compute, in any format, batch and size, and nothing else is trained.

Not here: which stages a policy's variants take (test_variants.py), or the folder of the student (test_run.py).
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tiny_runs import POLICIES, FinishedRun, without_page

from pqcad_qat import cli
from pqcad_qat.commands import run as pipeline
from pqcad_qat.commands.export import FolderAsked, as_asked, export
from pqcad_qat.errors import CheckpointError, ModelError, UsageError
from pqcad_qat.models.denoiser import predict
from pqcad_qat.policy.loading import load_policy
from pqcad_qat.policy.variants import (
    DEPLOYED,
    FIXED_BIT,
    FIXED_BIT_OPENVINO,
    NNCF_INT8,
    PQ,
    PQCAD,
    PTQ,
    PTQ_OPENVINO,
    TRAINED,
    exporting,
)
from pqcad_qat.quantization.conversion import frozen_weights, quantized_layers
from pqcad_qat.quantization.student_folder import POLICY, STATE, load_quantized
from pqcad_qat.report.page import render_page
from pqcad_qat.report.record import Curves
from pqcad_qat.report.report_files import read_report
from pqcad_qat.serving.deployed_folder import read_manifest
from pqcad_qat.serving.runtime import OVUNet2DModel
from pqcad_qat.stages.deploy import take_folder
from pqcad_qat.stages.recipe import Recipe
from pqcad_qat.stages.run_folder import RunFolder

QUIETLY = Console(quiet=True)


@pytest.fixture(scope="module")
def two(tiny_run: FinishedRun) -> Path:
    """A run beside the tiny one that deploys `ptq` and, as a second folder, fixed-bit training."""
    whole = tiny_run.policy
    training = whole.training.model_copy(update={"checkpoint_every": 1000, "samples_every": 0, "learning_rate": 1e-6})
    changes = {
        "deploy": (PTQ, FIXED_BIT),
        "post_training": whole.post_training.model_copy(update={"rounding": "gptq", "states": 16, "passes": 2}),
        "progressive": whole.progressive.model_copy(update={"steps": 2}),
        "sampler": whole.sampler.model_copy(update={"float_steps": 1}),
        "training": training,
    }
    path = tiny_run.path.with_name("two")
    with without_page(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("pqcad_qat.timing.latency.usable_cores", lambda: 1)
        pipeline.run(whole.model_copy(update=changes), path, "command", QUIETLY)
    return path


def rows(path: Path) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in json.loads((path / "report.json").read_text())["variants"]}


def states(shape: tuple[int, ...], count: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(5)
    return torch.randn(count, *shape), torch.tensor([499, 249] * count)[:count]  # no float step


def nearness(folder: Path, model: torch.nn.Module, shape: tuple[int, ...]) -> float:
    """PSNR in dB between what a deployed folder and a quantized model predict."""
    x, t = states(shape, 16)  # of two, one value beside a rounding boundary decides
    with torch.no_grad(), frozen_weights(model.eval()):
        theirs = predict(model, x, t).numpy()
    ours = OVUNet2DModel.from_pretrained(folder, properties={"INFERENCE_PRECISION_HINT": "f32"})
    error = np.square(ours.predict(x.numpy(), t.numpy()) - theirs).mean()
    return float(10 * np.log10(np.square(np.ptp(theirs)) / error))


@pytest.mark.long
def test_only_the_stages_of_what_is_deployed_are_done_and_the_first_is_openvino(two: Path) -> None:
    assert {file.stem for file in (two / "stages").iterdir()} & {*TRAINED, "teacher"} == {FIXED_BIT}
    assert {path.name for path in two.glob("openvino*")} == {"openvino", f"openvino-{FIXED_BIT}"}
    assert {path.name for path in two.glob("student*")} == {"student", f"student-{FIXED_BIT}"}
    found = {name: read_manifest(two / name)["provenance"] for name in ("openvino", f"openvino-{FIXED_BIT}")}
    assert [(entry["variant"], entry["sampling_steps"]) for entry in found.values()] == [(PTQ, 4), (FIXED_BIT, 4)]


@pytest.mark.long
def test_each_deployed_variant_has_a_row_with_size_time_and_quality_and_a_proof(two: Path) -> None:
    found, report = rows(two), read_report(two)
    for name in (PTQ_OPENVINO, FIXED_BIT_OPENVINO):
        row = found[name]
        assert row["steps"] == 4
        assert min(row["size_bytes"], row["latency_ms_per_step"], row["latency_ms_per_image"]) > 0
        assert row["psnr_fp"] == pytest.approx(found[name.removesuffix("-openvino")]["psnr_fp"], abs=1.0)
    assert report.ours == PTQ_OPENVINO
    proof = report.also_deployed[FIXED_BIT_OPENVINO]
    assert proof.folder == f"openvino-{FIXED_BIT}"
    for execution, parity in ((report.execution, report.parity), (proof.execution, proof.parity)):
        assert execution is not None
        assert parity is not None
        assert execution.executed_int8 == execution.planned == parity.layers_exact > 10
    assert sum(FIXED_BIT_OPENVINO in target.name and target.holds is True for target in report.targets) == 2
    page = render_page(report, Curves(), {})
    assert f"<code>openvino-{FIXED_BIT}</code>" in page
    assert NNCF_INT8 in page


@pytest.mark.long
def test_each_folder_computes_what_its_quantized_model_computes(two: Path) -> None:
    for name in ("", f"-{FIXED_BIT}"):
        model, _, steps = load_quantized(two / f"student{name}")
        assert steps == 4
        assert nearness(two / f"openvino{name}", model.denoiser, model.sample_shape) > 45
    different = {name: load_file(two / name / STATE) for name in ("student", f"student-{FIXED_BIT}")}
    first, second = different.values()
    assert any(not torch.equal(first[key], second[key]) for key in first)


def test_a_trained_variant_is_exported_later_packed_and_in_another_batch(tiny_run: FinishedRun, tmp_path: Path) -> None:
    before = {file: file.read_bytes() for file in (tiny_run.path / "stages").iterdir()}
    out = tmp_path / "packed"
    done = export(tiny_run.path, FolderAsked(PQ, "packed", 2), out=out, console=QUIETLY)
    assert {file: file.read_bytes() for file in (tiny_run.path / "stages").iterdir()} == before
    manifest = read_manifest(out)
    assert (manifest["batch_size"], manifest["provenance"]["variant"]) == (2, PQ)
    assert (manifest["provenance"]["sampling_steps"], done.sample_shape) == (4, (1, 32, 32))
    parity = done.proofs.parity
    assert parity.layers_exact == parity.layers_checked == len(done.proofs.precisions) > 10
    full = export(tiny_run.path, FolderAsked(PQ), out=tmp_path / "int8", console=QUIETLY)
    assert done.bytes < full.bytes
    x, t = (value.numpy() for value in states((1, 32, 32), 2))
    packed, plain = (OVUNet2DModel.from_pretrained(folder).predict(x, t) for folder in (out, tmp_path / "int8"))
    assert np.abs(packed - plain).max() <= 1e-5 * np.abs(plain).max()


@pytest.mark.long
def test_the_student_is_exported_for_another_size_as_its_pytorch_folder_computes_there(
    tiny_run: FinishedRun, tmp_path: Path
) -> None:
    done = export(tiny_run.path, FolderAsked(size=(16, 24)), out=tmp_path / "small", console=QUIETLY)
    assert (done.variant, done.sample_shape) == (PQCAD, (1, 16, 24))
    assert done.proofs.parity.layers_exact == done.proofs.parity.layers_checked
    model, _, _ = load_quantized(tiny_run.path / "student")
    assert len(quantized_layers(model.denoiser)) == len(done.proofs.precisions)
    assert nearness(tmp_path / "small", model.denoiser, (1, 16, 24)) > 45
    with pytest.raises(UsageError, match=r"^--size: got \[15, 24\]; allowed multiples of 2"):
        export(tiny_run.path, FolderAsked(size=(15, 24)), out=tmp_path / "odd", console=QUIETLY)


@pytest.mark.long
def test_what_is_exported_again_is_the_folder_that_the_run_has_left(two: Path, tmp_path: Path) -> None:
    """Ranges of `ptq` come from all states, also those of float steps, which no quantized model computes."""
    export(two, FolderAsked(PTQ), out=tmp_path / "again", console=QUIETLY)
    graphs = [folder / "unet" / "openvino_model.bin" for folder in (two / "openvino", tmp_path / "again")]
    assert graphs[0].read_bytes() == graphs[1].read_bytes()
    assert read_manifest(tmp_path / "again")["float_start"] == 999


@pytest.mark.long
def test_a_pytorch_folder_is_deployed_by_itself_as_its_run_would(two: Path, tmp_path: Path) -> None:
    """Attention has ranges of other states there, so its products are compared by what they give."""
    moved = tmp_path / "moved"
    shutil.copytree(two / f"student-{FIXED_BIT}", moved)
    done = export(moved, FolderAsked(batch_size=2), out=tmp_path / "out", console=QUIETLY)
    manifest = read_manifest(tmp_path / "out")
    assert (done.variant, manifest["provenance"]["variant"], manifest["batch_size"]) == (FIXED_BIT, FIXED_BIT, 2)
    assert (manifest["float_start"], manifest["provenance"]["sampling_steps"]) == (999, 4)
    assert done.proofs.parity.layers_exact == done.proofs.parity.layers_checked > 10
    model, _, _ = load_quantized(moved)
    assert nearness(tmp_path / "out", model.denoiser, model.sample_shape) > 45
    with pytest.raises(UsageError, match=rf"--variant: got '{PTQ}'; allowed {FIXED_BIT}, which .*moved holds"):
        export(moved, FolderAsked(PTQ), out=tmp_path / "other", console=QUIETLY)
    (moved / POLICY).unlink()
    with pytest.raises(ModelError, match=r"policy\.yaml: got no such file"):
        export(moved, FolderAsked(), out=tmp_path / "other", console=QUIETLY)


def test_a_student_that_learned_guidance_is_deployed_without_it_whatever_else_the_run_deploys() -> None:
    listed = f"evaluation.variants=[{PQ}, {PQCAD}]"
    policy = load_policy(POLICIES / "w4a8-digits-classes.yaml", [f"deploy={PQ}", listed])
    asked = as_asked(policy, FolderAsked(batch_size=2))
    assert policy.guidance_scale(PQCAD) == asked.guidance_scale(PQCAD) == 1.0
    assert (asked.export.batch_size, asked.features, asked.variants) == (2, None, policy.variants)


@pytest.mark.long
def test_what_a_run_has_not_made_is_not_exported(two: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=rf"--variant: got '{PQ}'; allowed what this run makes: {PTQ}, {FIXED_BIT}$"):
        export(two, FolderAsked(PQ), out=tmp_path / "out", console=QUIETLY)
    with pytest.raises(UsageError, match=r"--out: got .*, in the run's own folder; allowed another"):
        export(two, FolderAsked(), out=two / "openvino", console=QUIETLY)
    with pytest.raises(ModelError, match=r"got a folder without policy\.yaml"):
        export(two / "logs", FolderAsked(), out=tmp_path / "out", console=QUIETLY)
    marker = two / "stages" / f"{FIXED_BIT}.json"
    finished = marker.read_text()
    marker.unlink()
    try:
        with pytest.raises(CheckpointError, match=rf"got a run whose stages {FIXED_BIT} are to do; .*--resume"):
            export(two, FolderAsked(FIXED_BIT), out=tmp_path / "out", console=QUIETLY)
    finally:
        marker.write_text(finished)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["--variant=w4"], rf"--variant: got 'w4'; allowed {PTQ}, "),
        (["--weights=int3"], r"--weights: got 'int3'; allowed int8, packed"),
        (["--size=64x96"], r"--size: got '64x96'; allowed one number, or height and width as 64,96"),
        (["--batch_size=0"], r"--batch-size: got 0; allowed a whole number from 1"),
    ],
)
def test_a_mistake_on_the_command_line_is_told_before_anything_is_loaded(
    flags: list[str], error: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["export", str(tmp_path), "--out", str(tmp_path / "out"), *flags])
    assert ended.value.code == 2
    told = " ".join(capfd.readouterr().err.split())
    assert re.search(error, told), told


def test_a_folder_that_another_variant_takes_is_no_longer_that_ones_own(tmp_path: Path) -> None:
    """So that a run that deploys it again, under its first policy, does not trust what now lies there."""
    table = {
        exporting(name): Recipe({"folder": folder})
        for name, folder in ((PTQ, "openvino"), (FIXED_BIT, f"openvino-{FIXED_BIT}"))
    }
    run = RunFolder(tmp_path, table)
    for stage in table:
        with run.stage(stage) as begun:
            begun.done()
    take_folder(run, PQCAD, "openvino")
    assert [stage for stage in table if run.finished(stage)] == [exporting(FIXED_BIT)]
    assert run.begun(exporting(PTQ)) is None
    take_folder(run, FIXED_BIT, f"openvino-{FIXED_BIT}")
    assert run.finished(exporting(FIXED_BIT))


def test_the_first_deployed_variant_that_a_policy_lists_is_openvino() -> None:
    listed = f"evaluation.variants=[{DEPLOYED[PQCAD]}, {DEPLOYED[PTQ]}]"
    policy = load_policy(POLICIES / "smoke.yaml", [listed])
    assert (policy.deployed, policy.folder_of(PTQ)) == ((PQCAD, PTQ), f"openvino-{PTQ}")
    assert load_policy(POLICIES / "smoke.yaml", [f"evaluation.variants=[{PQ}]"]).deployed == ()


def test_every_variant_that_can_be_deployed_says_of_what_it_is_the_deployed_form() -> None:
    assert all(row.startswith(name) for name, row in DEPLOYED.items())
