"""Load and run a deployed folder: digests checked, packed weights unpacked, one compiled model, the call of a diffusers UNet.

Not here: how the folder is made (export.py) or proved (verification.py). Needs openvino and numpy; torch only if the caller has it.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import numpy.typing as npt
import openvino as ov

from pqcad_qat.errors import ModelError

WeightFormat = Literal["int8", "int4"]
Float32 = npt.NDArray[np.float32]

MANIFEST = "manifest.json"
GRAPH = "unet/openvino_model.xml"
PACKED_GRAPH = "unet/openvino_model.xml.gz"
WEIGHTS = "unet/openvino_model.bin"
UNET_CONFIG = "unet/config.json"
SCHEDULER_CONFIG = "scheduler/scheduler_config.json"
SCHEMA_VERSION = 1

MANIFEST_KEYS = ("graph", "files", "sample_shape", "batch_size", "train_timesteps", "layers")

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
    """What a call returns: `sample` (B, C, H, W), of the kind (torch or numpy) that was passed in."""

    sample: Any


def sha256(path: Path) -> str:
    """Digest of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a deployed folder, after checking that every file it lists is there and unchanged.

    Raises:
        ModelError: no such folder, no manifest, one that cannot be read, a missing file, or a digest that differs.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ModelError(f"{folder}: not a deployed folder: it has no {MANIFEST}")
    try:
        manifest: dict[str, Any] = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ModelError(f"{path}: cannot be read as a manifest: {error}") from error
    if (version := manifest.get("schema_version")) != SCHEMA_VERSION:
        raise ModelError(f"{path}: schema_version must be {SCHEMA_VERSION}, got {version!r}")
    if missing := [key for key in MANIFEST_KEYS if key not in manifest]:
        raise ModelError(f"{path}: has no {', '.join(missing)}")
    _check_files(folder, manifest["graph"], manifest["files"])
    return manifest


def _check_files(folder: Path, graph: str, files: Mapping[str, Mapping[str, Any]]) -> None:
    if graph not in (GRAPH, PACKED_GRAPH):
        raise ModelError(f"{folder / MANIFEST}: graph must be {GRAPH} or {PACKED_GRAPH}, got {graph!r}")
    for required in (graph, WEIGHTS, UNET_CONFIG, SCHEDULER_CONFIG):
        if required not in files:
            raise ModelError(f"{folder / MANIFEST}: lists no {required}")
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            raise ModelError(f"{folder}: the manifest lists {name}, which is missing")
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise ModelError(f"{path}: damaged: the manifest says {entry['bytes']} bytes, got {size}")
        if (digest := sha256(path)) != entry["sha256"]:
            raise ModelError(f"{path}: damaged or changed: the manifest says sha256 {entry['sha256']}, got {digest}")


def read_graph(folder: Path, core: ov.Core) -> ov.Model:
    """The shipped graph with every packed weight unpacked to int8: the same graph, bit for bit, whatever the weights' format on disk.

    Raises:
        ModelError: OpenVINO cannot read the file.
    """
    try:
        if (folder / GRAPH).is_file():
            model = core.read_model(folder / GRAPH)
        else:
            model = core.read_model(gzip.decompress((folder / PACKED_GRAPH).read_bytes()), (folder / WEIGHTS).read_bytes())
    except (RuntimeError, OSError) as error:
        raise ModelError(f"{folder / 'unet'}: OpenVINO cannot read the graph there: {error}") from error
    for node in model.get_ordered_ops():
        if node.get_type_name() == "Constant" and node.get_element_type() == ov.Type.i4:
            _unpack(node)
    return model


def _unpack(constant: ov.Node) -> None:
    """Put an int8 constant with the same values and name in the place of an int4 one."""
    shape = tuple(constant.output(0).shape)
    unpacked = ov.op.Constant(ov.Tensor(unpack_int4(np.asarray(constant.data), shape)))
    unpacked.set_friendly_name(constant.get_friendly_name())
    for consumer in constant.output(0).get_target_inputs():
        consumer.replace_source_output(unpacked.output(0))


def pack_int4(values: npt.NDArray[np.int8]) -> npt.NDArray[np.uint8]:
    """Signed 4-bit values, two a byte, the first in the low half: OpenVINO's own layout of int4.

    Raises:
        ValueError: a value outside [-8, 7].
    """
    if values.size and (values.min() < -8 or values.max() > 7):
        raise ValueError(f"int4 holds [-8, 7], got [{values.min()}, {values.max()}]")
    nibbles = np.zeros(values.size + values.size % 2, np.uint8)
    nibbles[: values.size] = values.reshape(-1).view(np.uint8) & 0x0F
    low, high = nibbles[0::2], nibbles[1::2]
    return np.asarray(low | (high << 4), np.uint8)


def unpack_int4(packed: npt.NDArray[np.uint8], shape: tuple[int, ...]) -> npt.NDArray[np.int8]:
    """The inverse of pack_int4."""
    packed = packed.reshape(-1).view(np.uint8)
    nibbles = np.empty(2 * packed.size, np.uint8)
    nibbles[0::2], nibbles[1::2] = packed & 0x0F, packed >> 4
    signed = (nibbles ^ 0x08).view(np.int8) - np.int8(8)  # sign extension
    return signed[: int(np.prod(shape))].reshape(shape)


