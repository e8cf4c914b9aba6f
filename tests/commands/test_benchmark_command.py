"""What a benchmark records of each candidate in this process; nothing here asserts a speed.

Not here: what it records in a process that computes as on a smaller CPU (test_cli.py), how it looks
(test_benchmark_page.py), how a call or a burst is timed (test_latency.py, test_throughput.py).
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from small_networks import unet_config
from tiny_runs import POLICIES, fixed_batch_graph

from pqcad_qat.commands import benchmark
from pqcad_qat.commands.benchmark import measure, measure_here, measure_speed, precision_hint
from pqcad_qat.commands.benchmark_subject import Candidates, Subject, candidates, open_subject
from pqcad_qat.errors import ModelError
from pqcad_qat.export.execution import INT8
from pqcad_qat.models.untrained import random_denoiser
from pqcad_qat.policy.variants import FP32, NNCF_INT8, OV_BF16, OV_FP32, PQCAD_OPENVINO
from pqcad_qat.report.benchmark_record import Measurement, SpeedRow
from pqcad_qat.serving.deployed_folder import read_manifest
from pqcad_qat.timing.hardware import Hardware, hardware
from pqcad_qat.timing.latency import BF16, F32, size_bytes


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """A tiny architecture; ours was exported at batch 1."""
    folder = tmp_path_factory.mktemp("speed")
    (folder / "tiny.json").write_text(json.dumps(unet_config()), encoding="utf-8")
    return open_subject(str(folder / "tiny.json"), POLICIES / "w4a8.yaml", folder / "made")


@pytest.fixture(scope="module")
def made(subject: Subject, tmp_path_factory: pytest.TempPathFactory) -> Candidates:
    """Ours, and its baselines at batch 2."""
    return candidates(subject, 2, tmp_path_factory.mktemp("baselines") / "batch-2")


@pytest.fixture(scope="module")
def native(made: Candidates) -> Measurement:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pqcad_qat.timing.latency.usable_cores", lambda: 1)
        return measure_here(made, "native", runs=2, throughput=True)


def rows(measurement: Measurement) -> Mapping[str, SpeedRow]:
    return {row.name: row for row in measurement.rows}


def test_every_candidate_that_the_machine_can_run_is_timed_alone_and_under_load(native: Measurement) -> None:
    expected = {FP32, OV_FP32, NNCF_INT8, PQCAD_OPENVINO} | ({OV_BF16} if hardware().native_bf16 else set())
    assert set(rows(native)) == expected
    assert set(native.left_out) == {OV_BF16} - expected
    for row in native.rows:
        assert (row.latency.runs, row.latency.minimum_ms > 0) == (2, True)
        assert row.throughput is not None
        assert row.throughput.median > 0


def test_ours_takes_the_batch_that_is_timed_and_every_planned_layer_stays_in_int8(
    native: Measurement, made: Candidates
) -> None:
    ours, manifest = rows(native)[PQCAD_OPENVINO], read_manifest(made.files[PQCAD_OPENVINO])
    planned = {*manifest["layers"], *manifest["attention"]}
    assert manifest["attention"]
    assert native.batch == 2
    assert (ours.planned, ours.planned_float) == (len(planned), ())
    assert {ours.layers[name] for name in planned} <= set(INT8)
    assert ours.layers["conv_in"] not in INT8


def test_the_precision_of_every_layer_of_the_baselines_is_told(native: Measurement) -> None:
    layers = {
        name
        for name, module in random_denoiser(unet_config(), "config").named_modules()
        if type(module) in (torch.nn.Conv2d, torch.nn.Linear)
    }
    found = rows(native)
    assert found[OV_FP32].layers == dict.fromkeys(layers, "f32")
    assert found[OV_FP32].inference_precision == "f32"
    assert set(found[NNCF_INT8].layers) == layers
    assert set(found[NNCF_INT8].layers.values()) & set(INT8)
    assert not found[FP32].layers


def test_sizes_are_of_the_files_that_were_timed(native: Measurement, made: Candidates) -> None:
    found = rows(native)
    assert found[FP32].size_bytes == 4 * sum(
        parameter.numel() for parameter in random_denoiser(unet_config(), "config").parameters()
    )
    assert found[OV_FP32].size_bytes == size_bytes(made.files[OV_FP32].parent)
    assert found[PQCAD_OPENVINO].size_bytes == size_bytes(made.files[PQCAD_OPENVINO])


def test_the_profile_says_where_the_time_went(native: Measurement) -> None:
    for row in native.rows:
        assert ("Convolution" in {part.kind for part in row.profile}) is (row.name != FP32)


class Thread(ThreadPoolExecutor):
    """In place of another process: a thread of this one, started with the same environment."""

    def __init__(self, count: int, _context: object) -> None:
        super().__init__(count)


def test_a_smaller_instruction_set_is_asked_of_the_other_process_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What such a process then finds is tested by the command line (test_cli.py)."""
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.setattr(benchmark, "ProcessPoolExecutor", Thread)
    monkeypatch.setattr(benchmark, "measure_here", lambda *given: (given, os.environ["ONEDNN_MAX_CPU_ISA"]))
    timed = Candidates({}, {}, (1, 8, 8), 2)
    assert measure(timed, "avx2", runs=1, throughput=False) == ((timed, "avx2", 1, False), "AVX2")
    assert "ONEDNN_MAX_CPU_ISA" not in os.environ


