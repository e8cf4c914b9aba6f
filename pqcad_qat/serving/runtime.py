"""The runtime of a deployed folder: one compiled model that can replace a diffusers denoiser.

Not here: the files (deployed_folder.py), the reading of calls (diffusers_calls.py), the imitation of diffusers' models
(diffusers_stand_in.py), infer requests (compiled_graph.py), export (export_model.py) and proof (proof.py). Needs
openvino and numpy; torch only if the caller uses it.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import openvino as ov

from pqcad_qat.errors import ModelError
from pqcad_qat.models.families.family import DENOISER_FOLDERS
from pqcad_qat.models.families.table import family_named
from pqcad_qat.sampling.precision_by_time import NO_FLOAT_STEPS, StepsInFloat
from pqcad_qat.sampling.schedulers import STEPS
from pqcad_qat.sampling.trajectory import NoiseSchedule, noise_schedule
from pqcad_qat.serving.compiled_graph import execution_devices, inference_precision
from pqcad_qat.serving.compiled_sizes import CompiledDenoiser, CompiledSizes
from pqcad_qat.serving.deployed_folder import (
    MANIFEST,
    copy_folder,
    denoiser_config,
    read_manifest,
    scheduler_config,
)
from pqcad_qat.serving.diffusers_calls import Call, as_array, read_call
from pqcad_qat.serving.diffusers_stand_in import ModelMixin, StandIn, UNetConfig
from pqcad_qat.serving.float_steps import in_full_precision, steps_in_float
from pqcad_qat.serving.graph_inputs import SAMPLE, TIME
from pqcad_qat.serving.manifest import SCHEDULER_CONFIG
from pqcad_qat.serving.on_demand import OnDemand
from pqcad_qat.serving.packing import WeightFormat
from pqcad_qat.serving.per_size import SampleSizes
from pqcad_qat.serving.vnni import warn_without_vnni

__all__ = ["ModelMixin", "OVUNet2DModel", "UNetConfig", "UNetOutput"]

Float32 = npt.NDArray[np.float32]
"""Array of float32."""


TIME_TOLERANCE = 2.0**-8
"""Largest relative difference between a caller's continuous time and the sampler's: pipelines in bfloat16 round times
by that much.
"""


@dataclass(frozen=True)
class UNetOutput:
    """Result of a call; as in diffusers, the sample is found by attribute, key or index.

    Attributes:
        sample: prediction (B, C, H, W), in torch or numpy as the caller's input.
    """

    sample: Any

    def __getitem__(self, key: str | int) -> Any:
        return {"sample": self.sample, 0: self.sample}[key]

    def to_tuple(self) -> tuple[Any]:
        """The sample as a tuple of one."""
        return (self.sample,)


class OVUNet2DModel(StandIn):
    """A deployed denoiser, compiled; it takes numpy arrays or torch tensors and returns the same kind.

    It can replace the `unet` of a diffusers pipeline or loop, with any scheduler whose time steps are whole numbers. If
    this module is imported, ``DDIMPipeline.from_pretrained(folder)`` creates one by itself.

    The graph has a fixed batch. A larger batch runs in pieces; the last piece is padded with copies of its last sample,
    whose results are dropped. Any batch works, and a multiple of `batch_size` wastes nothing.

    Any number of threads may call one object. Each gets the result that it would get alone, bit for bit. Calls run one
    after the other on every core. ``{"PERFORMANCE_HINT": "THROUGHPUT"}`` runs several at once on fewer cores each.

    Attributes:
        folder: folder that it was loaded from.
        config: the denoiser's config.json, by key or attribute.
        scheduler_config: diffusers' config of the scheduler that the model was made for.
        manifest: the folder's manifest.
        sample_shape: shape (C, H, W) of one sample; a folder of any size takes other H and W too.
        sizes: the H and W of samples that it takes.
        batch_size: number of samples in one run of the graph.
        conditions: inputs besides sample and timestep, in order: {name, shape for one sample, dtype, bound}.
        inference_precision: OpenVINO's INFERENCE_PRECISION_HINT in use, the precision of layers outside the plan.
        in_float: the steps that the full-precision graph of the folder computes.
        training: always False, because it only predicts.
    """

    def __init__(self, folder: Path, device: str = "CPU", properties: Mapping[str, Any] | None = None) -> None:
        """Load and compile the folder; see `from_pretrained`."""
        super().__init__()
        self.folder = folder
        self.manifest = read_manifest(folder)
        self.config = UNetConfig(denoiser_config(folder, self.manifest))
        self.scheduler_config = scheduler_config(folder, self.manifest)
        channels, height, width = self.manifest["sample_shape"]
        self.sample_shape: tuple[int, int, int] = (channels, height, width)
        self.batch_size: int = self.manifest["batch_size"]
        self._train_timesteps: int = self.manifest["train_timesteps"]
        self._timestep_dtype: str = self.manifest.get("timestep_dtype", "int64")
        self.conditions: tuple[dict[str, Any], ...] = tuple(self.manifest.get("conditions", ()))
        self._schedule = noise_schedule(self.scheduler_config, str(folder / SCHEDULER_CONFIG))
        self._times = _student_times(self.scheduler_config.get(STEPS), self._schedule, folder / SCHEDULER_CONFIG)
        self._warned_of_times = False
        warn_without_vnni(self.manifest, folder)
        self.in_float = steps_in_float(self.manifest, folder, self._schedule, self.scheduler_config.get(STEPS))
        in_float = self.in_float.start != NO_FLOAT_STEPS
        self.sizes = SampleSizes(
            (height, width),
            bool(self.manifest.get("any_size", False)),
            family_named(str(self.config.get("_class_name"))).multiple(self.config),
        )
        self._compiled = OnDemand(
            lambda: CompiledSizes(folder, self.manifest, device, properties, in_float=in_float, sizes=self.sizes)
        )
        self.inference_precision: str = inference_precision(self.compiled)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, device: str = "CPU", properties: Mapping[str, Any] | None = None
    ) -> Self:
        """Load a deployed folder.

        Args:
            folder: the folder that export_model or save_pretrained wrote (it holds manifest.json), or the denoiser's
                folder inside it.
            device: OpenVINO's name of the device, such as CPU, AUTO or MULTI:CPU.
            properties: OpenVINO properties that override DEFAULT_PROPERTIES, such as ``{"INFERENCE_PRECISION_HINT":
                "f32"}``.

        Raises:
            ModelError: the folder is no deployed folder or is damaged, the device does not exist, or OpenVINO refuses
                the properties.
        """
        path = Path(folder)
        # diffusers' pipelines pass the denoiser's folder
        inside = path.name in DENOISER_FOLDERS and not (path / MANIFEST).is_file()
        return cls(path.parent if inside else path, device, properties)

    def save_pretrained(self, folder: str | Path, weights: WeightFormat | None = None) -> None:
        """Write the whole deployed folder again, byte for byte, or with its weights in another format.

        The other format executes the same.

        Args:
            folder: where the copy is written. An older deployed folder there is replaced; anything else is refused.
            weights: int8 for plain OpenVINO, packed for the smallest files; None keeps the format.

        Raises:
            ModelError: the folder it was loaded from is gone or changed, or there is no such format.
            ExportError: the target holds something else.
        """
        copy_folder(self.folder, Path(folder), weights)

    def drop(self) -> None:
        """Free the memory of the graphs, which the next call reads and compiles again."""
        self._compiled.drop()

    @property
    def compiled(self) -> ov.CompiledModel:
        """The graph for the folder's own batch and size."""
        return self._compiled().own.compiled

    @property
    def compiled_for(self) -> str:
        """OpenVINO's name of the device that computes."""
        return execution_devices(self.compiled)

    def __call__(self, *positional: Any, **named: Any) -> UNetOutput | tuple[Any]:
        """Predict with the arguments of the diffusers class that `config` names (diffusers_calls.py).

        A time step may be a float if it is a whole number. A graph of continuous time takes any number in [0, T].

        Args:
            positional, named: `sample` or `hidden_states`, (B, C, H, W), as numpy array or torch tensor; `timestep`, a
                number, or an array or tensor of shape (), (1,) or (B,); the conditions, (B, ...), or (1, ...) for all
                samples, also inside dicts such as added_cond_kwargs; and `return_dict`, where False returns a tuple of
                one.

        Raises:
            ModelError: a shape does not fit the graph, the conditions are not the graph's, or a time step is no whole
                number in [0, T).
        """
        takes = [condition["name"] for condition in self.conditions]
        call = read_call(str(self.config.get("_class_name")), takes, positional, named, where=str(self.folder))
        times = as_array(call.timestep, f"{self.folder}: {TIME}")
        answer: Any = self._answer(call, as_array(call.states, f"{self.folder}: {SAMPLE}"), times.astype(np.float64))
        if not isinstance(call.states, np.ndarray):
            import torch

            answer = torch.from_numpy(answer).to(call.states)
        return UNetOutput(answer) if call.as_dict else (answer,)

    forward = __call__

    def _answer(self, call: Call, states: npt.NDArray[Any], times: npt.NDArray[np.float64]) -> Float32:
        """Predict in the layout of the states (B, C, H, W) that a pipeline passes, at times in [0, T]."""
        self._warn_of_unknown_times(times)
        return self.predict(states, times, call.conditions)

    def predict(
        self,
        sample: npt.NDArray[Any],
        timestep: npt.ArrayLike,
        condition: Mapping[str, npt.NDArray[Any]] | None = None,
        *,
        in_float: StepsInFloat | None = None,
    ) -> Float32:
        """Predict from numpy arrays alone, as `__call__` does.

        Args:
            sample: x_t, (B, C, H, W).
            timestep: t, of shape (), (1,) or (B,).
            condition: the conditions by name.
            in_float: the steps that full precision computes in this call; None for the attribute `in_float`.

        Returns:
            The prediction, (B, C, H, W) float32.

        Raises:
            ModelError: as `__call__`.
        """
        compiled = self._compiled().at(sample.shape)
        whole = [
            sample,
            self._timesteps(np.asarray(timestep), len(sample)),
            *self._conditions(condition or {}, len(sample)),
        ]
        pieces = [
            self._run(
                compiled, [values[start : start + self.batch_size] for values in whole], in_float or self.in_float
            )
            for start in range(0, len(sample), self.batch_size)
        ]
        return np.concatenate(pieces)

    def _conditions(self, values: Mapping[str, npt.NDArray[Any]], count: int) -> list[npt.NDArray[Any]]:
        """The conditions of `count` samples, in the graph's order."""
        rules = {condition["name"]: condition for condition in self.conditions}
        if values.keys() != rules.keys():
            raise ModelError(
                f"{self.folder}: conditions: got {', '.join(values) or 'none'}; allowed {', '.join(rules) or 'none'}"
            )
        return [self._condition(rule, values[name], count) for name, rule in rules.items()]

    def _condition(self, rule: Mapping[str, Any], value: npt.NDArray[Any], count: int) -> npt.NDArray[Any]:
        """One condition, checked by its rule in the manifest, cast, and repeated for `count` samples."""
        name, shape, bound = rule["name"], tuple(rule["shape"]), rule["bound"]
        if value.shape not in ((count, *shape), (1, *shape)):
            raise ModelError(f"{self.folder}: {name}: got shape {value.shape}; allowed {(count, *shape)}")
        cast: npt.NDArray[Any] = value.astype(rule["dtype"])
        whole = (cast == value).all() and (np.rint(cast) == cast).all()
        if bound is not None and (not whole or cast.min() < 0 or cast.max() >= bound):
            raise ModelError(f"{self.folder}: {name}: got {value}; allowed whole numbers in [0, {bound})")
        return np.broadcast_to(cast, (count, *shape))

    def _timesteps(self, timestep: npt.NDArray[Any], count: int) -> npt.NDArray[Any]:
        """The times of `count` samples, checked and cast to the graph's dtype."""
        if timestep.shape not in ((), (1,), (count,)):
            raise ModelError(f"{self.folder}: time steps: got shape {timestep.shape}; allowed (), (1,) or ({count},)")
        if self._timestep_dtype == "float32":
            if not ((timestep >= 0) & (timestep <= self._train_timesteps)).all():
                raise ModelError(f"{self.folder}: times: got {timestep}; allowed [0, {self._train_timesteps}]")
            return np.broadcast_to(timestep.astype(np.float32), (count,))
        whole = np.rint(timestep).astype(np.int64)
        if (whole != timestep).any() or whole.min() < 0 or whole.max() >= self._train_timesteps:
            raise ModelError(
                f"{self.folder}: time steps: got {timestep}; allowed whole numbers in [0, {self._train_timesteps}); "
                "schedulers lay whole ones with timestep_spacing leading or trailing, and without Karras, exponential "
                "or beta sigmas"
            )
        return np.broadcast_to(whole, (count,))

    def _run(self, compiled: CompiledDenoiser, values: Sequence[npt.NDArray[Any]], steps: StepsInFloat) -> Float32:
        """Run a graph once, on up to batch_size samples: states, time steps and conditions."""
        missing = self.batch_size - len(values[0])
        if missing:
            values = [np.concatenate([array, np.repeat(array[-1:], missing, 0)]) for array in values]
        names = (SAMPLE, TIME, *(condition["name"] for condition in self.conditions))
        inputs = dict(zip(names, (np.asarray(values[0], np.float32), *values[1:]), strict=True))
        times = np.asarray(values[1])  # one for each sample, as pipelines may mix times
        in_float = times >= self._float_from(steps.start)
        answer = None if in_float.all() else compiled.infer(inputs)
        if in_float.any():
            infer = partial(compiled.infer, in_float=True)
            full = in_full_precision(infer, inputs, schedule=self._schedule, steps=steps)
            answer = full if answer is None else np.where(in_float.reshape(-1, 1, 1, 1), full, answer)
        assert answer is not None
        return answer[: self.batch_size - missing]

    def _float_from(self, start: float) -> float:
        """Time at and above which full precision computes; pipelines round continuous times, so those that are nearer
        to `start` than to the sampler's next time count as well.
        """
        if self._timestep_dtype != "float32" or self._times is None:
            return start
        return (start + max((t for t in self._times if t < start), default=start)) / 2

    def _warn_of_unknown_times(self, times: npt.NDArray[np.float64]) -> None:
        """Warn once if a call's time is not one of the student's times.

        The usual cause is a call without num_inference_steps, for which diffusers has defaults of its own.
        """
        if self._warned_of_times or self._times is None or not times.size:
            return
        off = np.abs(times.reshape(-1, 1) - self._times).min(axis=1)
        if (off <= (TIME_TOLERANCE * times.reshape(-1) if self._timestep_dtype == "float32" else 0)).all():
            return
        self._warned_of_times = True
        count, wrong = self.scheduler_config[STEPS], times.reshape(-1)[off.argmax()]
        scheduler = self.scheduler_config.get("_class_name", "DDIMScheduler")
        warnings.warn(
            f"{self.folder}: called at time {wrong:g}, which the sampler that it was made for never visits: it has "
            f"{count} steps. Write num_inference_steps={count} in the pipeline's call (without it diffusers runs its "
            "own number, often 50), with the folder's scheduler: "
            f"{scheduler}.from_pretrained({str(self.folder / 'scheduler')!r}). "
            "What other steps or schedulers make of it is yours to judge",
            stacklevel=4,
        )


def _student_times(steps: int | None, schedule: NoiseSchedule, path: Path) -> npt.NDArray[np.float64] | None:
    """The times that the model's own sampler visits; None where the config at `path` does not state its steps.

    Raises:
        ModelError: no sampler has this number of steps.
    """
    return None if steps is None else np.array([t for t, _ in schedule.walk(steps, f"{path}: {STEPS}")], np.float64)
