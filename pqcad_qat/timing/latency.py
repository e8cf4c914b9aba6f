"""Latency and size of the report's variants: how each is compiled and called.

Not here: the baselines' graphs (float_graph.py, baseline_trials.py), reading them (graph_sources.py), timing in turns
(turns.py), the time of single nodes (node_profile.py), image
quality (quality/fidelity.py), the proof of the export (export/proof.py), and the look of the results (report/).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import openvino as ov
import torch
from torch import Tensor, nn

from pqcad_qat.errors import ModelError
from pqcad_qat.machine.cores import usable_cores
from pqcad_qat.models.denoiser import predict
from pqcad_qat.policy.variants import FLOAT_STEPS, REFERENCE, VARIANTS
from pqcad_qat.report.record import Hardware, Timing
from pqcad_qat.serving.compiled_graph import compile_graph, shared_core
from pqcad_qat.serving.denoiser_graphs import float_graph
from pqcad_qat.serving.deployed_folder import MANIFEST, denoiser_bytes
from pqcad_qat.serving.graph_inputs import port_values
from pqcad_qat.timing.baseline_trials import Inputs
from pqcad_qat.timing.graph_sources import read_source
from pqcad_qat.timing.hardware import hardware
from pqcad_qat.timing.turns import WARM_UP, time_interleaved

F32: Mapping[str, str] = {"INFERENCE_PRECISION_HINT": "f32"}  # without it OpenVINO uses bfloat16 where the CPU has it
"""Property that makes OpenVINO compute in float32."""

BF16: Mapping[str, str] = {"INFERENCE_PRECISION_HINT": "bf16"}
"""Property that makes OpenVINO compute in bfloat16."""

PROFILING: Mapping[str, object] = {"PERF_COUNT": True}
"""Property that makes OpenVINO measure the time of every node."""

PRECISIONS: Mapping[str, Mapping[str, str]] = {
    spec.name: {"INFERENCE_PRECISION_HINT": spec.precision} for spec in VARIANTS.values() if spec.precision
}
"""OpenVINO properties that a variant asks for, by variant; the other variants take OpenVINO's defaults."""


def torch_candidate(model: nn.Module, inputs: Inputs) -> Callable[[], Tensor]:
    """PyTorch's eager execution in evaluation mode, without gradients, on every core."""
    torch.set_num_threads(usable_cores())
    condition = {name: torch.from_numpy(value) for name, value in inputs.items()}
    sample, timestep = condition.pop("sample"), condition.pop("timestep")
    model.eval()

    def call() -> Tensor:
        with torch.no_grad():
            return predict(model, sample, timestep, condition)

    return call


def openvino_candidate(source: Path, config: Mapping[str, object], inputs: Inputs) -> Callable[[], object]:
    """A model from disk, compiled once for latency at the inputs' batch.

    ``config`` (F32, BF16 or {}) adds to the properties for latency and overrides them.

    Raises:
        ModelError: as `read_source`.
    """
    compiled = compile_for_latency(source, config, len(inputs["sample"]))
    request, named = compiled.create_infer_request(), inputs_of(compiled, inputs)
    return lambda: request.infer(named, share_inputs=True)


def inputs_of(compiled: ov.CompiledModel, inputs: Inputs) -> dict[str, np.ndarray]:
    """The inputs in the names and layout of this graph."""
    return port_values([port.get_names() for port in compiled.inputs], inputs)


def compile_for_latency(source: Path, config: Mapping[str, object], batch: int | None = None) -> ov.CompiledModel:
    """Compile what `read_source` reads with the properties for latency."""
    return compile_source(source, latency_properties(config), batch)


def latency_properties(config: Mapping[str, object]) -> dict[str, object]:
    """Properties of every candidate for latency: one stream with as many threads as cores, and ``config``."""
    return {"NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": usable_cores(), **config}


def precision_hint(name: str, machine: Hardware) -> Mapping[str, str]:
    """Precision that a variant asks OpenVINO for here.

    Where bfloat16 is emulated or capped, variants without a precision of their own ask for float32, because OpenVINO's
    default would choose bfloat16.
    """
    return PRECISIONS.get(name, F32 if machine.native_bf16 is False else {})


def native(name: str, machine: Hardware) -> bool:
    """Whether this CPU has the arithmetic that the variant asks OpenVINO for."""
    return machine.native_bf16 is True or PRECISIONS.get(name) != BF16


def ways_of(name: str, machine: Hardware, sampled: bool = False) -> list[dict[str, object]]:
    """The properties with which a baseline's graph is compiled: for timing, and for sampling if it is `sampled` too."""
    hint = precision_hint(name, machine)
    configs: list[Mapping[str, object]] = [{**PROFILING, **hint}]
    # Sampling takes OpenVINO's default precision, unless the variant has one of its own.
    if sampled and hint and name not in PRECISIONS:
        configs.append({})
    return [latency_properties(config) for config in configs]


def compile_source(source: Path, properties: Mapping[str, object], batch: int | None = None) -> ov.CompiledModel:
    """Compile what `read_source` reads.

    Raises:
        ModelError: as `read_source`.
    """
    core = shared_core()
    return compile_graph(read_source(source, core, batch), core, properties=properties)


def size_bytes(path: Path) -> int:
    """Size in bytes of a file or of all files below a folder.

    A deployed folder is counted without the other parts of its pipeline.

    Raises:
        ModelError: there is no such file or folder.
    """
    if not path.exists():
        raise ModelError(f"{path}: got no such file or folder; allowed one that exists, to measure its size")
    if (path / MANIFEST).is_file():
        return denoiser_bytes(path)
    files = [path] if path.is_file() else [entry for entry in path.rglob("*") if entry.is_file()]
    return sum(entry.stat().st_size for entry in files)


def float_graphs(files: Mapping[str, Path]) -> dict[str, Path]:
    """The graph of float steps under the name FLOAT_STEPS; nothing where no timed folder has one.

    All folders of a run have the same one.
    """
    graphs = [float_graph(file) for file in files.values() if (file / MANIFEST).is_file()]
    found = [graph for graph in graphs if graph is not None]
    return {FLOAT_STEPS: found[0]} if found else {}


def time_denoisers(
    denoiser: nn.Module,
    files: Mapping[str, Path],
    inputs: Inputs,
    runs: int,
) -> dict[str, Timing]:
    """Milliseconds of one denoiser call (one sampling step of a batch), with all candidates in turns in this process.

    Args:
        denoiser: full precision, run by PyTorch as the candidate REFERENCE.
        files: what OpenVINO runs, by variant: a graph's xml or a deployed folder. Variants that are not `native` are
            left out. The graph of our folder's float steps is timed too, in float32, as FLOAT_STEPS.
        inputs: inputs of every candidate.
        runs: number of timed calls of each candidate.
    """
    machine = hardware()
    with torch_threads_kept():
        candidates: dict[str, Callable[[], object]] = {REFERENCE: torch_candidate(denoiser, inputs)}
        for name, file in files.items():
            if native(name, machine):
                candidates[name] = openvino_candidate(file, precision_hint(name, machine), inputs)
        for name, file in float_graphs(files).items():
            candidates[name] = openvino_candidate(file, F32, inputs)
        return time_interleaved(candidates, runs, WARM_UP)


@contextmanager
def torch_threads_kept() -> Iterator[None]:
    """Restore PyTorch's number of threads when the context ends; timing uses every core."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
