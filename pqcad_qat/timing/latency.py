"""Latency and size of the report's variants, and their causes: interleaved timing, and profiles of time and bytes.

Not here: NNCF's baseline (baseline_trials.py), image quality (fidelity.py), the proof of the export (export/proof.py),
and the look of the results (report_files.py).
"""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import openvino as ov
import torch
from torch import Tensor, nn

from pqcad_qat.errors import ModelError
from pqcad_qat.export.time_tables import Times, timestep_tables
from pqcad_qat.export.traceable_modules import TracedDenoiser, fixed_rotations, swapped
from pqcad_qat.machine.cores import usable_cores
from pqcad_qat.models.denoiser import Condition, predict
from pqcad_qat.models.families.family import TEXT
from pqcad_qat.models.families.latent_rows import PLACES
from pqcad_qat.policy.variants import REFERENCE, VARIANTS
from pqcad_qat.report.record import Hardware, ProfileRow, Timing
from pqcad_qat.serving.compiled_graph import compile_graph, shared_core
from pqcad_qat.serving.deployed_folder import MANIFEST, denoiser_bytes, read_graph
from pqcad_qat.serving.graph_inputs import spelled
from pqcad_qat.timing.baseline_trials import Inputs, save_openvino
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
        raise ValueError(f"runs must be at least 1 and warmup at least 0; got {runs} and {warmup}")
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


def example_inputs(
    sample_shape: tuple[int, int, int],
    batch: int,
    seed: int = 0,
    condition: Condition | None = None,
    *,
    timestep_dtype: Literal["int64", "float32"] = "int64",
) -> dict[str, np.ndarray]:
    """Seeded example inputs under the exported models' names.

    They are Gaussian noise `sample`, (B, C, H, W) float32, the time step 500 as `timestep`, (B,), and `condition`, (B,
    ...) by name, where the model takes one.
    """
    noise = np.random.default_rng(seed).standard_normal((batch, *sample_shape), dtype=np.float32)
    return {
        "sample": noise,
        "timestep": np.full(batch, 500, timestep_dtype),
        **{n: v.numpy() for n, v in (condition or {}).items()},
    }


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
    return spelled([port.get_names() for port in compiled.inputs], inputs)


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
    configs = [{**PROFILING, **hint}] + [{}] * (sampled and hint != {} and name not in PRECISIONS)
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
    elif not source.is_file():
        raise ModelError(f"{source}: got no such file; allowed an OpenVINO model's xml or a deployed folder")
    else:
        try:
            model = core.read_model(source)
        except RuntimeError as error:
            raise ModelError(f"{source}: OpenVINO cannot read it: {error}") from None
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


def convert_float(
    model: nn.Module,
    sample_shape: tuple[int, int, int],
    batch: int,
    folder: Path | None = None,
    *,
    times: Times | None = None,
    condition: Condition | None = None,
) -> ov.Model:
    """Convert a float denoiser to an OpenVINO model of static shape, with the export's port names.

    The inputs are sample, timestep and the conditions; the output is out_sample. The denoiser is left unchanged.

    Args:
        model: the denoiser in full precision.
        sample_shape: shape (C, H, W) of one sample.
        batch: fixed batch.
        folder: where the graph is saved as openvino_model.xml, its constants in float32; OpenVINO's default would round
            them to float16. None saves nothing.
        times: times of a table that replaces the time embedding, as in our own export. BF16 rounds time step 999 to
            1000, which would spoil a baseline's images for a reason unrelated to its quantization. None keeps the
            embedding.
        condition: example conditions by name.
    """
    dtype: Literal["int64", "float32"] = "float32" if isinstance(times, Tensor) else "int64"
    inputs = example_inputs(sample_shape, batch, condition=condition, timestep_dtype=dtype)
    example = (torch.from_numpy(inputs["sample"]), torch.from_numpy(inputs["timestep"]), *(condition or {}).values())
    replacements = {} if times is None else timestep_tables(model, times, {})
    replacements |= fixed_rotations(
        model, sample_shape, condition[TEXT].shape[1] if condition and TEXT in condition else None
    )
    training = model.training
    denoiser = TracedDenoiser(model.eval(), tuple(condition or {}))
    with swapped(model, replacements), torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*trace")  # shapes are static on purpose
        traced = torch.jit.trace(denoiser, example, check_trace=False, strict=False)  # type: ignore[no-untyped-call]
        converted = ov.convert_model(traced, example_input=example, input=[list(tensor.shape) for tensor in example])
    model.train(training)
    for port, name in zip((*converted.inputs, converted.output(0)), (*inputs, "out_sample"), strict=True):
        port.get_tensor().set_names({name})
    if folder is not None:
        save_openvino(converted, folder)
    return converted


def size_bytes(path: Path) -> int:
    """Size in bytes of a file or of all files below a folder.

    A deployed folder is counted without the other parts of its pipeline.

    Raises:
        ModelError: there is no such file or folder.
    """
    if not path.exists():
        raise ModelError(f"{path}: no such file or folder to measure")
    if (path / MANIFEST).is_file():
        return denoiser_bytes(path)
    files = [path] if path.is_file() else [entry for entry in path.rglob("*") if entry.is_file()]
    return sum(entry.stat().st_size for entry in files)


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
    found: dict[tuple[str, str], list[float]] = {}
    for node in compiled.get_runtime_model().get_ops():
        info = node.get_rt_info()
        kind, precision, spent = (_text(info, key) for key in ("layerType", "runtimePrecision", "execTimeMcs"))
        if spent.isdigit() and int(spent) > 0:
            found.setdefault((kind, precision), []).append(int(spent) / 1e3)
    rows = (ProfileRow(kind, precision, sum(times), len(times)) for (kind, precision), times in found.items())
    return tuple(sorted(rows, key=lambda row: -row.milliseconds))


def _text(info: Mapping[str, object], key: str) -> str:
    value = dict(info.items()).get(key, "")
    return str(getattr(value, "value", value))


def time_denoisers(denoiser: nn.Module, files: Mapping[str, Path], inputs: Inputs, runs: int) -> dict[str, Timing]:
    """Milliseconds of one denoiser call (one sampling step of a batch), with all candidates in turns in this process.

    Args:
        denoiser: full precision, run by PyTorch as the candidate REFERENCE.
        files: what OpenVINO runs, by variant: a graph's xml or a deployed folder. Variants that are not `native` are
            left out.
        inputs: inputs of every candidate.
        runs: number of timed calls of each candidate.
    """
    machine = hardware()
    with torch_threads_kept():
        found: dict[str, Callable[[], object]] = {REFERENCE: torch_candidate(denoiser, inputs)}
        for name, file in files.items():
            if native(name, machine):
                found[name] = openvino_candidate(file, precision_hint(name, machine), inputs)
        return time_interleaved(found, runs, WARM_UP)


@contextmanager
def torch_threads_kept() -> Iterator[None]:
    """Restore PyTorch's number of threads when the context ends; timing uses every core."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
