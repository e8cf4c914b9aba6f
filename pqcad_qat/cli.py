"""The command line, and its commands that take a policy: arguments become one call into commands/, and what comes back
is printed.

Not here: the commands that take a folder (folder_commands.py), nor any work. Heavy libraries are imported inside the
functions, so that `--help` and a policy's faults come at once.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import fire

from pqcad_qat import __version__, console
from pqcad_qat.arguments import (
    HELP,
    command_line,
    fire_arguments,
    help_text,
    output_folder,
    several,
    size_limit,
    whole_number,
    with_model,
)
from pqcad_qat.errors import UsageError
from pqcad_qat.folder_commands import benchmark, compare, evaluate, features, report, sample
from pqcad_qat.machine.program import keep_freed_memory, keep_to_share_of_cores, reported_endings
from pqcad_qat.policy.loading import load_policy, load_pretrain_policy
from pqcad_qat.policy.shipped import policy_file

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
) -> None:
    """Take a policy's full-precision model to an INT8 OpenVINO folder and a report.

    Args:
        policy: policy file, or the name of one that ships, such as w4a8 (`policies` lists them).
        model: overrides model.source: embedded:NAME, a local diffusers folder, or a hub id.
        out: folder of the run; runs/NAME of the policy by default.
        set: override of a key, as KEY=VALUE, such as training.seed=1; given again for each further key.
        resume: go on with an unfinished run; finished stages are not repeated.
        dry_run: show the plan, what becomes of each stage, and what they take on disk; nothing is written.
        module: a module of your own in the place of model.source, as FILE.py:FUNCTION, whose function returns a
            pqcad_qat.models.own_model.OwnModel; the file is run.
    """
    loaded = load_policy(policy_file(policy), with_model(set, model))
    from pqcad_qat.commands.run import outlook
    from pqcad_qat.commands.run import run as run_policy
    from pqcad_qat.report.tables import plan_table, stages_ahead

    own = _own_model(module, model)
    folder = Path(out) if out else Path("runs") / loaded.name
    if dry_run:
        ahead = outlook(loaded, folder, resume, own)
        console.show(plan_table(ahead.layers, ahead.denoiser), stages_ahead(ahead))
        console.tell(*(f"note: {note}" for note in ahead.notes), f"folder: {folder}")
        return
    page = run_policy(loaded, folder, command_line(), console.CONSOLE, resume=resume, model=own)
    console.show_result(folder, page)


def plan(policy: str, model: str | None = None, set: tuple[str, ...] = (), module: str | None = None) -> None:
    """Show which rule quantizes which layer, to how many bits, and the expected size; reads configs alone, and no
    weights.

    Args:
        policy: policy file, or the name of one that ships.
        model: overrides model.source; also the name of an architecture that ships, such as sdxl-base-1.0, or a
            denoiser's config.json.
        set: override of a key, as KEY=VALUE; given again for each further key.
        module: a module of your own, as of `run`; it is built, and deployed on trial.
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
) -> None:
    """Measure how far the output moves when one layer alone is quantized, at every width; within a size,
    write a mixed policy.

    Args:
        policy: policy file, or the name of one that ships; its rules say which layers are quantized, and how but for
            the width.
        model: overrides model.source.
        set: override of a key, as KEY=VALUE; given again for each further key.
        max_size: of the packed weights, as 0.15x of float32 or 2.5MB; writes policy.yaml with the widths that lose
            least within it.
        widths: of the weights, that a layer may get; 8 bits need a CPU with VNNI, 7 do not.
        states: of the calibration set, on which errors are measured.
        out: folder for sensitivity.json, sensitivity.html and policy.yaml; runs/NAME-sensitivity of the policy by
            default.
    """
    loaded = load_policy(policy_file(policy), with_model(set, model))
    sizes = [whole_number("widths", width, least=2, most=8) for width in several("widths", widths)]
    from pqcad_qat.commands.sensitivity import Limit
    from pqcad_qat.commands.sensitivity import sensitivity as measure
    from pqcad_qat.report.sensitivity_page import assignment_table, sensitivity_table

    folder = output_folder(out or Path("runs") / f"{loaded.name}-sensitivity")
    size = None if max_size is None else Limit(*size_limit("max-size", max_size))
    count = whole_number("states", states)
    result = measure(loaded, sizes, count, size, folder=folder, command=command_line(), console=console.CONSOLE)
    console.show(sensitivity_table(result.report), assignment_table(result.report))
    console.tell(f"page: {result.page}", *([f"policy: {result.policy}"] if result.policy else []))


