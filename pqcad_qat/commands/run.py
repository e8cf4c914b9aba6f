"""The command `run`: the stages of a run, in order.

Not here: the stages themselves (stages/). A finished stage is read back instead of repeated, as long as the policy does
not change what determines it (stages/stage_dependencies.py).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from textwrap import indent
from time import monotonic

from rich.console import Console
from rich.text import Text

from pqcad_qat.machine.files import free_bytes, room_for, write_file
from pqcad_qat.machine.processes import agreed
from pqcad_qat.machine.progress import working
from pqcad_qat.models.own_model import OwnModel
from pqcad_qat.policy.loading import dump_policy
from pqcad_qat.policy.origins import located
from pqcad_qat.policy.schema import Policy
from pqcad_qat.policy.variants import FIXED_BIT, PQ, PTQ, STUDENTS, stages_of
from pqcad_qat.quantization.plan_facts import plan_json
from pqcad_qat.report.run_preview import (
    AGAIN,
    GOES_ON,
    KEPT,
    TO_DO,
    RunPreview,
    StagePreview,
    StageSeconds,
    about,
    time_ahead,
)
from pqcad_qat.report.tables import plan_text
from pqcad_qat.stages.baselines import make_baselines
from pqcad_qat.stages.chosen_widths import choose_widths, warn_of_lost_quality
from pqcad_qat.stages.deploy import benchmark, export
from pqcad_qat.stages.disk_use import room_warning, stage_bytes
from pqcad_qat.stages.float_steps import choose_float_steps
from pqcad_qat.stages.measure import evaluate, report
from pqcad_qat.stages.open_run import holds_run, open_run
from pqcad_qat.stages.post_train import post_train
from pqcad_qat.stages.prepared import SHARED, Prepared, notes_on, prepare, with_own_model
from pqcad_qat.stages.quantized_models import QuantizedModels
from pqcad_qat.stages.run_folder import RunFolder
from pqcad_qat.stages.stage_dependencies import most_steps, recipes, training_steps
from pqcad_qat.stages.step_costs import measure_step_costs
from pqcad_qat.stages.time_estimate import estimated_seconds, measured_pace
from pqcad_qat.stages.train import calibrate, distill, fixed_bit, progressive, teach
from pqcad_qat.stages.trained_models import TrainedModels
from pqcad_qat.stages.variant_images import sample
from pqcad_qat.training.metrics_log import log_texts
from pqcad_qat.training.trackers import check_trackers
from pqcad_qat.training.trainer import new_accelerator


def run(
    policy: Policy,
    path: Path,
    command: str,
    console: Console,
    *,
    resume: bool = False,
    shares_training: bool = False,
    model: OwnModel | None = None,
) -> Path:
    """Carry out a policy, from its full-precision model to a deployed folder and its report; return the path of the
    report's page.

    With `shares_training`, a training stage with an equal recipe is copied from a run beside this one. `model` is a
    module of the user's own, in place of the policy's model.

    Raises:
        PqcadError: a stage found a fault; with `resume` the run continues from there.
    """
    policy = with_own_model(policy, model)
    with located(policy), agreed():
        new_accelerator(policy.training.precision)
        check_trackers(policy.training.trackers)
        with working(console, "checking the policy and its model"):
            prepared = prepare(policy, path.parent / SHARED, model)
            table = recipes(policy, prepared)
    with located(policy), open_run(path, policy, resume, table, console=console) as folder, room_for(path):
        to_do = [stage for stage in table if not folder.finished(stage)]
        if (warning := room_warning(policy, prepared, table, to_do, path=path)) is not None:
            console.print(f"warning: {warning}", markup=False, highlight=False, soft_wrap=True)
        seconds = _seconds(policy, prepared, console, to_do)
        if seconds:
            console.print(Text(time_ahead(seconds.values())), soft_wrap=True)
        begun = monotonic()
        page = _all_stages(policy, prepared, folder, console, command=command, shares_training=shares_training)
        if seconds:
            took, expected = about(monotonic() - begun), about(sum(time.expected for time in seconds.values()))
            console.print(Text(f"the stages took {took}; about {expected} had been expected"), soft_wrap=True)
        return page


def _seconds(policy: Policy, prepared: Prepared, console: Console, to_do: Sequence[str]) -> dict[str, StageSeconds]:
    """The time that each of the stages takes; nothing is timed for a comparison alone."""
    if set(to_do) <= {"evaluation"}:
        return {}
    with working(console, "timing a call of the model and a training step"):
        pace = measured_pace(policy, prepared, to_do)
    return estimated_seconds(policy, prepared, to_do, pace)


def preview(
    policy: Policy, path: Path, resume: bool = False, model: OwnModel | None = None, *, console: Console
) -> RunPreview:
    """Preview what `run` would do in that folder; nothing is written.

    Raises:
        PqcadError: `run` would refuse before its first stage.
    """
    policy = with_own_model(policy, model)
    with located(policy):
        new_accelerator(policy.training.precision)
        check_trackers(policy.training.trackers)
        prepared = prepare(policy, own=model)
        table = recipes(policy, prepared)
    folder = RunFolder(path, table)
    again = folder.outdated() if holds_run(path, resume) else {}
    to_do = [stage for stage in table if stage in again or not folder.finished(stage)]
    seconds = _seconds(policy, prepared, console, to_do)
    stages = []
    for stage in table:
        if stage in again:
            state = AGAIN
        elif folder.finished(stage):
            state = KEPT
        else:
            state = TO_DO if folder.begun(stage) is None else GOES_ON
        trains = bool(table[stage].trained)
        steps = most_steps(policy, stage) if trains else None
        size = stage_bytes(policy, prepared, table, stage)
        automatic = trains and training_steps(policy, stage) is None
        time = seconds.get(stage, StageSeconds())
        stages.append(StagePreview(stage, state, again.get(stage, ""), steps, size, automatic, time))
    notes = notes_on(policy, prepared.plan, prepared.remarks, prepared.model.folder)
    return RunPreview(path, prepared.split, prepared.plan, notes, tuple(stages), free_bytes(path))


def _all_stages(
    policy: Policy, prepared: Prepared, run: RunFolder, console: Console, *, command: str, shares_training: bool
) -> Path:
    """Do the stages that the policy's variants need, in order; return the path of the report's page."""
    stages = stages_of(policy.variants)
    for note in notes_on(policy, prepared.plan, prepared.remarks, prepared.model.folder):
        console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
    _show_plan(policy, prepared, run)
    recorded = calibrate(policy, prepared, run, console)
    untrained = QuantizedModels(policy, prepared, recorded)
    in_float = choose_float_steps(policy, prepared, run, console, untrained=untrained)
    measure_step_costs(policy, prepared, run, console, untrained=untrained)
    calibration = recorded.below(in_float.time)  # all that quantized models learn from and are proven on
    prepared = choose_widths(policy, prepared, run, console, calibration=calibration, untrained=untrained)
    if prepared.plan != untrained.prepared.plan:
        _show_plan(policy, prepared, run)
        untrained = untrained.of(prepared.plan)
    models = TrainedModels(run, untrained)
    if PTQ in stages:
        post_train(policy, run, console, calibration=calibration, models=models, shares_training=shares_training)
    for name, stage in ((PQ, progressive), (FIXED_BIT, fixed_bit)):
        if name in stages:
            stage(
                policy,
                prepared,
                run,
                console,
                calibration=calibration,
                models=models,
                shares_training=shares_training,
            )
    warn_of_lost_quality(policy, run, console)
    if "teacher" in stages:
        teach(policy, prepared, run, console, calibration=calibration, models=models)
        for name in (name for name in STUDENTS if name in stages):
            distill(
                policy,
                prepared,
                run,
                console,
                name=name,
                calibration=calibration,
                models=models,
                shares_training=shares_training,
            )
    for name in policy.deployed:
        export(policy, prepared, run, console, name=name, calibration=calibration, models=models)
    if "baselines" in stages:
        make_baselines(policy, prepared, run, console, calibration=recorded)
    if "benchmark" in stages:
        benchmark(policy, prepared, run, console)
    sample(
        policy,
        prepared,
        run,
        console,
        calibration=calibration,
        models=models,
        shares_training=shares_training,
    )
    evaluate(policy, prepared, run, console)
    return report(policy, prepared, run, command)


def _show_plan(policy: Policy, prepared: Prepared, run: RunFolder) -> None:
    """Write the plan into the run's folder and its log."""
    with agreed() as first:
        if first:
            write_file(run.path / "plan.json", json.dumps(plan_json(prepared.plan, prepared.split), indent=1))
            texts = {"policy": dump_policy(policy), "plan": plan_text(prepared.plan, prepared.split)}
            # indented by four blanks, Markdown shows it as plain text
            log_texts(run.path / "logs", {name: indent(text, "    ") for name, text in texts.items()})
