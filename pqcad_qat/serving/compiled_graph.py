"""OpenVINO's part of the runtime: compiling a graph for an available device, and running it from any number of threads.

Not here: which graph is compiled, and what its inputs are (runtime.py, part_runtime.py). Needs openvino and numpy.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import openvino as ov

from pqcad_qat.errors import ModelError
from pqcad_qat.machine.cores import cores_of_share
from pqcad_qat.machine.json_files import shown

Arrays = Mapping[str, npt.NDArray[Any]]
"""Arrays by name of the graph's input."""

DEFAULT_PROPERTIES: Mapping[str, str] = {"PERFORMANCE_HINT": "LATENCY"}
"""OpenVINO properties that every graph is compiled with, unless the caller sets others."""

CHOOSING = ("AUTO", "MULTI", "HETERO", "BATCH")
"""OpenVINO's devices that pass a graph on to other devices, which follow after a colon."""

LONGEST_REASON = 400
"""Largest number of characters of OpenVINO's message that an error repeats."""


@cache
def shared_core() -> ov.Core:
    """The one OpenVINO core by which this process compiles.

    Why only one: a core gives its thread a stack for signals, and restores the previous stack when it is destroyed. If
    the older of two cores is destroyed first, the younger one later restores a stack that no longer exists. The next
    signal, such as Ctrl-C, is then a segmentation fault.
    """
    return ov.Core()


class Requests:
    """The infer requests of a compiled graph: as many as there were ever calls at the same time.

    Each call uses a request of its own, so no call waits for the arrays of another. How many requests compute at a time
    is decided by the compiled graph. With PERFORMANCE_HINT LATENCY, the default, there is one stream, which uses every
    core: calls run one after the other, each as fast as alone. THROUGHPUT has several streams of fewer cores each.
    """

    def __init__(self, compiled: ov.CompiledModel) -> None:
        self._compiled = compiled
        self._free: deque[ov.InferRequest] = deque()  # append and pop are atomic

    def infer(self, inputs: Arrays, outputs: Sequence[str | int]) -> list[npt.NDArray[Any]]:
        """Run the graph once and return copies of these outputs.

        Args:
            inputs: arrays by name of the input.
            outputs: names or numbers of the outputs.

        Raises:
            ModelError: OpenVINO cannot run the graph.
        """
        try:
            request = self._free.pop()
        except IndexError:
            request = self._compiled.create_infer_request()
        try:
            request.infer({name: np.ascontiguousarray(value) for name, value in inputs.items()}, share_inputs=True)
            return [
                np.array((request.get_output_tensor if isinstance(key, int) else request.get_tensor)(key).data)
                for key in outputs
            ]
        except (RuntimeError, ValueError, TypeError) as error:
            raise ModelError(
                f"OpenVINO cannot run the graph: got {reason(error)}; allowed inputs and outputs of the graph"
            ) from error
        finally:
            self._free.append(request)


def compile_graph(
    model: ov.Model, core: ov.Core, device: str = "CPU", properties: Mapping[str, Any] | None = None
) -> ov.CompiledModel:
    """Compile a graph with DEFAULT_PROPERTIES, overridden by `properties`.

    In a container limited to a share of the CPU's cores, the graph is compiled for that many threads.

    Raises:
        ModelError: the device does not exist, or OpenVINO refuses a property or the graph.
    """
    check_device(core, device)
    on_cpu = device.partition(":")[0] == "AUTO" or "CPU" in device
    share = {"INFERENCE_NUM_THREADS": cores} if on_cpu and (cores := cores_of_share()) is not None else {}
    chosen = {**DEFAULT_PROPERTIES, **share, **(properties or {})}
    try:
        return core.compile_model(model, device, chosen)
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:
        raise ModelError(
            f"OpenVINO cannot compile for {device}: got {chosen}: {reason(error)}; "
            f"allowed a graph and properties that {device} supports"
        ) from error


def check_device(core: ov.Core, device: str) -> None:
    """Raise ModelError for a device that OpenVINO does not have here."""
    if device == "CPU":
        return
    available = core.available_devices
    known = {*available, *(name.partition(".")[0] for name in available)}
    chooser, colon, rest = device.partition(":") if isinstance(device, str) else ("", "", "")
    named = [name.removeprefix("-").partition("(")[0] for name in rest.split(",")] if colon else []
    alone = chooser == "AUTO" and not colon
    if (chooser in CHOOSING and colon and known.issuperset(named)) or alone or (chooser in known and not colon):
        return
    allowed = [*available, "AUTO", *(f"{name}:{available[0]}" for name in CHOOSING if available)]
    raise ModelError(
        f"device: got {shown(device)}; allowed {', '.join(allowed)}: OpenVINO has "
        f"{', '.join(available) or 'no device'} here"
    )


def execution_devices(compiled: ov.CompiledModel) -> str:
    """OpenVINO's names of the devices that compute, separated by commas."""
    devices = _property(compiled, "EXECUTION_DEVICES")
    return ", ".join(map(str, devices)) if isinstance(devices, list | tuple) else str(devices)


def inference_precision(compiled: ov.CompiledModel) -> str:
    """OpenVINO's INFERENCE_PRECISION_HINT in use; where devices differ, each value once, separated by commas."""
    key = "INFERENCE_PRECISION_HINT"
    hint = _property(compiled, key)
    hints = [entry.get(key) for entry in _by_device(compiled)] if hint is None else [hint]
    names = [hint.to_string() if isinstance(hint, ov.Type) else str(hint) for hint in hints if hint is not None]
    return ", ".join(dict.fromkeys(names)) or "unknown"


def _by_device(compiled: ov.CompiledModel) -> list[Mapping[str, Any]]:
    """The properties of every device to which AUTO, MULTI or HETERO has passed the graph on."""
    by_device = _property(compiled, "DEVICE_PROPERTIES")
    entries = by_device.values() if isinstance(by_device, Mapping) else ()
    return [entry for entry in entries if isinstance(entry, Mapping)]


def _property(compiled: ov.CompiledModel, name: str) -> Any:
    """The value of a property; None where the device does not have it."""
    try:
        return compiled.get_property(name)
    except (RuntimeError, TypeError):
        return None


def reason(error: Exception) -> str:
    """OpenVINO's explanation of an error in one line, without the places in its source code."""
    lines = [line.strip() for line in str(error).splitlines()]
    text = " ".join(line for line in lines if line and not line.startswith("Exception from ")) or "it does not say why"
    printable = text.encode("ascii", "backslashreplace").decode()
    return printable if len(printable) <= LONGEST_REASON else f"{printable[:LONGEST_REASON]} ..."
