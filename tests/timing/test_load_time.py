"""Load times by format: of the same graph, and of what each format really is. Nothing here asserts a speed."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
from deployed_fixture import quantized_small

from pqcad_qat.errors import ModelError
from pqcad_qat.report.record import Timing
from pqcad_qat.serving.deployed_folder import read_manifest
from pqcad_qat.timing.latency import size_bytes
from pqcad_qat.timing.load_time import load_times


@pytest.mark.parametrize("weights", ["int8", "packed"])
def test_both_formats_are_loaded_whichever_the_folder_has(weights: str, tmp_path: Path) -> None:
    folder = quantized_small({"bits": 2}, {"bits": 8}).export(tmp_path / "openvino", weights)  # type: ignore[arg-type]
    plain, packed = load_times(folder, tmp_path / "formats", 2)
    for found in (plain, packed):
        written = tmp_path / "formats" / found.weights
        assert read_manifest(written)["weights"]["format"] == found.weights
        assert found.size_bytes == size_bytes(written)
        parts = [
            getattr(found, field.name) for field in fields(found) if isinstance(getattr(found, field.name), Timing)
        ]
        assert [(part.runs, part.median_ms > 0) for part in parts] == [(2, True)] * 3
    assert (plain.weights, packed.weights) == ("int8", "packed")
    assert packed.size_bytes < plain.size_bytes


def test_a_damaged_folder_is_refused(tmp_path: Path) -> None:
    folder = quantized_small({"bits": 2}, {"bits": 8}).export(tmp_path / "openvino")
    (folder / "unet" / "config.json").unlink()
    with pytest.raises(ModelError, match=r"got no file .*config\.json; allowed"):
        load_times(folder, tmp_path / "formats", 1)
