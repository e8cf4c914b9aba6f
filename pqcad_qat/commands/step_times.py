"""A policy's model deployed to look at its speed: some planned layers in INT8, all others in floating point, and what a
step takes.

Not here: a run's own export (deploy.py), or the profile of one graph (timing/layer_times.py).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pqcad_qat.export.export_model import export_model
from pqcad_qat.models.conditions import exported_inputs
from pqcad_qat.policy.schema import Policy
from pqcad_qat.quantization.mixed_precision import Costs
from pqcad_qat.quantization.plan import FLOAT
from pqcad_qat.quantization.quantized_layer import IntegerLayer
from pqcad_qat.sampling.trajectory import noise_schedule
from pqcad_qat.stages.blueprint import noise_attention
from pqcad_qat.stages.prepared import Prepared
from pqcad_qat.timing.latency import example_inputs, openvino_candidate, time_interleaved
from pqcad_qat.timing.layer_times import step_profiles

WARMUP = 3


@dataclass(frozen=True)
class Trial:
    """Deployed folders of one model that differ in which of its layers are integers.

    Attributes:
        policy, prepared: whose model it is, and how it is exported.
        visited: times that a graph of continuous time is to know.
        folder: for them.
    """

    policy: Policy
    prepared: Prepared
    visited: Sequence[float]
    folder: Path

    def deploy(self, name: str, layers: Mapping[str, IntegerLayer]) -> None:
        """Write the folder of this name: these layers in INT8, all others in floating point."""
        model, how = self.prepared.model, self.policy.export
        conditions = exported_inputs(model.condition_inputs, self.prepared.conditions)
        provenance = {"policy": self.policy.name, "model": model.source}
        scheduler, shape, place = model.scheduler_config, model.sample_shape, self.folder / name
        attention = noise_attention(replace(model, denoiser=self.prepared.split), self.policy.quantization)
        batch, denoiser = how.batch_size, self.prepared.split
        export_model(
            denoiser,
            scheduler,
            layers,
            shape,
            batch,
            "int8",
            place,
            provenance,
            conditions,
            self.visited,
            attention=attention,
        )

    def clock(self, names: Collection[str]) -> dict[str, float]:
        """Milliseconds of a step of these folders, by the clock: medians over `export.latency_runs` calls in turns."""
        candidates = {name: openvino_candidate(self.folder / name, {}, self._inputs()) for name in names}
        return {
            name: found.median_ms
            for name, found in time_interleaved(candidates, self.policy.export.latency_runs, WARMUP).items()
        }

    def costs(self, integer: str, floating: str) -> Costs:
        """Nanoseconds of a step by what each planned layer runs in, from two folders: all planned layers in INT8, and
        none.

        The profiles of both say which share each layer takes, the clock what the whole step takes with all layers in
        INT8. What is no layer's own counts as that step has it, whatever runs in floating point.
        """
        groups = {layer.name: layer.input_group for layer in self.prepared.plan}
        profiles = step_profiles({name: self.folder / name for name in (integer, floating)}, groups, self._inputs())
        step = self.clock([integer])[integer]
        nanoseconds = 1e6 * step / profiles[integer].step
        layers = {
            layer.name: {
                layer.weights.bits: round(nanoseconds * profiles[integer].layers[layer.name]),
                FLOAT: round(nanoseconds * profiles[floating].layers[layer.name]),
            }
            for layer in self.prepared.plan
        }
        return Costs(round(1e6 * step), round(nanoseconds * profiles[integer].rest), layers)

    def _inputs(self) -> dict[str, np.ndarray[Any, Any]]:
        batch, model = self.policy.export.batch_size, self.prepared.model
        condition = self.prepared.conditions.of(0, 0, batch)
        dtype = noise_schedule(model.scheduler_config).timestep_dtype
        return example_inputs(model.sample_shape, batch, condition=condition, timestep_dtype=dtype)
