"""The stage `baselines`: the full-precision model run by OpenVINO, and NNCF's post-training INT8 version of it. Runs
that lie side by side share these files.

Not here: how baselines are made and tried out (timing/baseline_trials.py), and how they are timed and sampled
(deploy.py, measure.py).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from pqcad_qat.data.calibration import CalibrationSet
from pqcad_qat.errors import DiedError, DiskError
from pqcad_qat.export.time_tables import known_times
from pqcad_qat.machine.content_store import shared_folder
from pqcad_qat.machine.files import room_for
from pqcad_qat.machine.progress import working
from pqcad_qat.policy.schema import Policy
from pqcad_qat.policy.variants import NNCF_INT8, OV_FP32, VARIANTS
from pqcad_qat.stages.prepared import SHARED, Prepared
from pqcad_qat.stages.run_folder import RunFolder
from pqcad_qat.stages.stage_dependencies import BASELINE_INPUTS
from pqcad_qat.stages.stage_records import BaselinesRecord
from pqcad_qat.timing.baseline_trials import (
    NNCF_SETTINGS,
    XML_FILE,
    Inputs,
    nncf_baseline,
    nncf_errors,
    reasons,
    try_out,
)
from pqcad_qat.timing.float_graph import convert_float, example_inputs
from pqcad_qat.timing.hardware import hardware
from pqcad_qat.timing.latency import PRECISIONS, native, ways_of
from pqcad_qat.training.held_out import divided

COMPARED = 32
"""Number of calls with held-out states on which NNCF's settings are compared."""

NNCF = VARIANTS[NNCF_INT8].file or ""
FLOAT = VARIANTS[OV_FP32].file or ""
"""Paths of the NNCF INT8 model and of the converted float model in a run's folder. All baselines without INT8 run the
latter.
"""


def make_baselines(
    policy: Policy, prepared: Prepared, run: RunFolder, console: Console, *, calibration: CalibrationSet
) -> None:
    """Make and try out every baseline, including those that no variant of the policy needs yet.

    A baseline that fails is recorded with its reason, and the run goes on without it. This run never tries it again;
    another run does. Files that were made are kept whatever happens to the other baselines.
    """
    with run.stage("baselines") as stage:
        if not stage.new:
            return
        died: dict[str, str] = {}
        for name, attempt in _attempts(policy, prepared, run, calibration).items():
            with working(console, f"baselines: {name}"):
                died |= reasons({name: attempt})
        for name in died.keys() & set(policy.variants):
            run.warn(f"baselines: {name} did not run: {died[name]}", console)
        stage.done(BaselinesRecord(died, nncf_errors(run.path / NNCF)))


def _attempts(
    policy: Policy, prepared: Prepared, run: RunFolder, calibration: CalibrationSet
) -> dict[str, Callable[[], object]]:
    machine = hardware()
    attempts: dict[str, Callable[[], object]] = {}
    for name in (name for name in PRECISIONS if native(name, machine)):
        attempts[name] = partial(
            _try_float, policy, prepared, run, calibration, ways=ways_of(name, machine, sampled=True)
        )
    return {
        **attempts,
        NNCF_INT8: partial(
            _make_nncf, policy, prepared, run, calibration, ways=ways_of(NNCF_INT8, machine, sampled=True)
        ),
    }


def _decides(run: RunFolder, baseline: str) -> dict[str, Any]:
    """Everything that determines the content of one of the shared files; it names the file in the shared folder."""
    settings = {"settings": NNCF_SETTINGS} if baseline == NNCF_INT8 else {}
    return {**run.decides("baselines"), "baseline": baseline, **settings}


def _float_file(policy: Policy, prepared: Prepared, run: RunFolder, calibration: CalibrationSet) -> Path:
    """Path of the full-precision OpenVINO graph, which the first baseline that needs it converts."""
    run.link(
        FLOAT,
        shared_folder(
            run.path.parent / SHARED, _decides(run, "float"), partial(_convert, policy, prepared, calibration)
        ),
    )
    return run.path / FLOAT / XML_FILE


def _convert(policy: Policy, prepared: Prepared, calibration: CalibrationSet, folder: Path) -> None:
    batch, model = policy.export.batch_size, prepared.model
    times, condition = known_times(prepared.schedule, calibration.timesteps), prepared.conditions.drawn(0, 0, batch)
    try:
        with room_for(folder, sum(4 * parameter.numel() for parameter in model.denoiser.parameters())):
            convert_float(model.denoiser, prepared.model.sample_shape, batch, folder, times=times, condition=condition)
    except DiskError:  # a full disk says nothing about the model
        raise
    except Exception as error:
        raise DiedError(f"OpenVINO cannot convert it: {' '.join(str(error).split())[:300]}") from error


def _try_float(
    policy: Policy, prepared: Prepared, run: RunFolder, calibration: CalibrationSet, *, ways: list[dict[str, object]]
) -> None:
    try_out(_float_file(policy, prepared, run, calibration), example_of(policy, prepared), ways)


def _make_nncf(
    policy: Policy, prepared: Prepared, run: RunFolder, calibration: CalibrationSet, *, ways: list[dict[str, object]]
) -> None:
    def arrays(part: slice, count: int) -> list[Inputs]:
        batch = policy.export.batch_size
        return [
            {"sample": x.numpy(), "timestep": t.numpy(), **{name: value.numpy() for name, value in condition.items()}}
            for x, t, condition in calibration.of(part).inputs(count * batch, batch)
        ]

    def make(folder: Path) -> None:
        trained, held_out = divided(len(calibration.states))
        compared = arrays(held_out, COMPARED)
        nncf_baseline(file, arrays(trained, BASELINE_INPUTS), folder, ways, compared=compared, settings=NNCF_SETTINGS)

    file = _float_file(policy, prepared, run, calibration)
    run.link(NNCF, shared_folder(run.path.parent / SHARED, _decides(run, NNCF_INT8), make))


def example_of(policy: Policy, prepared: Prepared) -> Inputs:
    """Inputs on which every candidate is timed: one batch of the exported batch size."""
    batch = policy.export.batch_size
    condition = prepared.conditions.drawn(0, 0, batch)
    return example_inputs(
        prepared.model.sample_shape, batch, condition=condition, timestep_dtype=prepared.schedule.timestep_dtype
    )


def runnable(policy: Policy, run: RunFolder) -> tuple[str, ...]:
    """Variants that the run makes, without the baselines that failed."""
    baselines = run.read("baselines", BaselinesRecord)
    died = {} if baselines is None else baselines.died
    return tuple(name for name in policy.variants if name not in died)


def openvino_files(policy: Policy, run: RunFolder) -> dict[str, Path]:
    """Variant -> path of the file or folder that OpenVINO runs, for the variants that are made and can run."""
    files = {}
    for name in runnable(policy, run):
        spec = VARIANTS[name]
        if spec.deploys is not None:
            files[name] = run.path / policy.folder_of(spec.deploys)
        elif spec.file is not None:
            files[name] = run.path / spec.file / XML_FILE
    return files
