"""Latency and size of the report's variants: how each is compiled and called, and timing in turns.

Not here: the baselines' graphs (float_graph.py, baseline_trials.py), the time of single nodes (node_profile.py), image
quality (quality/fidelity.py), the proof of the export (export/proof.py), and the look of the results (report/).
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import openvino as ov
import torch
from torch import Tensor, nn

from pqcad_qat.errors import ModelError
from pqcad_qat.machine.cores import usable_cores
from pqcad_qat.models.denoiser import predict
from pqcad_qat.models.families.latent_rows import PLACES
from pqcad_qat.policy.variants import FLOAT_STEPS, REFERENCE, VARIANTS
from pqcad_qat.report.record import Hardware, Timing
from pqcad_qat.serving.compiled_graph import compile_graph, reason, shared_core
from pqcad_qat.serving.denoiser_graphs import float_graph, read_float_graph, read_graph
from pqcad_qat.serving.deployed_folder import MANIFEST, denoiser_bytes
from pqcad_qat.serving.graph_inputs import port_values
from pqcad_qat.serving.manifest import FLOAT_GRAPH
from pqcad_qat.timing.baseline_trials import Inputs
from pqcad_qat.timing.hardware import hardware

F32: Mapping[str, str] = {"INFERENCE_PRECISION_HINT": "f32"}  # without it OpenVINO uses bfloat16 where the CPU has it
"""Property that makes OpenVINO compute in float32."""

BF16: Mapping[str, str] = {"INFERENCE_PRECISION_HINT": "bf16"}
"""Property that makes OpenVINO compute in bfloat16."""

WARM_UP = 3
"""Number of untimed calls of each candidate before the first timed one."""

PROFILING: Mapping[str, object] = {"PERF_COUNT": True}
"""Property that makes OpenVINO measure the time of every node."""

PRECISIONS: Mapping[str, Mapping[str, str]] = {
    spec.name: {"INFERENCE_PRECISION_HINT": spec.precision} for spec in VARIANTS.values() if spec.precision
}
"""OpenVINO properties that a variant asks for, by variant; the other variants take OpenVINO's defaults."""

REST_S = 0.02
"""Rest before each timed call, in seconds.

Why: after a call, torch's OpenMP worker keeps spinning for 4 ms and OpenVINO's TBB worker for 1 ms, measured as
processor time that is spent while the main thread sleeps. That is longer than a whole INT8 sampling step. The workers
count their spins, so a CPU with a slower pause instruction takes about three times as long.
"""


class FixedBatchError(ModelError):
    """A graph does not take the batch, because sizes that follow from its own batch are constants in it."""


def time_interleaved(candidates: Mapping[str, Callable[[], object]], runs: int, warmup: int) -> dict[str, Timing]:
    """Time every candidate ``runs`` times, in turns, so that a slow minute of the machine affects all of them alike.

    The order rotates from round to round, and runs backwards in every second rotation. Before each timed call come a
    rest of REST_S and an untimed call of the same candidate. During the rest the threads of the previous candidate fall
    asleep. The untimed call fills the caches with the candidate's weights, as they are filled inside a sampler.

    Raises:
        ValueError: runs < 1 or warmup < 0.
    """
    if runs < 1 or warmup < 0:
        raise ValueError(f"runs, warmup: got {runs} and {warmup}; allowed at least 1 and at least 0")
    for call in candidates.values():
        for _ in range(warmup):
            call()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for turn in range(runs):
            for name in turn_order(tuple(candidates), turn):
                seconds[name].append(_time_settled(candidates[name]))
    finally:
        if collecting:
            gc.enable()
    return {name: timing(values) for name, values in seconds.items()}


def turn_order(names: Sequence[str], turn: int) -> tuple[str, ...]:
    """The order of one round: rotated by one in each round.

    After each full rotation the direction is reversed, so that neighbours change sides.
    """
    lap, shift = divmod(turn, max(1, len(names)))
    order = (*names[shift:], *names[:shift])
    return order[::-1] if lap % 2 else order


def timing(seconds: Sequence[float]) -> Timing:
    """Median, minimum and quartiles (linear interpolation) of repeated runs in milliseconds, from their `seconds`."""
    lower, median, upper = (float(q) * 1e3 for q in np.percentile(seconds, (25, 50, 75)))
    return Timing(median, min(seconds) * 1e3, lower, upper, len(seconds))


def _time_settled(call: Callable[[], object]) -> float:
    """Seconds of one call, after a rest and an untimed call."""
    time.sleep(REST_S)
    call()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


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


def read_source(source: Path, core: ov.Core, batch: int | None = None) -> ov.Model:
    """Read a graph's xml, or a deployed folder with its weights unpacked as our runtime does.

    ``batch`` replaces the graph's own batch; None keeps it.

    Raises:
        ModelError: ``source`` is neither, or cannot be read.
        FixedBatchError: its graph does not take that batch.
    """
    if (source / MANIFEST).is_file():
        model = read_graph(source, core)
    elif source.name == FLOAT_GRAPH:
        model = read_float_graph(source.parent.parent, core)
    elif not source.is_file():
        raise ModelError(f"{source}: got no such file; allowed an OpenVINO model's xml or a deployed folder")
    else:
        try:
            model = core.read_model(source)
        except RuntimeError as error:
            raise ModelError(
                f"{source}: got a file that OpenVINO cannot read: {reason(error)}; "
                "allowed an OpenVINO model's xml or a deployed folder"
            ) from None
    if batch is not None:
        _set_batch(model, batch, source)
    return model


def _set_batch(model: ov.Model, batch: int, source: Path) -> None:
    """Give the graph's inputs this batch, where theirs is another; positions of rows have no batch.

    Raises:
        FixedBatchError: the graph does not take that batch.
    """
    shapes = {port: list(port.shape) for port in model.inputs if port.get_any_name() not in PLACES}
    if fixed := {shape[0] for shape in shapes.values()} - {batch}:
        try:
            model.reshape({port: [batch, *shape[1:]] for port, shape in shapes.items()})
        except RuntimeError:
            raise FixedBatchError(
                f"{source}: got a batch of {batch}; allowed {fixed.pop()}, which is fixed in its graph"
            ) from None


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
