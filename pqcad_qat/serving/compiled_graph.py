"""OpenVINO's part in the runtime: a graph compiled for a device that is there, and run from any number of threads.

Not here: which graph, and what it is given (runtime.py, part_runtime.py). Needs openvino and numpy.
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

DEFAULT_PROPERTIES: Mapping[str, str] = {"PERFORMANCE_HINT": "LATENCY"}

CHOOSING = ("AUTO", "MULTI", "HETERO", "BATCH")
"""OpenVINO's devices that hand a graph on to others, named after a colon."""

LONGEST_REASON = 400
"""Characters of what OpenVINO says that an error repeats."""


@cache
def shared_core() -> ov.Core:
    """The core by which this process compiles: one for all.

    A core gives its thread a stack for signals, and puts back what was there before when it goes. Where of two cores
    the older goes first, the younger puts back the stack that is gone, and the next signal, Ctrl-C among them, is a
    segmentation fault.
    """
    return ov.Core()


class Requests:
    """A compiled graph's infer requests: as many as threads were ever in a call at a time, so that no call waits for
    another's arrays.

    How many of them compute at a time is the compiled graph's to say. With PERFORMANCE_HINT LATENCY, the default, it
    has one stream, which
    takes every core for one request after the other: threads are served in turn, each as fast as alone. THROUGHPUT has
    several streams of fewer cores each.
    """

    def __init__(self, compiled: ov.CompiledModel) -> None:
        self._compiled = compiled
        self._free: deque[ov.InferRequest] = deque()  # its append and pop are atomic

    def infer(self, inputs: Arrays, outputs: Sequence[str | int]) -> list[npt.NDArray[Any]]:
        """One run of the graph: copies of these of its outputs, by name or number.

        Raises:
            ModelError: OpenVINO cannot run it.
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
            raise ModelError(f"OpenVINO cannot run the graph: {reason(error)}") from error
        finally:
            self._free.append(request)


def compile_graph(
    model: ov.Model, core: ov.Core, device: str = "CPU", properties: Mapping[str, Any] | None = None
) -> ov.CompiledModel:
    """Compile with DEFAULT_PROPERTIES under `properties`; on the CPU of a container that has a share of the cores, for
    as many threads.

    Raises:
        ModelError: a device that is not there, or OpenVINO refuses a property or the graph.
    """
    check_device(core, device)
    on_cpu = device.partition(":")[0] == "AUTO" or "CPU" in device
    share = {"INFERENCE_NUM_THREADS": cores} if on_cpu and (cores := cores_of_share()) is not None else {}
    chosen = {**DEFAULT_PROPERTIES, **share, **(properties or {})}
    try:
        return core.compile_model(model, device, chosen)
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:
        raise ModelError(f"OpenVINO cannot compile for {device} with {chosen}: {reason(error)}") from error


def check_device(core: ov.Core, device: str) -> None:
    """Raise ModelError for a device that this machine does not have."""
    if device == "CPU":
        return
    there = core.available_devices
    known = {*there, *(name.partition(".")[0] for name in there)}
    chooser, colon, rest = device.partition(":") if isinstance(device, str) else ("", "", "")
    named = [name.removeprefix("-").partition("(")[0] for name in rest.split(",")] if colon else []
    alone = chooser == "AUTO" and not colon
    if (chooser in CHOOSING and colon and known.issuperset(named)) or alone or (chooser in known and not colon):
        return
    allowed = [*there, "AUTO", *(f"{name}:{there[0]}" for name in CHOOSING if there)]
    raise ModelError(
        f"device: got {shown(device)}; allowed {', '.join(allowed)}: OpenVINO has "
        f"{', '.join(there) or 'no device'} here"
    )


def executing(compiled: ov.CompiledModel) -> str:
    """OpenVINO's names of the devices that compute."""
    found = _property(compiled, "EXECUTION_DEVICES")
    return ", ".join(map(str, found)) if isinstance(found, list | tuple) else str(found)


def precision(compiled: ov.CompiledModel) -> str:
    """OpenVINO's INFERENCE_PRECISION_HINT in use; where several devices compute, that of each, with commas between
    those that differ.
    """
    own = _property(compiled, "INFERENCE_PRECISION_HINT")
    each = [own] if own is not None else [entry.get("INFERENCE_PRECISION_HINT") for entry in _by_device(compiled)]
    told = [kind.to_string() if isinstance(kind, ov.Type) else str(kind) for kind in each if kind is not None]
    return ", ".join(dict.fromkeys(told)) or "unknown"


def _by_device(compiled: ov.CompiledModel) -> list[Mapping[str, Any]]:
    """The properties of every device that AUTO, MULTI and HETERO have handed the graph on to."""
    found = _property(compiled, "DEVICE_PROPERTIES")
    return [entry for entry in found.values() if isinstance(entry, Mapping)] if isinstance(found, Mapping) else []


def _property(compiled: ov.CompiledModel, name: str) -> Any:
    """None where the device has no such property."""
    try:
        return compiled.get_property(name)
    except (RuntimeError, TypeError):
        return None


def reason(error: Exception) -> str:
    """What OpenVINO says of a fault, in one line: without the places in its source."""
    lines = [line.strip() for line in str(error).splitlines()]
    told = " ".join(line for line in lines if line and not line.startswith("Exception from ")) or "it does not say why"
    printable = told.encode("ascii", "backslashreplace").decode()
    return printable if len(printable) <= LONGEST_REASON else f"{printable[:LONGEST_REASON]} ..."
