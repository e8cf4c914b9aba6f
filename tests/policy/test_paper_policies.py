"""The paper's protocols: what their policies say, their plans at full size, and what is told where a file is missing.

Not here: runs of them (tests/whole_runs/test_paper_runs.py).
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from paper_models import ddpm
from tiny_runs import POLICIES

from pqcad_qat import cli
from pqcad_qat.models import model_loading, untrained
from pqcad_qat.policy.loading import load_policy
from pqcad_qat.policy.study_cells import load_study
from pqcad_qat.policy.variants import FIXED_BIT, FP32, PQ, PQ_DISTILLED, PQ_HALF, PQCAD, PQCAD_OPENVINO
from pqcad_qat.quality.inception import INCEPTION_FILE
from pqcad_qat.quantization.plan_facts import executes_int8, float_layers
from pqcad_qat.stages.prepared import planned_shapes

PAPER = POLICIES / "paper"
FULL_SIZE = {  # policy -> architecture that ships, parameters, sampling steps
    "ddpm-cifar10-32": ("ddpm-cifar10-32", 35_746_307, 100),
    "ddpm-church-256": ("ddpm-church-256", 113_673_219, 100),
    "ddpm-bedroom-256": ("ddpm-church-256", 113_673_219, 100),
    "ldm-celebahq-256": ("ldm-celebahq-256", 274_056_163, 200),
}
ROWS = {FP32, FIXED_BIT, PQ, PQ_HALF, PQ_DISTILLED, PQCAD, PQCAD_OPENVINO}
"""Rows of the paper's kind of table."""


@pytest.mark.parametrize("name", FULL_SIZE)
def test_each_halves_its_steps_and_compares_50000_images_by_fid(name: str) -> None:
    policy = load_policy(PAPER / f"{name}.yaml")
    assert policy.name == name
    assert policy.model.source.rpartition("/")[2] == name
    assert (policy.sampler.steps, policy.distillation.student_steps) == (FULL_SIZE[name][2], FULL_SIZE[name][2] // 2)
    assert policy.evaluation.images == 50_000
    assert policy.features == str(PAPER / "files" / INCEPTION_FILE)
    assert set(policy.variants) >= ROWS


def test_no_two_of_them_have_one_reference() -> None:
    references = [load_policy(PAPER / f"{name}.yaml").evaluation.reference for name in FULL_SIZE]
    assert all(reference and Path(reference).parent == PAPER / "files" for reference in references)
    assert len({*references}) == len(FULL_SIZE)


def test_the_study_has_them_all() -> None:
    cells = load_study(POLICIES / "studies" / "paper.yaml").cells
    assert [cell.labels["policy"] for cell in cells] == list(FULL_SIZE)


@pytest.mark.parametrize("name", FULL_SIZE)
def test_each_plans_every_layer_of_its_architecture_but_the_one_that_reads_the_state(name: str) -> None:
    architecture, parameters, _ = FULL_SIZE[name]
    without = ["evaluation.features=none", "evaluation.reference=null", f"model.source={architecture}"]
    denoiser, plan, _ = planned_shapes(load_policy(PAPER / f"{name}.yaml", without))
    assert sum(parameter.numel() for parameter in denoiser.parameters()) == parameters
    assert float_layers(denoiser, plan) == ("conv_in",)
    assert all(executes_int8(layer) for layer in plan)
    assert {layer.weights.bits for layer in plan} == {4, 7}


@pytest.mark.parametrize("command", ["plan", "run"])
def test_missing_files_are_told_together_by_their_keys_before_anything_is_downloaded(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module, name in ((untrained, "downloaded"), (model_loading, "downloaded_pipeline")):
        monkeypatch.setattr(module, name, None)  # so that a download would fail
    monkeypatch.chdir(tmp_path)
    given = [f"evaluation.features={tmp_path / INCEPTION_FILE}", f"evaluation.reference={tmp_path / 'church'}"]
    flags = [text for override in given for text in ("--set", override)]
    with pytest.raises(SystemExit) as ended:
        cli.main([command, str(PAPER / "ddpm-church-256.yaml"), *flags])
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert re.search(rf"evaluation\.features: .*{INCEPTION_FILE}: got no .*; allowed {INCEPTION_FILE}", told)
    assert re.search(r"evaluation\.reference: .*church: got no such folder; allowed one of pictures", told)
    assert list(tmp_path.iterdir()) == []


def test_a_model_folder_that_is_missing_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    without = ["--set", "evaluation.features=none", "--set", "evaluation.reference=null"]
    source = str(tmp_path / "church")
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", str(PAPER / "ddpm-church-256.yaml"), "--model", source, *without])
    assert ended.value.code == 2
    assert re.search(r"model.*church.*allowed a folder in diffusers' layout, or a hub id", capsys.readouterr().err)
    ddpm(tmp_path / "church", 16)
    cli.main(["plan", str(PAPER / "ddpm-church-256.yaml"), "--model", source, *without])