def test_a_graph_with_a_fixed_batch_is_left_out_with_the_reason(made: Candidates, tmp_path: Path) -> None:
    fixed = replace(
        made,
        files={
            OV_FP32: fixed_batch_graph(2, made.sample_shape, tmp_path),
            PQCAD_OPENVINO: made.files[PQCAD_OPENVINO],
        },
        batch=3,
    )
    found = measure_here(fixed, "native", runs=1, throughput=False)
    assert set(rows(found)) == {FP32, PQCAD_OPENVINO}
    assert found.left_out[OV_FP32] == "got a batch of 3; allowed 2, which is fixed in its graph"


@pytest.mark.parametrize(("native_bf16", "default"), [(True, {}), (None, {}), (False, F32)])
def test_openvinos_default_is_left_alone_but_where_bf16_is_emulated(
    native_bf16: bool | None, default: Mapping[str, str]
) -> None:
    machine = Hardware("some CPU", ("avx2",), 1, {}, native_bf16)
    assert precision_hint(PQCAD_OPENVINO, machine) == precision_hint(NNCF_INT8, machine) == default
    assert (precision_hint(OV_FP32, machine), precision_hint(OV_BF16, machine)) == (F32, BF16)


def test_an_instruction_set_that_the_cpu_lacks_is_left_out_or_refused_where_it_is_all(
    subject: Subject, made: Candidates, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The candidates are those that were made already."""
    monkeypatch.setattr("pqcad_qat.commands.benchmark.open_subject", lambda *_: subject)
    monkeypatch.setattr("pqcad_qat.commands.benchmark.candidates", lambda *_: made)
    machine = replace(hardware(), isa=("avx2",))
    monkeypatch.setattr("pqcad_qat.commands.benchmark.hardware", lambda: machine)
    monkeypatch.setattr("pqcad_qat.timing.latency.usable_cores", lambda: 1)
    console = Console(file=io.StringIO())

    def benchmark(*isas: str) -> object:
        return measure_speed(
            subject.source,
            POLICIES / "w4a8.yaml",
            [2],
            isas,
            runs=1,
            throughput=False,
            command="again",
            console=console,
        )

    with pytest.raises(
        ModelError, match="avx2_vnni: this CPU has no avx_vnni; avx512_core_vnni: this CPU has no avx512_vnni"
    ):
        benchmark("avx2_vnni", "avx512_core_vnni")
    report = benchmark("native", "avx2_vnni")
    assert [(part.isa, part.batch) for part in report.measurements] == [("native", 2)]
    assert (report.left_out, report.steps, report.weights) == (
        {"avx2_vnni": "this CPU has no avx_vnni"},
        None,
        "random",
    )
    assert "batch 2, native: timing" in console.file.getvalue()
