"""Baselines made and tried out in processes of their own: the same files as ever, and a run that goes on without one
that dies.

Not here: how such a process ends (test_own_process.py).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import openvino as ov
import pytest
from rich.console import Console
from tiny_runs import POLICIES, tiny_overrides, without_page, without_trials
from torch import nn

from pqcad_qat.commands.run import run
from pqcad_qat.errors import DiedError
from pqcad_qat.models.denoiser import DiffusionModel
from pqcad_qat.policy.loading import load_policy
from pqcad_qat.policy.variants import FP32, NNCF_INT8, OV_FP32
from pqcad_qat.report.comparison import compare_runs, named_runs
from pqcad_qat.report.comparison_page import cells, headings, markdown, remarks, render
from pqcad_qat.report.report_files import read_report
from pqcad_qat.stages import baselines
from pqcad_qat.timing.baseline_trials import (
    NNCF_SETTINGS,
    XML_FILE,
    linear_layers,
    nncf_baseline,
    nncf_errors,
    reasons,
    save_openvino,
    try_out,
)
from pqcad_qat.timing.float_graph import convert_float, example_inputs
from pqcad_qat.timing.latency import F32, latency_properties

WHY = "its process died of SIGSEGV (Segmentation fault)"


@pytest.mark.long
def test_nncf_makes_the_same_file_in_a_process_of_its_own(tiny_model: DiffusionModel, tmp_path: Path) -> None:
    shape = tiny_model.sample_shape
    plain = convert_float(tiny_model.denoiser, shape, 2, tmp_path / "float", times=1000)
    inputs = [example_inputs(shape, 2, seed) for seed in range(2)]
    apart = nncf_baseline(tmp_path / "float" / XML_FILE, inputs, tmp_path / "apart", [latency_properties({})])
    here = save_openvino(nncf.quantize(plain.clone(), nncf.Dataset(inputs), subset_size=len(inputs)), tmp_path / "here")
    assert {file.name for file in (tmp_path / "apart").iterdir()} == {"openvino_model.xml", "openvino_model.bin"}
    assert apart.with_suffix(".bin").read_bytes() == here.with_suffix(".bin").read_bytes()
    one, two = (ov.Core().compile_model(xml, "CPU", dict(F32))(inputs[0])[0] for xml in (apart, here))
    assert (one == two).all()


@pytest.mark.long
def test_the_setting_of_nncf_is_the_nearest_one_on_other_states(tiny_model: DiffusionModel, tmp_path: Path) -> None:
    """One setting quantized here again, and its error with numpy; the saved graph has the smallest error of all."""
    shape, way = tiny_model.sample_shape, latency_properties({})
    plain = convert_float(tiny_model.denoiser, shape, 2, tmp_path / "float", times=1000)
    inputs, others = ([example_inputs(shape, 2, seed) for seed in seeds] for seeds in (range(2), range(7, 9)))
    tried = NNCF_SETTINGS[1:]  # the defaults are what all other tests take
    given = tmp_path / "float" / XML_FILE
    xml = nncf_baseline(given, inputs, tmp_path / "apart", [way], compared=others, settings=tried)
    mixed = nncf.quantize(
        plain.clone(), nncf.Dataset(inputs), subset_size=len(inputs), preset=nncf.QuantizationPreset.MIXED
    )
    compiled = [ov.Core().compile_model(graph, "CPU", way) for graph in (plain, mixed, xml)]
    full, *ours = (np.stack([run(values)[0] for values in others]) for run in compiled)
    of_mixed, of_saved = (float(np.mean((outputs - full) ** 2)) for outputs in ours)
    errors = {name: error for name, error in nncf_errors(tmp_path / "apart").items() if error is not None}
    assert tuple(errors) == tried
    assert errors["preset MIXED"] == pytest.approx(of_mixed, rel=1e-3)
    assert min(errors.values()) == pytest.approx(of_saved, rel=1e-3)


def test_linear_layers_of_a_graph_are_those_of_the_model(tiny_model: DiffusionModel, tmp_path: Path) -> None:
    """Neither the products of attention nor convolutions are among them."""
    graph = convert_float(tiny_model.denoiser, tiny_model.sample_shape, 1, tmp_path, times=1000)
    linear = [module for module in tiny_model.denoiser.modules() if isinstance(module, nn.Linear)]
    products = sum(node.get_type_name() == "MatMul" for node in graph.get_ops())
    assert len(linear_layers(graph)) == len(linear) == products


def test_a_graph_that_cannot_be_run_is_a_reason_and_nothing_is_left_of_it(tmp_path: Path) -> None:
    (tmp_path / XML_FILE).write_text("no graph")
    inputs = [example_inputs((1, 8, 8), 1)]
    died = reasons(
        {
            OV_FP32: lambda: try_out(tmp_path / XML_FILE, inputs[0], [{}]),
            NNCF_INT8: lambda: nncf_baseline(tmp_path / XML_FILE, inputs, tmp_path / "nncf"),
            "fine": lambda: None,
        }
    )
    assert died.keys() == {OV_FP32, NNCF_INT8}
    assert all(why.startswith("RuntimeError: ") for why in died.values())
    assert list((tmp_path / "nncf").iterdir()) == []


def test_a_run_goes_on_without_a_baseline_that_dies_and_what_dies_poisons_nothing(
    tiny_folder: Path, tmp_path: Path
) -> None:
    small = (
        f"evaluation.variants=[{FP32}, {OV_FP32}, {NNCF_INT8}]",
        "evaluation.images=2",
        "evaluation.features=none",
        "calibration.trajectories=2",
    )
    policy = load_policy(POLICIES / "smoke.yaml", tiny_overrides(tiny_folder, *small))
    died, fine = tmp_path / "died", tmp_path / "fine"
    attempts: list[str] = []

    def dies(*_: Any, **__: Any) -> None:
        attempts.append(NNCF_INT8)
        raise DiedError(WHY)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pqcad_qat.timing.latency.usable_cores", lambda: 1)
        patch.setattr(baselines, "nncf_baseline", dies)
        for resume in (False, True):
            run(policy, died, "command", Console(quiet=True), resume=resume)
    assert attempts == [NNCF_INT8]
    rows = {row.name: row for row in read_report(died).variants}
    assert (rows[NNCF_INT8].did_not_run, rows[NNCF_INT8].latency_ms_per_step, rows[NNCF_INT8].psnr_fp) == (
        WHY,
        None,
        None,
    )
    assert rows[OV_FP32].latency_ms_per_step
    assert f"baselines: {NNCF_INT8} did not run: {WHY}" in read_report(died).warnings
    assert f"did not run: {WHY}" in (died / "report.html").read_text()

    # a run beside it finds full precision's graph, and makes what stands for NNCF's
    with without_trials(), without_page(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("pqcad_qat.timing.latency.usable_cores", lambda: 1)
        patch.setattr(baselines, "convert_float", dies)
        run(policy, fine, "command", Console(quiet=True))
    assert {row.did_not_run for row in read_report(fine).variants} == {""}
    assert json.loads((fine / "stages" / "baselines.json").read_text())["died"] == {}
    check_comparison([died, fine])


def check_comparison(paths: Sequence[Path]) -> None:
    """Both rows are there, and only one of them has figures."""
    (died, fine) = named_runs({str(path): read_report(path) for path in paths})
    comparison = compare_runs("two", [died], "command")
    row = next(row for row in comparison.rows if row.variant == NNCF_INT8)
    texts = dict(zip(headings(comparison), cells(comparison, row), strict=True))
    assert (texts["variant"], texts["ms an image"]) == (f"{NNCF_INT8} (did not run)", "")
    (told,) = [remark for remark in remarks(comparison.parts[0]) if WHY in remark]
    assert told in render(comparison)
    assert told in markdown(comparison)
    assert not [row for row in compare_runs("two", [fine], "command").rows if row.did_not_run]
