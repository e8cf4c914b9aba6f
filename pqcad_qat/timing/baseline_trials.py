"""Trials of the baselines that OpenVINO and NNCF make of the full-precision graph, in processes that may crash.

Not here: the conversion of full precision itself, and all timing (latency.py). Such a
process needs no torch, so this file does not import it.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

from pqcad_qat.errors import DiedError, ModelError
from pqcad_qat.machine.own_process import run_apart
from pqcad_qat.serving.compiled_graph import compile_graph
from pqcad_qat.serving.graph_inputs import port_values

Inputs = Mapping[str, np.ndarray]
"""Arrays by name of the model's input."""

Properties = Mapping[str, object]
"""OpenVINO properties by name."""

XML_FILE = "openvino_model.xml"
"""Name of a saved graph's file."""


def save_openvino(model: ov.Model, folder: Path) -> Path:
    """Save a graph as ``folder``/openvino_model.xml and .bin without rounding any constant; return the xml's path."""
    folder.mkdir(parents=True, exist_ok=True)
    ov.save_model(model, folder / XML_FILE, compress_to_fp16=False)
    return folder / XML_FILE


def nncf_baseline(
    float_xml: Path, calibration_inputs: Sequence[Inputs], folder: Path, ways: Sequence[Properties] = ({},)
) -> Path:
    """Post-training INT8 quantization with NNCF's defaults; returns the saved graph's xml.

    It is calibrated on all ``calibration_inputs``. The saved graph is compiled in each of the ``ways`` and called once,
    because it is timed later from that file, as a user of it would run it.

    Raises:
        ModelError: there are no calibration inputs.
        DiedError: NNCF or OpenVINO fails; no graph is left in the folder then.
    """
    if not calibration_inputs:
        raise ModelError("NNCF's baseline: got no calibration input; allowed one or more")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        arrays = Path(temporary) / "inputs.npz"
        _write(calibration_inputs, arrays)
        try:
            run_apart(_quantize, str(float_xml), str(arrays), str(folder), [dict(way) for way in ways])
        except DiedError:
            for unfinished in folder.glob(f"{Path(XML_FILE).stem}.*"):
                unfinished.unlink()
            raise
    return folder / XML_FILE


def try_out(xml: Path, inputs: Inputs, ways: Sequence[Properties]) -> None:
    """Compile a graph in each of these ways and call it once in each.

    Raises:
        DiedError: OpenVINO fails.
    """
    with tempfile.TemporaryDirectory() as temporary:
        arrays = Path(temporary) / "inputs.npz"
        _write([inputs], arrays)
        run_apart(_try_out, str(xml), str(arrays), [dict(way) for way in ways])


def reasons(attempts: Mapping[str, Callable[[], object]]) -> dict[str, str]:
    """Make every attempt; return the reason of each failure, by name."""
    died: dict[str, str] = {}
    for name, attempt in attempts.items():
        try:
            attempt()
        except DiedError as error:
            died[name] = str(error)
    return died


def _quantize(float_xml: str, inputs: str, folder: str, ways: list[dict[str, object]]) -> None:
    """In the separate process: quantize with NNCF, save, compile and call."""
    # NNCF imports torch wherever it can, which takes a second, and needs it for graphs of torch alone.
    sys.modules["torch"] = None  # type: ignore[assignment]
    import nncf  # importing takes time, and only this baseline needs it

    calibration_inputs = _read(inputs)
    quantized = nncf.quantize(
        ov.Core().read_model(float_xml), nncf.Dataset(calibration_inputs), subset_size=len(calibration_inputs)
    )
    _call(save_openvino(quantized, Path(folder)), calibration_inputs[0], ways)


def _try_out(xml: str, inputs: str, ways: list[dict[str, object]]) -> None:
    """In the separate process: compile and call."""
    _call(Path(xml), _read(inputs)[0], ways)


def _call(xml: Path, inputs: Inputs, ways: Sequence[Properties]) -> None:
    """Compile a graph in each of these ways, and call it once in each."""
    for way in ways:
        core = ov.Core()
        compiled = compile_graph(core.read_model(xml), core, properties=way)
        compiled.create_infer_request().infer(port_values([port.get_names() for port in compiled.inputs], inputs))


def _write(inputs: Sequence[Inputs], file: Path) -> None:
    """Write the inputs of several calls as one file, for the separate process."""
    with file.open("wb") as written:
        stacked: dict[str, Any] = {name: np.stack([arrays[name] for arrays in inputs]) for name in inputs[0]}
        np.savez(written, **stacked)


def _read(file: str) -> list[dict[str, np.ndarray]]:
    """The inputs of several calls that `_write` wrote."""
    with np.load(file) as archive:
        arrays = {name: archive[name] for name in archive.files}
    count = len(next(iter(arrays.values())))
    return [{name: array[index] for name, array in arrays.items()} for index in range(count)]
