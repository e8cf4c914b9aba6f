"""Trials of the baselines that OpenVINO and NNCF make of the full-precision graph, in processes that may crash.

Not here: the conversion of full precision itself, and all timing (latency.py). Such a
process needs no torch, so this file does not import it.
"""

from __future__ import annotations

import json
import math
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

HYBRID = "hybrid"
"""The setting of optimum-intel for diffusion models: of linear layers the weights alone are quantized."""

NNCF_SETTINGS = ("defaults", "preset MIXED", "model_type TRANSFORMER", HYBRID)
"""Settings of NNCF that are tried: its defaults, zero points for inputs, what it recommends for attention, SmoothQuant
among it, and optimum-intel's.
"""

ERRORS_FILE = "errors.json"
"""Name of the file with the error of every setting."""

INPUTS, COMPARED = "inputs.npz", "compared.npz"
"""Names of the files for the separate process, with the inputs of calibration, and those that are compared."""


def save_openvino(model: ov.Model, folder: Path) -> Path:
    """Save a graph as ``folder``/openvino_model.xml and .bin without rounding any constant; return the xml's path."""
    folder.mkdir(parents=True, exist_ok=True)
    ov.save_model(model, folder / XML_FILE, compress_to_fp16=False)
    return folder / XML_FILE


def nncf_baseline(
    float_xml: Path,
    calibration_inputs: Sequence[Inputs],
    folder: Path,
    ways: Sequence[Properties] = ({},),
    *,
    compared: Sequence[Inputs] = (),
    settings: Sequence[str] = NNCF_SETTINGS,
) -> Path:
    """Post-training INT8 quantization with NNCF; returns the saved graph's xml.

    It is calibrated on all ``calibration_inputs``. The saved graph is compiled in each of the ``ways`` and called once,
    because it is timed later from that file, as a user of it would run it.

    With inputs that are ``compared``, every one of the ``settings`` is tried, and the graph is saved whose output is
    nearest to full precision's on them, executed in the first way; ``errors.json`` beside it has the mean squared
    errors. Without them NNCF has the first one.

    Raises:
        ModelError: there are no calibration inputs.
        DiedError: NNCF or OpenVINO fails; no graph is left in the folder then.
    """
    if not calibration_inputs:
        raise ModelError("NNCF's baseline: got no calibration input; allowed one or more")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        _write(calibration_inputs, Path(temporary) / INPUTS)
        if compared:
            _write(compared, Path(temporary) / COMPARED)
        try:
            how = {"ways": [dict(way) for way in ways], "settings": list(settings)}
            run_apart(_quantize, str(float_xml), temporary, str(folder), how)
        except DiedError:
            for unfinished in folder.glob(f"{Path(XML_FILE).stem}.*"):
                unfinished.unlink()
            raise
    return folder / XML_FILE


def nncf_errors(folder: Path) -> dict[str, float | None]:
    """Mean squared error of each setting that was compared, None for one that failed; {} where none were."""
    file = folder / ERRORS_FILE
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def try_out(xml: Path, inputs: Inputs, ways: Sequence[Properties]) -> None:
    """Compile a graph in each of these ways and call it once in each.

    Raises:
        DiedError: OpenVINO fails.
    """
    with tempfile.TemporaryDirectory() as temporary:
        _write([inputs], Path(temporary) / INPUTS)
        run_apart(_try_out, str(xml), str(Path(temporary) / INPUTS), [dict(way) for way in ways])


def reasons(attempts: Mapping[str, Callable[[], object]]) -> dict[str, str]:
    """Make every attempt; return the reason of each failure, by name."""
    died: dict[str, str] = {}
    for name, attempt in attempts.items():
        try:
            attempt()
        except DiedError as error:
            died[name] = str(error)
    return died


