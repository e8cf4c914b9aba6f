"""The time that each type of node takes in an OpenVINO graph, by precision.

Not here: the time of a whole call (latency.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import openvino as ov

from pqcad_qat.report.record import ProfileRow
from pqcad_qat.timing.baseline_trials import Inputs
from pqcad_qat.timing.latency import PROFILING, compile_for_latency, inputs_of


def node_profile(source: Path, config: Mapping[str, object], inputs: Inputs, runs: int = 20) -> tuple[ProfileRow, ...]:
    """Mean milliseconds of one call by type of node and precision, slowest first.

    They come from OpenVINO's execution graph after ``runs`` calls.
    """
    return profile_rows(compile_for_latency(source, {**PROFILING, **config}, len(inputs["sample"])), inputs, runs)


def profile_rows(compiled: ov.CompiledModel, inputs: Inputs, runs: int) -> tuple[ProfileRow, ...]:
    """The same profile for a model that is already compiled with PROFILING."""
    request, named = compiled.create_infer_request(), inputs_of(compiled, inputs)
    for _ in range(runs):
        request.infer(named)
    by_kind: dict[tuple[str, str], list[float]] = {}
    for node in compiled.get_runtime_model().get_ops():
        info = node.get_rt_info()
        kind, precision, spent = (_text(info, key) for key in ("layerType", "runtimePrecision", "execTimeMcs"))
        if spent.isdigit() and int(spent) > 0:
            by_kind.setdefault((kind, precision), []).append(int(spent) / 1e3)
    rows = (ProfileRow(kind, precision, sum(times), len(times)) for (kind, precision), times in by_kind.items())
    return tuple(sorted(rows, key=lambda row: -row.milliseconds))


def _text(info: Mapping[str, object], key: str) -> str:
    value = dict(info.items()).get(key, "")
    return str(getattr(value, "value", value))
