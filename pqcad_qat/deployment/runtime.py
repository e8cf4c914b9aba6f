"""Run a deployed folder: one compiled model, which stands where a diffusers UNet2DModel would.

Not here: its files (folder.py), how it is made (export.py) or proved (verification.py). Needs openvino and numpy; torch only if the caller
has it.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Self, overload

import numpy as np
import numpy.typing as npt
import openvino as ov

from pqcad_qat.cores import cores_of_share
from pqcad_qat.deployment.folder import DENOISERS, MANIFEST, SCHEDULER_CONFIG, copy_folder, denoiser_config, read_graph, read_manifest
from pqcad_qat.deployment.graph_inputs import SAMPLE, TIME, prediction, spelled
from pqcad_qat.deployment.packing import WeightFormat
from pqcad_qat.errors import ModelError

Float32 = npt.NDArray[np.float32]

CAPS_WITHOUT_VNNI = ("SSE41", "AVX", "AVX2", "AVX512_CORE")
"""Values of ONEDNN_MAX_CPU_ISA, which keeps oneDNN, and so OpenVINO, to the instructions of an older CPU."""

DEFAULT_PROPERTIES: Mapping[str, str] = {"PERFORMANCE_HINT": "LATENCY"}


class UNetConfig(dict[str, Any]):
    """A UNet's config.json, read as attributes too, the way diffusers' pipelines read it."""

    def __getattr__(self, key: str) -> Any:
        try:
            return self[key]
        except KeyError:
            raise AttributeError(f"the UNet's config has no {key!r}") from None


@dataclass(frozen=True)
class UNetOutput:
    """What a call returns, by attribute, key or place as of diffusers.

    Attributes:
        sample: (B, C, H, W), of the kind (torch or numpy) that was passed in.
    """

    sample: Any

    def __getitem__(self, key: str | int) -> Any:
        return {"sample": self.sample, 0: self.sample}[key]

    def to_tuple(self) -> tuple[Any]:
        return (self.sample,)


class ModelMixin:
    """A part of a pipeline that can be loaded: diffusers asks the module that model_index.json names for a base class of this name."""


class OVUNet2DModel(ModelMixin):
    """A deployed denoiser, compiled: called with numpy arrays or torch tensors, it answers in kind.

    It stands in for the `unet` of a diffusers pipeline or loop, with any scheduler whose time steps are whole numbers. Where this module
    is imported, ``DDIMPipeline.from_pretrained(folder)`` makes one by itself.
    The graph has a fixed batch. A larger one is run in pieces and the last piece filled up with copies of its last sample, which are
    cut off again: any batch works, and a multiple of `batch_size` wastes nothing.

    Attributes:
        folder: where it was loaded from.
        config: the UNet's config.json, by key or attribute.
        scheduler_config: diffusers' config of the scheduler it is for.
        manifest: what the folder says of itself.
        sample_shape: (C, H, W) that the graph takes.
        batch_size: samples a run of the graph.
        conditions: what it takes beside sample and timestep, in order: {name, shape of one sample's, dtype, bound}.
        inference_precision: OpenVINO's INFERENCE_PRECISION_HINT in use: what the layers outside the plan compute in.
        training: False; it only predicts.
    """

    training = False

    def __init__(self, folder: Path, device: str = "CPU", properties: Mapping[str, Any] | None = None) -> None:
        self.folder = folder
        self.manifest = read_manifest(folder)
        self.config = UNetConfig(denoiser_config(folder))
        self.scheduler_config: dict[str, Any] = json.loads((folder / SCHEDULER_CONFIG).read_text(encoding="utf-8"))
        channels, height, width = self.manifest["sample_shape"]
        self.sample_shape: tuple[int, int, int] = (channels, height, width)
        self.batch_size: int = self.manifest["batch_size"]
        self._train_timesteps: int = self.manifest["train_timesteps"]
        self._timestep_dtype: str = self.manifest.get("timestep_dtype", "int64")
        self.conditions: tuple[dict[str, Any], ...] = tuple(self.manifest.get("conditions", ()))
        _warn_without_vnni(self.manifest, folder)
        graph = read_graph(folder, core := ov.Core())
        self._ports = [port.get_names() for port in graph.inputs]
        self.compiled = compile_graph(graph, core, device, properties)
        self.inference_precision: str = self.compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        self._request = self.compiled.create_infer_request()

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str = "CPU", properties: Mapping[str, Any] | None = None) -> Self:
        """Load a deployed folder.

        Args:
            folder: what export_model or save_pretrained wrote: the one with manifest.json in it, or the denoiser's folder in it.
            device: OpenVINO's name of the device.
            properties: OpenVINO properties over DEFAULT_PROPERTIES, such as ``{"INFERENCE_PRECISION_HINT": "f32"}``.

        Raises:
            ModelError: not such a folder, a damaged one, or properties that OpenVINO refuses.
        """
        path = Path(folder)
        inside = path.name in DENOISERS and not (path / MANIFEST).is_file()  # what diffusers' pipelines hand over
        return cls(path.parent if inside else path, device, properties)

    def save_pretrained(self, folder: str | Path, weights: WeightFormat | None = None) -> None:
        """Write the whole deployed folder again: the same files, byte for byte; or its weights in another format, with the same execution.

        Args:
            folder: where to; an older deployed folder there is replaced, anything else refused.
            weights: int8 for plain OpenVINO; int4 or packed for the smallest files; by default as loaded.

        Raises:
            ModelError: the folder it was loaded from is gone or changed, or there is no such format.
            ExportError: the target holds something else.
        """
        copy_folder(self.folder, Path(folder), weights)

    @property
    def dtype(self) -> Any:
        """float32 as the caller's framework spells it: torch's where torch is installed, numpy's elsewhere."""
        if find_spec("torch") is None:
            return np.dtype(np.float32)
        import torch

        return torch.float32

    @property
    def device(self) -> Any:
        """Where inputs are expected: host memory."""
        if find_spec("torch") is None:
            return "cpu"
        import torch

        return torch.device("cpu")

    def to(self, *places: Any, device: Any = None, dtype: Any = None) -> Self:
        """Itself, where that changes nothing: host memory and float32, in which it takes and gives samples.

        Raises:
            ModelError: another device or dtype, which the compiled graph cannot take.
        """
        for place in (*places, device, dtype):
            if place is not None and str(place).removeprefix("torch.") not in ("cpu", "float32"):
                raise ModelError(f"{self.folder}: cannot go to {place}: it runs on {self.compiled_for} from cpu memory, samples in float32")
        return self

    @property
    def compiled_for(self) -> str:
        """OpenVINO's name of the device that computes."""
        return ", ".join(self.compiled.get_property("EXECUTION_DEVICES"))

    def eval(self) -> Self:
        """Itself: it is always in evaluation mode."""
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Itself.

        Raises:
            ModelError: gradients are asked for.
        """
        if requires_grad:
            raise ModelError(f"{self.folder}: a deployed model has no gradients; train the quantized student instead")
        return self

    @overload
    def __call__(
        self, sample: Any, timestep: Any, class_labels: Any = None, return_dict: Literal[True] = True, **conditions: Any
    ) -> UNetOutput: ...

    @overload
    def __call__(
        self, sample: Any, timestep: Any, class_labels: Any = None, *, return_dict: Literal[False], **conditions: Any
    ) -> tuple[Any]: ...

    def __call__(
        self, sample: Any, timestep: Any, class_labels: Any = None, return_dict: bool = True, **conditions: Any
    ) -> UNetOutput | tuple[Any]:
        """Predict as the diffusers model does, with its own keyword arguments.

        Args:
            sample: (B, C, H, W), numpy array or torch tensor.
            timestep: a number, or an array or tensor of shape (), (1,) or (B,); floats too, if they are whole numbers.
            class_labels: of a model without labels the first condition, as of diffusers' third argument: encoder_hidden_states.
            return_dict: False returns a tuple of one.
            conditions: by diffusers' names, dicts such as added_cond_kwargs among them: (B, ...), or (1, ...) for all samples.

        Raises:
            ModelError: a shape that the graph does not take, other conditions, or a time step that is no whole number in [0, T).
        """
        names = [condition["name"] for condition in self.conditions]
        third = "class_labels" if "class_labels" in names or not names else names[0]
        given = {name: as_array(value) for name, value in flattened({**conditions, third: conditions.get(third, class_labels)}).items()}
        if isinstance(sample, np.ndarray):
            prediction: Any = self.predict(sample, timestep, given)
        else:
            import torch

            times = timestep.detach().cpu().double().numpy() if isinstance(timestep, torch.Tensor) else timestep
            prediction = torch.from_numpy(self.predict(sample.detach().cpu().float().numpy(), times, given)).to(sample)
        return UNetOutput(prediction) if return_dict else (prediction,)

    forward = __call__

    def predict(
        self, sample: npt.NDArray[Any], timestep: npt.ArrayLike, condition: Mapping[str, npt.NDArray[Any]] | None = None
    ) -> Float32:
        """The same on numpy arrays alone: (B, C, H, W), time steps () or (1,) or (B,), conditions by name -> (B, C, H, W) float32."""
        if sample.ndim != 4 or sample.shape[1:] != self.sample_shape or not len(sample):
            raise ModelError(f"{self.folder}: samples must have shape (B, {', '.join(map(str, self.sample_shape))}), got {sample.shape}")
        whole = [sample, self._timesteps(np.asarray(timestep), len(sample)), *self._conditions(condition or {}, len(sample))]
        pieces = [self._run([part[start : start + self.batch_size] for part in whole]) for start in range(0, len(sample), self.batch_size)]
        return np.concatenate(pieces)

    def _conditions(self, given: Mapping[str, npt.NDArray[Any]], count: int) -> list[npt.NDArray[Any]]:
        """The graph's conditions in its order, for `count` samples."""
        wanted = {condition["name"]: condition for condition in self.conditions}
        if given.keys() != wanted.keys():
            raise ModelError(f"{self.folder}: takes the conditions {', '.join(wanted) or 'none'}; got {', '.join(given) or 'none'}")
        return [self._condition(condition, given[name], count) for name, condition in wanted.items()]

    def _condition(self, wanted: Mapping[str, Any], value: npt.NDArray[Any], count: int) -> npt.NDArray[Any]:
        name, shape, bound = wanted["name"], tuple(wanted["shape"]), wanted["bound"]
        if value.shape not in ((count, *shape), (1, *shape)):
            raise ModelError(f"{self.folder}: {name} must have shape {(count, *shape)}, got {value.shape}")
        cast: npt.NDArray[Any] = value.astype(wanted["dtype"])
        if bound is not None and ((cast != value).any() or cast.min() < 0 or cast.max() >= bound):
            raise ModelError(f"{self.folder}: {name} must be whole numbers in [0, {bound}), got {value}")
        return np.broadcast_to(cast, (count, *shape))

    def _timesteps(self, timestep: npt.NDArray[Any], count: int) -> npt.NDArray[Any]:
        if timestep.shape not in ((), (1,), (count,)):
            raise ModelError(f"{self.folder}: time steps must have shape (), (1,) or ({count},), got {timestep.shape}")
        if self._timestep_dtype == "float32":
            if not ((timestep >= 0) & (timestep <= self._train_timesteps)).all():
                raise ModelError(f"{self.folder}: times must lie in [0, {self._train_timesteps}], got {timestep}")
            return np.broadcast_to(timestep.astype(np.float32), (count,))
        whole = np.rint(timestep).astype(np.int64)
        if (whole != timestep).any() or whole.min() < 0 or whole.max() >= self._train_timesteps:
            raise ModelError(
                f"{self.folder}: time steps must be whole numbers in [0, {self._train_timesteps}), got {timestep}; schedulers lay whole "
                "ones with timestep_spacing leading or trailing, and without Karras, exponential or beta sigmas"
            )
        return np.broadcast_to(whole, (count,))

    def _run(self, parts: Sequence[npt.NDArray[Any]]) -> Float32:
        """One run of the graph on up to batch_size samples: their states, time steps and conditions."""
        missing = self.batch_size - len(parts[0])
        if missing:
            parts = [np.concatenate([part, np.repeat(part[-1:], missing, 0)]) for part in parts]
        names = (SAMPLE, TIME, *(condition["name"] for condition in self.conditions))
        inputs = spelled(self._ports, dict(zip(names, (np.asarray(parts[0], np.float32), *parts[1:]), strict=True)))
        self._request.infer({name: np.ascontiguousarray(value) for name, value in inputs.items()}, share_inputs=True)
        found = np.array(self._request.get_output_tensor(0).data[: self.batch_size - missing])
        return prediction(found, *self.sample_shape[1:])


def flattened(conditions: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of a diffusers model as conditions by name: dicts among them opened, None and empty ones left out."""
    found: dict[str, Any] = {}
    for name, value in conditions.items():
        found |= flattened(value) if isinstance(value, Mapping) else {} if value is None else {name: value}
    return found


def as_array(value: Any) -> npt.NDArray[Any]:
    """A number, numpy array or torch tensor as a numpy array."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.float() if value.is_floating_point() else value
    return np.asarray(value)


def has_vnni(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool | None:
    """Whether OpenVINO may use VNNI in this process: the CPU has it and ONEDNN_MAX_CPU_ISA allows it; None where neither is known."""
    cap = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    if cap in CAPS_WITHOUT_VNNI:
        return False
    if not cpuinfo.is_file():
        return None
    flags = set(cpuinfo.read_text(encoding="utf-8", errors="replace").split())
    return "avx_vnni" in flags or ("avx512_vnni" in flags and not cap.startswith("AVX2"))


def _warn_without_vnni(manifest: Mapping[str, Any], folder: Path) -> None:
    needing = [name for name, layer in manifest["layers"].items() if layer.get("needs_vnni")]
    if needing and has_vnni() is False:
        warnings.warn(
            f"{folder}: this CPU has no VNNI, without which the integer sums of {len(needing)} layers may overflow, as of {needing[0]}: "
            "predictions may be wrong; weights of 7 bits and fewer are exact on every CPU",
            stacklevel=3,
        )


def compile_graph(model: ov.Model, core: ov.Core, device: str = "CPU", properties: Mapping[str, Any] | None = None) -> ov.CompiledModel:
    """Compile with DEFAULT_PROPERTIES under `properties`; on the CPU of a container that has a share of the cores, for as many threads.

    Raises:
        ModelError: OpenVINO refuses the device or a property.
    """
    share = {"INFERENCE_NUM_THREADS": cores} if device == "CPU" and (cores := cores_of_share()) is not None else {}
    chosen = {**DEFAULT_PROPERTIES, **share, **(properties or {})}
    try:
        return core.compile_model(model, device, chosen)
    except (RuntimeError, TypeError) as error:
        raise ModelError(f"OpenVINO cannot compile for {device} with {chosen}: {error}") from error