def _quantize(float_xml: str, arrays: str, folder: str, how: dict[str, Any]) -> None:
    """In the separate process: quantize with NNCF in each of the settings, save, compile and call in each of the
    ways.
    """
    ways, settings = how["ways"], how["settings"]
    # NNCF imports torch wherever it can, which takes a second, and needs it for graphs of torch alone.
    sys.modules["torch"] = None  # type: ignore[assignment]
    import nncf  # importing takes time, and only this baseline needs it

    no_smoothing = nncf.AdvancedQuantizationParameters(
        smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(convolution=-1, matmul=-1)
    )
    options: dict[str, dict[str, Any]] = {
        "preset MIXED": {"preset": nncf.QuantizationPreset.MIXED},
        "model_type TRANSFORMER": {"model_type": nncf.ModelType.TRANSFORMER},
        HYBRID: {"model_type": nncf.ModelType.TRANSFORMER, "advanced_parameters": no_smoothing},
    }
    calibration_inputs, core = _read(Path(arrays) / INPUTS), ov.Core()

    def quantized(setting: str) -> ov.Model:
        graph, chosen_options = core.read_model(float_xml), options.get(setting, {})
        if setting == HYBRID:
            linear = nncf.IgnoredScope(names=linear_layers(graph), validate=False)
            chosen_options = {**chosen_options, "ignored_scope": linear}
            graph = nncf.compress_weights(
                graph,
                mode=nncf.CompressWeightsMode.INT8_ASYM,
                ignored_scope=nncf.IgnoredScope(types=["Convolution"], validate=False),
            )
        return nncf.quantize(
            graph,
            nncf.Dataset(calibration_inputs),
            subset_size=len(calibration_inputs),
            **chosen_options,
        )

    if (Path(arrays) / COMPARED).exists():
        held_out, errors, graphs = _read(Path(arrays) / COMPARED), dict[str, float](), dict[str, ov.Model]()
        full = _outputs(core.read_model(float_xml), held_out, ways[0])
        for setting in settings:
            try:
                graphs[setting] = quantized(setting)
                outputs = _outputs(graphs[setting], held_out, ways[0])
                error = float(np.mean(np.square(outputs - full), dtype=np.float64))
                errors[setting] = error if math.isfinite(error) else math.inf
            except Exception:  # NNCF and OpenVINO raise many kinds
                errors[setting] = math.inf
        told = {setting: error if math.isfinite(error) else None for setting, error in errors.items()}
        (Path(folder) / ERRORS_FILE).write_text(json.dumps(told), encoding="utf-8")
        chosen = min(settings, key=errors.__getitem__)
        graph = graphs[chosen] if math.isfinite(errors[chosen]) else quantized(settings[0])  # for its error
    else:
        graph = quantized(settings[0])
    _call(save_openvino(graph, Path(folder)), calibration_inputs[0], ways)


def linear_layers(graph: ov.Model) -> list[str]:
    """Names of the products of a graph whose second factor is a constant."""
    return [
        node.get_friendly_name()
        for node in graph.get_ordered_ops()
        if node.get_type_name() == "MatMul" and any(map(_is_constant, node.input_values()))
    ]


def _is_constant(value: ov.Output) -> bool:
    """Whether a value is a constant, perhaps converted or reshaped."""
    node = value.get_node()
    if node.get_type_name() in ("Convert", "Reshape", "Transpose"):
        return _is_constant(node.input_value(0))
    return bool(node.get_type_name() == "Constant")


def _outputs(graph: ov.Model, inputs: Sequence[Inputs], way: Properties) -> np.ndarray:
    """The first output for each of the inputs, (N, B, C, H, W)."""
    core = ov.Core()
    compiled = compile_graph(graph, core, properties=way)
    request, ports = compiled.create_infer_request(), [port.get_names() for port in compiled.inputs]
    return np.stack([request.infer(port_values(ports, values))[0].copy() for values in inputs])


def _try_out(xml: str, inputs: str, ways: list[dict[str, object]]) -> None:
    """In the separate process: compile and call."""
    _call(Path(xml), _read(Path(inputs))[0], ways)


def _call(xml: Path, inputs: Inputs, ways: Sequence[Properties]) -> None:
    """Compile a graph in each of these ways, and call it once in each."""
    for way in ways:
        _outputs(ov.Core().read_model(xml), [inputs], way)


def _write(inputs: Sequence[Inputs], file: Path) -> None:
    """Write the inputs of several calls as one file, for the separate process."""
    with file.open("wb") as written:
        stacked: dict[str, Any] = {name: np.stack([arrays[name] for arrays in inputs]) for name in inputs[0]}
        np.savez(written, **stacked)


def _read(file: Path) -> list[dict[str, np.ndarray]]:
    """The inputs of several calls that `_write` wrote."""
    with np.load(file) as archive:
        arrays = {name: archive[name] for name in archive.files}
    count = len(next(iter(arrays.values())))
    return [{name: array[index] for name, array in arrays.items()} for index in range(count)]
