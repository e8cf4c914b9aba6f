"""Cold starts: what runs in the processes, and what they tell. Nothing here asserts a speed."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from deployed_fixture import BATCH, SHAPE, quantized_small

from pqcad_qat.timing.cold_start import cold_starts
from pqcad_qat.timing.first_image import INPUTS, RESULT, first_image
from pqcad_qat.timing.float_graph import example_inputs


def test_every_candidate_starts_as_often_as_asked_and_one_that_dies_has_its_reason(tmp_path: Path) -> None:
    folder = quantized_small({"bits": 2}, {"bits": 8}).export(tmp_path / "openvino")
    damaged = quantized_small({"bits": 2}, {"bits": 8}).export(tmp_path / "damaged")
    (damaged / "unet" / "config.json").unlink()
    found = cold_starts(
        {"whole": [(folder, {}, 2)], "damaged": [(damaged, {}, 2)]}, example_inputs(SHAPE, BATCH), runs=2
    )
    assert [(row.name, row.image.runs, row.image.minimum_ms > 0) for row in found.rows] == [("whole", 2, True)]
    assert found.batch == BATCH
    assert "config.json" in found.left_out["damaged"]


def test_the_memory_is_that_of_a_process_without_torch_whatever_the_one_that_started_it_holds(tmp_path: Path) -> None:
    held = np.ones(100_000_000)  # 800 MB, which getrusage would pass on
    folder = quantized_small({"bits": 2}, {"bits": 8}).export(tmp_path / "openvino")
    (row,) = cold_starts({"ours": [(folder, {}, 1)]}, example_inputs(SHAPE, BATCH), runs=1).rows
    assert 20e6 < row.peak_bytes < held.nbytes
    loaded = subprocess.run(
        [sys.executable, "-c", f"import sys, {first_image.__module__}; print('torch' in sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert loaded.stdout.strip() == "False"


class Counted:
    """A compiled graph whose calls are counted."""

    def __init__(self) -> None:
        self.inputs: tuple[object, ...] = ()
        self.calls = 0

    def create_infer_request(self) -> Counted:
        return self

    def infer(self, _inputs: object, *, share_inputs: bool) -> None:
        self.calls += share_inputs


def test_each_graph_is_called_as_often_as_an_image_calls_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, compiled = quantized_small({"bits": 2}, {"bits": 8}).export(tmp_path / "openvino"), list[Counted]()

    def compile_counted(*_: object, **_properties: object) -> Counted:
        compiled.append(Counted())
        return compiled[-1]

    monkeypatch.setattr("pqcad_qat.timing.first_image.compile_graph", compile_counted)
    np.savez(tmp_path / INPUTS, **example_inputs(SHAPE, BATCH))  # type: ignore[arg-type]
    first_image(time.time() - 60, str(tmp_path), [(str(folder), {}, 3), (str(folder), {}, 1)])
    assert [graph.calls for graph in compiled] == [3, 1]
    assert 60 <= json.loads((tmp_path / RESULT).read_bytes())["seconds"] < 600