class OVUNet2DModel:
    """A deployed denoiser, compiled: called with numpy arrays or torch tensors, it answers in kind.

    It stands in for the `unet` of a diffusers pipeline:
    ``DDIMPipeline.from_pretrained(folder, unet=OVUNet2DModel.from_pretrained(folder))``.
    The graph has a fixed batch. A larger one is run in pieces and the last piece filled up with copies of its last sample, which are
    cut off again: any batch works, and a multiple of `batch_size` wastes nothing.

    Attributes:
        config: the UNet's config.json, by key or attribute.
        manifest: what the folder says of itself.
        sample_shape: (C, H, W) that the graph takes.
        batch_size: samples a run of the graph.
        conditions: what it takes beside sample and timestep, in order: {name, shape of one sample's, dtype, bound}.
        inference_precision: OpenVINO's INFERENCE_PRECISION_HINT in use: what the layers outside the plan compute in.
    """

    def __init__(self, folder: Path, device: str = "CPU", properties: Mapping[str, Any] | None = None) -> None:
        self.folder = folder
        self.manifest = read_manifest(folder)
        self.config = UNetConfig(json.loads((folder / UNET_CONFIG).read_text(encoding="utf-8")))
        channels, height, width = self.manifest["sample_shape"]
        self.sample_shape: tuple[int, int, int] = (channels, height, width)
        self.batch_size: int = self.manifest["batch_size"]
        self._train_timesteps: int = self.manifest["train_timesteps"]
        self.conditions: tuple[dict[str, Any], ...] = tuple(self.manifest.get("conditions", ()))
        _warn_without_vnni(self.manifest, folder)
        self.compiled = compile_graph(read_graph(folder, core := ov.Core()), core, device, properties)
        self.inference_precision: str = self.compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        self._request = self.compiled.create_infer_request()

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str = "CPU", properties: Mapping[str, Any] | None = None) -> OVUNet2DModel:
        """Load a deployed folder (the one with manifest.json in it).

        Args:
            folder: what export_model wrote.
            device: OpenVINO's name of the device.
            properties: OpenVINO properties over DEFAULT_PROPERTIES, such as ``{"INFERENCE_PRECISION_HINT": "f32"}``.

        Raises:
            ModelError: not such a folder, a damaged one, or properties that OpenVINO refuses.
        """
        return cls(Path(folder), device, properties)

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

    @overload
    def __call__(self, sample: Any, timestep: Any, return_dict: Literal[True] = True, **conditions: Any) -> UNetOutput: ...

    @overload
    def __call__(self, sample: Any, timestep: Any, return_dict: Literal[False], **conditions: Any) -> tuple[Any]: ...

    def __call__(self, sample: Any, timestep: Any, return_dict: bool = True, **conditions: Any) -> UNetOutput | tuple[Any]:
        """Predict as the diffusers model does, with its own keyword arguments.

        Args:
            sample: (B, C, H, W), numpy array or torch tensor.
            timestep: a number, or an array or tensor of shape (), (1,) or (B,).
            return_dict: False returns a tuple of one.
            conditions: such as class_labels, encoder_hidden_states, added_cond_kwargs: (B, ...), or (1, ...) for all samples.

        Raises:
            ModelError: a shape that the graph does not take, a time step that is no whole number in [0, T), or conditions of another model.
        """
        given = {name: as_array(value) for name, value in flattened(conditions).items()}
        if isinstance(sample, np.ndarray):
            prediction: Any = self.predict(sample, as_array(timestep), given)
        else:
            import torch

            prediction = torch.from_numpy(self.predict(sample.detach().cpu().float().numpy(), as_array(timestep), given)).to(sample)
        return UNetOutput(prediction) if return_dict else (prediction,)

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

    def _timesteps(self, timestep: npt.NDArray[Any], count: int) -> npt.NDArray[np.int64]:
        if timestep.shape not in ((), (1,), (count,)):
            raise ModelError(f"{self.folder}: time steps must have shape (), (1,) or ({count},), got {timestep.shape}")
        whole = timestep.astype(np.int64)
        if (whole != timestep).any() or whole.min() < 0 or whole.max() >= self._train_timesteps:
            raise ModelError(f"{self.folder}: time steps must be whole numbers in [0, {self._train_timesteps}), got {timestep}")
        return np.broadcast_to(whole, (count,))

    def _run(self, parts: Sequence[npt.NDArray[Any]]) -> Float32:
        """One run of the graph on up to batch_size samples: their states, time steps and conditions."""
        missing = self.batch_size - len(parts[0])
        if missing:
            parts = [np.concatenate([part, np.repeat(part[-1:], missing, 0)]) for part in parts]
        inputs = [np.ascontiguousarray(parts[0], np.float32), *(np.ascontiguousarray(part) for part in parts[1:])]
        self._request.infer(inputs, share_inputs=True)
        return np.array(self._request.get_output_tensor(0).data[: self.batch_size - missing])


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
    """Compile with DEFAULT_PROPERTIES under `properties`.

    Raises:
        ModelError: OpenVINO refuses the device or a property.
    """
    chosen = {**DEFAULT_PROPERTIES, **(properties or {})}
    try:
        return core.compile_model(model, device, chosen)
    except (RuntimeError, TypeError) as error:
        raise ModelError(f"OpenVINO cannot compile for {device} with {chosen}: {error}") from error