def profile(policy: str, model: str | None = None, set: tuple[str, ...] = (), runs: int = 10) -> None:
    """Show what one training step costs by part, quantized against floating point; nothing is written.

    Args:
        policy: policy file, or the name of one that ships.
        model: overrides model.source; the name of an architecture that ships, or a denoiser's config.json, has random
            weights.
        set: override of a key, as KEY=VALUE; given again for each further key.
        runs: timed steps of each, in turns.
    """
    loaded = load_policy(policy_file(policy), with_model(set, model))
    from pqcad_qat.commands.profile import profile as profile_policy
    from pqcad_qat.report.tables import costs_table

    costs, states = profile_policy(loaded, whole_number("runs", runs), console.CONSOLE), loaded.training.batch_size
    console.CONSOLE.print(costs_table(costs, states, f"{loaded.name}: one step of {states} states"))


def sweep(
    study: str,
    out: str | None = None,
    set: tuple[str, ...] = (),
    only: str = "*",
    jobs: int = 1,
    dry_run: bool = False,
    page: str | None = None,
) -> None:
    """Run every cell of a study, each a run of its own, and put them into one table; what is finished or begun goes on.

    Args:
        study: file of kind study, or the name of one that ships, such as smoke.
        out: folder of the study; runs/studies/NAME by default.
        set: override of a key of the study (seeds=[0]) or of every cell's policy, as KEY=VALUE; given again for each
            further key.
        only: glob on the names of the cells to run, as '*-seed0'; the table has all that are finished.
        jobs: cells at a time, each in a process of its own with its share of the cores; small models gain from it.
        dry_run: show the cells and what they would do, or what `plan` says against any of them.
        page: Markdown file that gets the table too, between the lines <!-- NAME --> and <!-- end of NAME --> of the
            study, or at its end.
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
        cells = checked_cells(loaded, folder, console.PROGRESS, only=str(only), page=table)
        console.show(cells_table(cells, f"{loaded.name}: {len(cells)} cells in {folder}"))
        return
    at_a_time = whole_number("jobs", jobs)
    comparison = run_cells(loaded, folder, command_line(), console.CONSOLE, jobs=at_a_time, only=str(only), page=table)
    console.show(*comparison_tables(comparison))
    console.tell(f"page: {folder / STUDY_PAGE}")


def pretrain(policy: str, out: str | None = None, set: tuple[str, ...] = (), resume: bool = False) -> None:
    """Train a full-precision denoiser from real images; the result is a diffusers folder.

    Args:
        policy: policy file of kind pretrain, or the name of one that ships, such as pretrain-digits.
        out: folder of the run; runs/NAME of the policy by default.
        set: override of a key, as KEY=VALUE; given again for each further key.
        resume: go on with an unfinished run.
    """
    loaded = load_pretrain_policy(policy_file(policy, "pretrain"), set)
    from pqcad_qat.commands.pretrain import pretrain as train

    console.tell(f"model: {train(loaded, Path(out) if out else Path('runs') / loaded.name, console.CONSOLE, resume)}")


def rehearse(policy: str, out: str, model: str | None = None, set: tuple[str, ...] = ()) -> None:
    """Take an architecture with random weights to a deployed folder, with its proofs; show what each stage takes in
    time and memory.

    Args:
        policy: whose rules quantize it, and whose export.weights is written; its training does not matter.
        out: folder for rehearsal.json, openvino/ and packed/.
        model: overrides model.source: the name of an architecture that ships, a denoiser's config.json, or a folder
            with one.
        set: override of a key, as KEY=VALUE; given again for each further key.
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
    """List the policies that ship, each with what it is for; of one print the text, or start a policy of your own.

    Args:
        name: of one policy of the list, or studies/NAME.
        copy: new file to write it to, as a policy of your own; a file that is there is not replaced.
    """
    from pqcad_qat.commands.policies import copied, policies_that_ship, policy_text
    from pqcad_qat.report.tables import policies_table

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
        markdown: print every key as a table to read instead.
    """
    from pqcad_qat.commands.schema import schema as schema_text

    sys.stdout.write(schema_text(markdown))


COMMANDS: dict[str, Callable[..., None]] = {
    command.__name__: command
    for command in (
        run,
        plan,
        sensitivity,
        profile,
        report,
        compare,
        sweep,
        pretrain,
        sample,
        evaluate,
        benchmark,
        rehearse,
        features,
        policies,
        schema,
    )
}


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script: exit code 0, or 2 with a message and no traceback where the user can mend it."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    keep_freed_memory()
    keep_to_share_of_cores()
    os.environ.setdefault("PAGER", "cat")  # Fire pages its help
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that is no UTF-8, or a terminal that shows less
    with console.closed_pipe_is_no_fault():
        if HELP & set(words):
            sys.stdout.write(help_text(COMMANDS, words))
        elif words == ["--version"]:
            sys.stdout.write(f"pqcad-qat {__version__}\n")
        else:
            with reported_endings(words):
                fire.Fire(COMMANDS, command=fire_arguments(COMMANDS, words), name="pqcad-qat")


def _own_model(module: str | None, model: str | None) -> OwnModel | None:
    """What --module names, None without it."""
    if module is None:
        return None
    if model is not None:
        raise UsageError("--module: got it beside --model; allowed one of the two")
    from pqcad_qat.models.own_model import own_model_of

    return own_model_of(module)
