"""The steps of a deployed model that full precision computes, from the second graph of its folder.

Not here: which steps these are (stages/float_steps.py), how parts make up a step (sampling/precision_by_time.py), and
the calls of the model (runtime.py). Needs openvino and numpy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pqcad_qat.errors import ModelError
from pqcad_qat.sampling.precision_by_time import StepsInFloat, in_parts
from pqcad_qat.sampling.trajectory import NoiseSchedule
from pqcad_qat.serving.deployed_folder import MANIFEST
from pqcad_qat.serving.graph_inputs import SAMPLE, TIME

Float32 = npt.NDArray[np.float32]
"""Array of float32."""

Inputs = Mapping[str, npt.NDArray[Any]]
"""Inputs of a graph for a whole batch, by name."""


def steps_in_float(
    manifest: Mapping[str, Any], folder: Path, schedule: NoiseSchedule, steps: int | None
) -> StepsInFloat:
    """The steps that full precision computes, none in a folder of one graph.

    Args:
        manifest: the folder's manifest.
        folder: the deployed folder.
        schedule: noise schedule of its sampler.
        steps: number of sampling steps that it was made for; None where its scheduler config names none.

    Raises:
        ModelError: its sampler makes no such step.
    """
    if (start := manifest.get("float_start")) is None:
        return StepsInFloat()
    found = StepsInFloat(start, tuple(tuple(times) for times in manifest.get("float_stops", ())))
    walk = [] if steps is None else [step for step in schedule.walk(steps) if step[0] >= start]
    if other := [list(times) for times in found.stops if (times[0], times[-1]) not in walk]:
        allowed = f"parts of the steps {', '.join(f'{t:g} to {s:g}' for t, s in walk) or 'of a sampler'}"
        raise ModelError(f"{folder / MANIFEST}: float_stops: got {other[0]}; allowed {allowed}")
    return found


def in_full_precision(
    infer: Callable[[Inputs], Float32], inputs: Inputs, *, schedule: NoiseSchedule, steps: StepsInFloat
) -> Float32:
    """Predictions (B, C, H, W) of full precision for a whole batch; `infer` runs the graph of the float steps."""

    def full(x_t: Float32, time: float) -> Float32:
        return infer({**inputs, SAMPLE: x_t, TIME: np.full_like(inputs[TIME], time)})

    times, parts = inputs[TIME], steps.parts
    divided = np.isin(times, list(parts))
    answer = None if divided.all() else infer(inputs)
    for t in np.unique(times[divided]):
        own = np.asarray(in_parts(full, schedule, parts)(inputs[SAMPLE], t), np.float32)
        answer = own if answer is None else np.where((times == t).reshape(-1, 1, 1, 1), own, answer)
    assert answer is not None
    return answer
