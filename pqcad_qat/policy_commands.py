"""The commands that take a policy: each makes one call into commands/ and prints the result.

Not here: the commands that take a folder (folder_commands.py), nor any work. Heavy libraries are imported inside the
functions, so that `--help` and the faults of a policy appear at once.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pqcad_qat import console
from pqcad_qat.arguments import (
    command_line,
    output_folder,
    several,
    size_limit,
    whole_number,
    with_minutes,
    with_model,
)
from pqcad_qat.errors import UsageError
from pqcad_qat.policy.loading import load_policy, load_pretrain_policy
from pqcad_qat.policy.shipped import policy_file

TARGET_MISSED = 3
"""Exit code of `run --check` where a target does not hold."""

if TYPE_CHECKING:
    from pqcad_qat.models.own_model import OwnModel
    from pqcad_qat.report.rehearsal_record import StageCost


def run(
    policy: str,
    model: str | None = None,
    out: str | None = None,
    set: tuple[str, ...] = (),
    resume: bool = False,
    dry_run: bool = False,
    module: str | None = None,
    minutes: float | None = None,
    check: bool = False,
) -> None:
    """Take a policy's full-precision model to an INT8 OpenVINO folder and a report.

    Args:
        policy: policy file, or the name of one that ships, such as w4a8 (`policies` lists them).
        model: model in place of model.source: embedded:NAME, a local diffusers folder, or a hub id.
        out: folder of the run; by default runs/NAME, where NAME is the policy's.
        set: override of one key, as KEY=VALUE, such as training.seed=1; repeat the flag for further keys.
        resume: go on with an unfinished run; finished stages are not repeated.
        dry_run: show the plan, what each stage would do, and the disk space that it needs; nothing is written.
        module: module of your own in place of model.source, as FILE.py:FUNCTION. The file is run, and the function
            returns a pqcad_qat.models.own_model.OwnModel.
        minutes: training.minutes, the wall time of all training stages whose steps are auto.
        check: end with exit code 3 if a target of the policy does not hold.
    """
    loaded = load_policy(policy_file(policy), with_minutes(with_model(set, model), minutes))
    from pqcad_qat.commands.run import preview
    from pqcad_qat.commands.run import run as run_policy
    from pqcad_qat.report.tables import plan_table, stages_ahead

    own = _own_model(module, model)
    folder = Path(out) if out else Path("runs") / loaded.name
    if dry_run:
        ahead = preview(loaded, folder, resume, own, console=console.CONSOLE)
        console.show(plan_table(ahead.layers, ahead.denoiser), stages_ahead(ahead))
        console.tell(*(f"note: {note}" for note in ahead.notes), f"folder: {folder}")
        return
    page = run_policy(loaded, folder, command_line(), console.CONSOLE, resume=resume, model=own)
    report = console.show_result(folder, page)
    if check and (missed := [target.name for target in report.targets if target.holds is False]):
        console.tell(f"--check: {len(missed)} of {len(report.targets)} targets do not hold")
        sys.exit(TARGET_MISSED)


def plan(policy: str, model: str | None = None, set: tuple[str, ...] = (), module: str | None = None) -> None:
    """Show which rule quantizes which layer, to how many bits, and the expected size, from configs without weights.

    Args:
        policy: policy file, or the name of one that ships.
        model: model in place of model.source; also the name of an architecture that ships, such as sdxl-base-1.0, or
            a denoiser's config.json.
        set: override of one key, as KEY=VALUE; repeat the flag for further keys.
        module: module of your own, as for `run`; it is built, and exported on trial.
    """
    loaded = load_policy(policy_file(policy), with_model(set, model))
    from pqcad_qat.commands.plan import plan as plan_policy
    from pqcad_qat.report.tables import plan_table

    planned = plan_policy(loaded, _own_model(module, model))
    console.CONSOLE.print(plan_table(planned.layers, planned.denoiser))
    console.tell(*(f"note: {note}" for note in planned.notes))


def sensitivity(
    policy: str,
    model: str | None = None,
    set: tuple[str, ...] = (),
    max_size: str | None = None,
    widths: tuple[int, ...] = (2, 3, 4, 7),
    states: int = 64,
    out: str | None = None,
    module: str | None = None,
) -> None:
    """Measure the output's error when one layer alone is quantized, at every width; --max-size adds a mixed policy.

    Args:
        policy: policy file, or the name of one that ships; its rules say which layers are quantized, and everything
            about how except the width.
        model: model in place of model.source.
        set: override of one key, as KEY=VALUE; repeat the flag for further keys.
        max_size: largest size of the packed weights, as 0.15x of float32 or as 2.5MB; policy.yaml then has the widths
            of least error within it.
        widths: widths in bits that a layer's weights may get; 8 bits need a CPU with VNNI, 7 do not.
        states: number of states of the calibration set on which errors are measured.
        out: folder for sensitivity.json, sensitivity.html and policy.yaml; by default runs/NAME-sensitivity, where
            NAME is the policy's.
        module: module of your own, as for `run`.
    """
    loaded = load_policy(policy_file(policy), with_model(set, model))
    sizes = [whole_number("widths", width, least=2, most=8) for width in several("widths", widths)]
    from pqcad_qat.commands.sensitivity import sensitivity as measure
    from pqcad_qat.report.sensitivity_page import assignment_table, sensitivity_table

    folder = output_folder(out or Path("runs") / f"{loaded.name}-sensitivity")
    size = None if max_size is None else size_limit("max-size", max_size)
    count = whole_number("states", states)
    own, command = _own_model(module, model), command_line()
    result = measure(loaded, sizes, count, size, folder=folder, command=command, console=console.CONSOLE, model=own)
    console.show(sensitivity_table(result.report), assignment_table(result.report))
    console.tell(f"page: {result.page}", *([f"policy: {result.policy}"] if result.policy else []))


def profile(
    policy: str,
    model: str | None = None,
    set: tuple[str, ...] = (),
    runs: int = 10,
    only: str = "*",
    module: str | None = None,
) -> None:
    """Show the time and memory of one training step, part by part, quantized and in floating point.

    Args:
        policy: policy file, or the name of one that ships.
        model: model in place of model.source; the name of an architecture that ships, or a denoiser's config.json,
            gets random weights.
        set: override of one key, as KEY=VALUE; repeat the flag for further keys.
        runs: number of timed steps of each candidate; the candidates take turns.
        only: glob on the names of the candidates (float, fixed-bit, pq); all are in memory at once.
        module: module of your own, as for `run`.
    """
    loaded = load_policy(policy_file(policy), with_model(set, model))
    from pqcad_qat.commands.profile import profile as profile_policy
    from pqcad_qat.machine.memory import peak_resident
    from pqcad_qat.report.tables import costs_table

    own, states = _own_model(module, model), loaded.training.batch_size
    costs = profile_policy(loaded, whole_number("runs", runs), console.CONSOLE, own, only=only)
    console.CONSOLE.print(costs_table(costs, states, f"{loaded.name}: one step of {states} states"))
    console.tell(f"largest resident memory of this process: {peak_resident() / 1e6:,.0f} MB")


def sweep(
    study: str,
    out: str | None = None,
    set: tuple[str, ...] = (),
    only: str = "*",
    jobs: int = 1,
    scheduler: str | None = None,
    dry_run: bool = False,
    page: str | None = None,
    module: str | None = None,
) -> None:
    """Run every cell of a study as a run of its own, and compare them in one table; finished cells are kept.

    Args:
        study: file of kind study, or the name of one that ships, such as smoke.
        out: folder of the study; by default runs/studies/NAME, where NAME is the study's. Cells begun there go on.
        set: override of one key of the study (seeds=[0]) or of every cell's policy, as KEY=VALUE; repeat the flag for
            further keys.
        only: glob on the names of the cells to run, such as '*-seed0'; the table has all finished cells.
        jobs: number of cells that run at once, each in a process with its share of the cores; small models gain from
            it.
        scheduler: address of a Dask scheduler, such as tcp://10.0.0.1:8786: the cells run on its workers, which must
            see the folder under the same path (needs the extra dask).
        dry_run: show the cells and what each would do, or the faults that `plan` finds in them; nothing is run.
        page: Markdown file that also gets the table, between its lines <!-- NAME --> and <!-- end of NAME -->, or at
            its end.
        module: module of your own, as for `run`, for the cells whose model.source is module:NAME.
    """
    from pqcad_qat.policy.study_cells import load_study

    loaded = load_study(policy_file(study, "study"), set)
    from pqcad_qat.commands.sweep import STUDY_PAGE, checked_cells
    from pqcad_qat.commands.sweep import sweep as run_cells
    from pqcad_qat.report.comparison_page import comparison_tables
    from pqcad_qat.report.tables import cells_table

    folder = Path(out) if out else Path("runs") / "studies" / loaded.name
    table = None if page is None else Path(page)
    if dry_run:
        cells = checked_cells(loaded, folder, console.PROGRESS, only=str(only), page=table, module=module)
        console.show(cells_table(cells, f"{loaded.name}: {len(cells)} cells in {folder}"))
        return
    at_a_time = whole_number("jobs", jobs)
    comparison = run_cells(
        loaded,
        folder,
        command_line(),
        console.CONSOLE,
        jobs=at_a_time,
        scheduler=scheduler,
        only=str(only),
        page=table,
        module=module,
    )
    console.show(*comparison_tables(comparison))
    console.tell(f"page: {folder / STUDY_PAGE}")


def pretrain(policy: str, out: str | None = None, set: tuple[str, ...] = (), resume: bool = False) -> None:
    """Train a full-precision denoiser from real images; the result is a diffusers folder.

    Args:
        policy: policy file of kind pretrain, or the name of one that ships, such as pretrain-digits.
        out: folder of the run; by default runs/NAME, where NAME is the policy's.
        set: override of one key, as KEY=VALUE; repeat the flag for further keys.
        resume: go on with an unfinished run.
    """
    loaded = load_pretrain_policy(policy_file(policy, "pretrain"), set)
    from pqcad_qat.commands.pretrain import pretrain as train

    console.tell(f"model: {train(loaded, Path(out) if out else Path('runs') / loaded.name, console.CONSOLE, resume)}")


def rehearse(policy: str, out: str, model: str | None = None, set: tuple[str, ...] = ()) -> None:
    """Deploy an architecture with random weights, with all proofs, and show each stage's time and memory.

    Args:
        policy: policy file, or the name of one that ships; its rules and its export.weights apply, its training does
            not matter.
        out: folder for rehearsal.json, openvino/ and packed/.
        model: architecture in place of model.source: the name of one that ships, a denoiser's config.json, or a
            folder with one.
        set: override of one key, as KEY=VALUE; repeat the flag for further keys.
    """
    loaded = load_policy(policy_file(policy), with_model(set, model))
    folder = output_folder(out)
    from pqcad_qat.commands.rehearse import rehearse as rehearse_policy
    from pqcad_qat.report.tables import stages_table

    def tell(cost: StageCost) -> None:
        console.tell(f"{cost.name}: {cost.seconds:.1f} s")

    rehearsal, record = rehearse_policy(loaded, folder, command_line(), tell)
    console.CONSOLE.print(stages_table(rehearsal))
    console.tell(f"record: {record}")


def policies(*name: str, copy: str | None = None) -> None:
    """List the policies that ship, each with its purpose; print one by its name, or copy it to start your own.

    Args:
        name: name of one policy in the list, such as w4a8 or studies/smoke.
        copy: new file for the copy; a file that exists is not replaced.
    """
    from pqcad_qat.commands.policies import copied, policies_that_ship, policy_text
    from pqcad_qat.report.policies_table import policies_table

    if len(name) > 1 or (copy is not None and not name):
        raise UsageError(f"got {len(name)} names of policies; allowed one, as in: policies w4a8 --copy my.yaml")
    if copy is not None:
        console.tell(*(f"written: {file}" for file in copied(name[0], copy)))
    elif name:
        sys.stdout.write(policy_text(name[0]))
    else:
        console.show(policies_table(policies_that_ship()))


def schema(markdown: bool = False) -> None:
    """Print the JSON Schema of policy files, for editors.

    Args:
        markdown: print tables of all keys for people instead.
    """
    from pqcad_qat.commands.schema import schema as schema_text

    sys.stdout.write(schema_text(markdown))


def _own_model(module: str | None, model: str | None) -> OwnModel | None:
    """Module of the user that --module names; None without the flag."""
    if module is None:
        return None
    if model is not None:
        raise UsageError("--module: got it beside --model; allowed one of the two")
    from pqcad_qat.models.own_model import own_model_of

    return own_model_of(module)
