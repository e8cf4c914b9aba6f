"""The stage `baselines`: full precision as OpenVINO runs it, and as NNCF's post-training INT8; shared by runs side by
side.

Not here: how they are made and tried out (timing/baseline_trials.py), and how they are timed and sampled (deploy.py,
measure.py).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from pqcad_qat.data.calibration import CalibrationSet
from pqcad_qat.errors import DiedError, DiskError
from pqcad_qat.export.time_tables import known_times
from pqcad_qat.machine.content_store import kept
from pqcad_qat.machine.files import room_for
from pqcad_qat.machine.progress import working
from pqcad_qat.policy.variants import NNCF_INT8, OV_FP32, VARIANTS
from pqcad_qat.stages.prepared import SHARED
from pqcad_qat.stages.recipes import BASELINE_INPUTS
from pqcad_qat.stages.stage_records import BaselinesRecord
from pqcad_qat.stages.work import Work
from pqcad_qat.timing.baseline_trials import XML_FILE, Inputs, nncf_baseline, reasons, try_out
from pqcad_qat.timing.hardware import hardware
from pqcad_qat.timing.latency import PRECISIONS, convert_float, example_inputs, native, ways_of

NNCF = VARIANTS[NNCF_INT8].file or ""
FLOAT = VARIANTS[OV_FP32].file or ""
"""Where they lie in a run's folder; the second is what all baselines of the float graph run."""


def make_baselines(work: Work, calibration: CalibrationSet) -> None:
    """Make and try out all of them, so that variants which are asked for later are there.

    One that dies is noted with its reason, and the run goes on without it: another run tries it again, this one never.
    What was made is kept whatever becomes of the others.
    """
    with work.folder.stage("baselines") as stage:
        if not stage.new:
            return
        died: dict[str, str] = {}
        for name, attempt in _attempts(work, calibration).items():
            with working(work.console, f"baselines: {name}"):
                died |= reasons({name: attempt})
        for name in died.keys() & set(work.made):
            work.warn(f"baselines: {name} did not run: {died[name]}")
        stage.done(BaselinesRecord(died))


def _attempts(work: Work, calibration: CalibrationSet) -> dict[str, Callable[[], object]]:
    machine = hardware()
    found: dict[str, Callable[[], object]] = {}
    for name in (name for name in PRECISIONS if native(name, machine)):
        found[name] = partial(_try_float, work, calibration, ways_of(name, machine, sampled=True))
    return {**found, NNCF_INT8: partial(_make_nncf, work, calibration, ways_of(NNCF_INT8, machine, sampled=True))}


def _decides(work: Work, baseline: str) -> dict[str, Any]:
    """All that decides one of the files."""
    return {**work.decides("baselines"), "baseline": baseline}


def _float_file(work: Work, calibration: CalibrationSet) -> Path:
    """Full precision as OpenVINO's graph, made by the first baseline that needs it."""
    work.link(FLOAT, kept(work.path.parent / SHARED, _decides(work, "float"), partial(_convert, work, calibration)))
    return work.path / FLOAT / XML_FILE


def _convert(work: Work, calibration: CalibrationSet, folder: Path) -> None:
    batch, model = work.policy.export.batch_size, work.prepared.model
    times, condition = known_times(work.schedule, calibration.timesteps), work.prepared.conditions.of(0, 0, batch)
    try:
        with room_for(folder, sum(4 * parameter.numel() for parameter in model.denoiser.parameters())):
            convert_float(model.denoiser, work.shape, batch, folder, times, condition)
    except DiskError:  # no fault of the model's
        raise
    except Exception as error:
        raise DiedError(f"OpenVINO cannot convert it: {' '.join(str(error).split())[:300]}") from error


def _try_float(work: Work, calibration: CalibrationSet, ways: list[dict[str, object]]) -> None:
    try_out(_float_file(work, calibration), example_of(work), ways)


def _make_nncf(work: Work, calibration: CalibrationSet, ways: list[dict[str, object]]) -> None:
    def make(folder: Path) -> None:
        batch = work.policy.export.batch_size
        inputs = [
            {"sample": x.numpy(), "timestep": t.numpy(), **{name: value.numpy() for name, value in given.items()}}
            for x, t, given in calibration.inputs(BASELINE_INPUTS * batch, batch)
        ]
        nncf_baseline(file, inputs, folder, ways)

    file = _float_file(work, calibration)
    work.link(NNCF, kept(work.path.parent / SHARED, _decides(work, NNCF_INT8), make))


def example_of(work: Work) -> Inputs:
    """What every candidate is timed on."""
    batch = work.policy.export.batch_size
    condition = work.prepared.conditions.of(0, 0, batch)
    return example_inputs(work.shape, batch, condition=condition, timestep_dtype=work.schedule.timestep_dtype)


def openvino_files(work: Work) -> dict[str, Path]:
    """Variant -> what OpenVINO runs, of those that are made and can be run."""
    found = {name: work.path / file for name in work.runnable if (file := VARIANTS[name].file)}
    return {
        name: file / XML_FILE if VARIANTS[name].weights_from == "baselines" else file for name, file in found.items()
    }
