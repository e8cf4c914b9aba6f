"""The command line: arguments become one call into commands/, and what comes back is printed.

Not here: any work, nor what a table holds (report/). Heavy libraries are imported inside the commands, so that `--help`
and a policy's faults come at once.
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import fire
from rich.console import Console, RenderableType

from pqcad_qat import __version__
from pqcad_qat.arguments import (
    HELP,
    command_line,
    fire_arguments,
    guidance_scale,
    help_text,
    one_of,
    output_folder,
    several,
    size_limit,
    whole_number,
    with_model,
)
from pqcad_qat.errors import UsageError, shortened
from pqcad_qat.machine.files import write_file
from pqcad_qat.machine.processes import launched
from pqcad_qat.machine.program import keep_freed_memory, keep_to_share_of_cores, told_endings
from pqcad_qat.policy.loading import json_schema, load_policy, load_pretrain_policy
from pqcad_qat.policy.reference import markdown_reference

if TYPE_CHECKING:
    from pqcad_qat.report.rehearsal_record import StageCost

PIPED_WIDTH = 130
"""Columns of what is not shown on a terminal."""

CONSOLE = Console(
    width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else PIPED_WIDTH,
    quiet=launched()[0] > 0,
    markup=False,  # a pattern such as re:[/a-z]+ or a folder's name would be taken for it
    emoji=False,
)

PROGRESS = Console(stderr=True, quiet=launched()[0] > 0, markup=False, emoji=False)
"""For the progress of commands whose output a program may read."""


def run(
    policy: str, model: str | None = None, out: str | None = None, set: tuple[str, ...] = (), resume: bool = False
) -> None:
    """Take a policy's full-precision model to an INT8 OpenVINO folder and a report.

    Args:
        policy: policy file, such as policies/w4a8.yaml.
        model: overrides model.source: embedded:NAME, a local diffusers folder, or a hub id.
        out: folder of the run; runs/NAME of the policy by default.
        set: override of a key, as KEY=VALUE, such as training.seed=1; given again for each further key.
        resume: go on with an unfinished run; finished stages are not repeated.
    """
    loaded = load_policy(Path(policy), with_model(set, model))
    from pqcad_qat.commands.run import run as run_policy

    folder = Path(out) if out else Path("runs") / loaded.name
    page = run_policy(loaded, folder, command_line(), CONSOLE, resume=resume)
    _show_result(folder, page)


def compare(*runs: str, out: str | None = None) -> None:
    """Put the reports of several runs into one table and picture; runs that differ in their seed alone become mean and
    spread.

    Args:
        runs: folders of finished runs.
        out: page to write, with the same as .json and .md beside it; or a folder for them; comparison.html beside the
            first run by default.
    """
    from pqcad_qat.commands.compare import compare as compare_folders
    from pqcad_qat.report.comparison_page import comparison_tables

    comparison, page = compare_folders(runs, out, command_line())
    _show(*comparison_tables(comparison))
    _tell(f"page: {page}")


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
        study: file of kind study, such as policies/studies/smoke.yaml.
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

    loaded = load_study(Path(study), set)
    from pqcad_qat.commands.sweep import STUDY_PAGE, checked_cells
    from pqcad_qat.commands.sweep import sweep as run_cells
    from pqcad_qat.report.comparison_page import comparison_tables, markdown, with_section
    from pqcad_qat.report.tables import cells_table

    folder = Path(out) if out else Path("runs") / "studies" / loaded.name
    if page is not None:
        with_section(_page_text(page), loaded.name, "")
    if dry_run:
        cells = checked_cells(loaded, folder, CONSOLE, str(only))
        _show(cells_table(cells, f"{loaded.name}: {len(cells)} cells in {folder}"))
        return
    comparison = run_cells(loaded, folder, command_line(), CONSOLE, jobs=whole_number("jobs", jobs), only=str(only))
    _show(*comparison_tables(comparison))
    if page is not None:
        write_file(Path(page), with_section(_page_text(page), loaded.name, markdown(comparison)))
    _tell(f"page: {folder / STUDY_PAGE}")


def _page_text(page: str) -> str:
    """The text of a Markdown file; nothing where there is none yet.

    Raises:
        UsageError: it is no text, or its folder is not there.
    """
    if Path(page).parent.is_dir() and not Path(page).exists():
        return ""
    try:
        return Path(page).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(f"--page: got {shortened(page)!r}; allowed a Markdown file, or a new one") from error


def plan(policy: str, model: str | None = None, set: tuple[str, ...] = ()) -> None:
    """Show which rule quantizes which layer, to how many bits, and the expected size; reads configs alone, and no
    weights.

    Args:
        policy: policy file.
        model: overrides model.source; also the name of an architecture that ships, such as sdxl-base-1.0, or a
            denoiser's config.json.
        set: override of a key, as KEY=VALUE; given again for each further key.
    """
    loaded = load_policy(Path(policy), with_model(set, model))
    from pqcad_qat.commands.plan import plan as plan_policy
    from pqcad_qat.report.tables import plan_table

    planned = plan_policy(loaded)
    CONSOLE.print(plan_table(planned.layers, planned.denoiser))
    _tell(*(f"note: {note}" for note in planned.notes))


def profile(policy: str, model: str | None = None, set: tuple[str, ...] = (), runs: int = 10) -> None:
    """Show what one training step costs by part, quantized against floating point; nothing is written.

    Args:
        policy: policy file.
        model: overrides model.source; the name of an architecture that ships, or a denoiser's config.json, has random
            weights.
        set: override of a key, as KEY=VALUE; given again for each further key.
        runs: timed steps of each, in turns.
    """
    loaded = load_policy(Path(policy), with_model(set, model))
    from pqcad_qat.commands.profile import profile as profile_policy
    from pqcad_qat.report.tables import costs_table

    costs, states = profile_policy(loaded, whole_number("runs", runs), CONSOLE), loaded.training.batch_size
    CONSOLE.print(costs_table(costs, states, f"{loaded.name}: one step of {states} states"))


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
        policy: policy file; its rules say which layers are quantized, and how but for the width.
        model: overrides model.source.
        set: override of a key, as KEY=VALUE; given again for each further key.
        max_size: of the packed weights, as 0.15x of float32 or 2.5MB; writes policy.yaml with the widths that lose
            least within it.
        widths: of the weights, that a layer may get; 8 bits need a CPU with VNNI, 7 do not.
        states: of the calibration set, on which errors are measured.
        out: folder for sensitivity.json, sensitivity.html and policy.yaml; runs/NAME-sensitivity of the policy by
            default.
    """
    loaded = load_policy(Path(policy), with_model(set, model))
    sizes = [whole_number("widths", width, least=2, most=8) for width in several("widths", widths)]
    from pqcad_qat.commands.sensitivity import Limit, measure_sensitivity
    from pqcad_qat.report.sensitivity_page import assignment_table, sensitivity_table, write_sensitivity
    from pqcad_qat.stages.prepared import CALIBRATION

    folder = output_folder(out or Path("runs") / f"{loaded.name}-sensitivity")
    size = None if max_size is None else Limit(*size_limit("max-size", max_size))
    store, count = folder.parent / CALIBRATION, whole_number("states", states)
    report, mixed = measure_sensitivity(
        loaded, sizes, count, size, cache=store, command=command_line(), console=CONSOLE
    )
    CONSOLE.print(sensitivity_table(report))
    CONSOLE.print(assignment_table(report))
    CONSOLE.print(f"page: {write_sensitivity(report, folder)}", soft_wrap=True)
    if mixed is not None:
        write_file(folder / "policy.yaml", mixed)
        CONSOLE.print(f"policy: {folder / 'policy.yaml'}", soft_wrap=True)


def pretrain(policy: str, out: str | None = None, set: tuple[str, ...] = (), resume: bool = False) -> None:
    """Train a full-precision denoiser from real images; the result is a diffusers folder.

    Args:
        policy: policy file of kind pretrain, such as policies/pretrain-fashion-mnist.yaml.
        out: folder of the run; runs/NAME of the policy by default.
        set: override of a key, as KEY=VALUE; given again for each further key.
        resume: go on with an unfinished run.
    """
    loaded = load_pretrain_policy(Path(policy), set)
    from pqcad_qat.commands.pretrain import pretrain as train

    _tell(f"model: {train(loaded, Path(out) if out else Path('runs') / loaded.name, CONSOLE, resume)}")


class _SampleOptions(TypedDict):
    """What both kinds of sampling take."""

    count: int
    seed: int
    steps: int | None
    guidance: float | None
    out: Path
    console: Console


def sample(
    folder: str,
    count: int | None = None,
    seed: int = 0,
    steps: int | None = None,
    out: str = "grid.png",
    conditions: str | None = None,
    guidance: float | None = None,
    prompt: str | None = None,
    negative: str | None = None,
) -> None:
    """Sample images from a folder, of a prompt where one is given, and write them as a grid; latents as a safetensors
    file.

    Args:
        folder: a run, a deployed OpenVINO folder, a quantized student, or a full-precision diffusers folder (or
            embedded:NAME).
        count: number of images; 64 by default, 1 of a prompt.
        seed: of their noise; image k of a seed starts from the same noise in every kind of folder.
        steps: sampling steps; by default those the folder was made for.
        out: PNG file; of a model of latents a safetensors file of them, or, where its folder has a VAE, pictures in a
            PNG file.
        conditions: of a conditional model: all, class labels as [0,3], or a safetensors file of embeddings; by default
            what a run's policy says, or all classes.
        guidance: scale of classifier-free guidance; by default what the folder was made for.
        prompt: what is to be seen, of a run or deployed folder that holds a whole text-to-image pipeline; needs no
            PyTorch.
        negative: what is not to be seen; takes a prompt and guidance.
    """
    from pqcad_qat.commands import sample as sampling

    if Path(out).suffix.lower() not in (sampling.PICTURES, sampling.LATENTS):
        raise UsageError(f"--out: got {out!r}; allowed a name in .png, or of latents in .safetensors")
    how: _SampleOptions = {
        "count": (1 if prompt is not None else 64) if count is None else whole_number("count", count),
        "seed": whole_number("seed", seed, least=0),
        "steps": None if steps is None else whole_number("steps", steps),
        "guidance": guidance_scale(guidance),
        "out": Path(out),
        "console": PROGRESS,
    }
    if prompt is None and negative is not None:
        raise UsageError("--negative: got it alone; allowed beside --prompt")
    if prompt is not None and conditions is not None:
        raise UsageError("--conditions: got a second condition; allowed none beside --prompt")
    if prompt is not None:
        sampled = sampling.sample_prompt(folder, prompt, negative=negative, **how)
    else:
        sampled = sampling.sample(folder, conditions=conditions, **how)
    _tell(*(f"warning: {warning}" for warning in sampled.warnings), f"{out}: {sampled.text}")


def evaluate(
    folder: str,
    images: int = 512,
    seed: int = 1234,
    steps: int | None = None,
    features: str | None = None,
    conditions: str | None = None,
    guidance: float | None = None,
) -> None:
    """Frechet distance of a folder's images to real ones, with its protocol.

    Args:
        folder: a run, a deployed OpenVINO folder, a quantized student, or a full-precision diffusers folder (or
            embedded:NAME).
        images: how many are sampled.
        seed: of their noise.
        steps: sampling steps; by default those the folder was made for.
        features: feature network with its reference statistics: embedded:NAME or a folder; by default what a run's
            policy says, or an embedded model's own.
        conditions: of a conditional model: all, class labels as [0,3], or a safetensors file of embeddings; by default
            what a run's policy says, or all classes.
        guidance: scale of classifier-free guidance; by default what the folder was made for.
    """
    from pqcad_qat.commands.evaluate import evaluate as evaluate_folder

    evaluation = evaluate_folder(
        folder,
        images=whole_number("images", images, least=2),
        seed=whole_number("seed", seed, least=0),
        steps=None if steps is None else whole_number("steps", steps),
        features=features,
        conditions=conditions,
        guidance=guidance_scale(guidance),
        console=PROGRESS,
    )
    protocol = {**asdict(evaluation.fid_protocol), "under_10000": evaluation.fid_protocol.under_10000}
    CONSOLE.print_json(json.dumps({"fid_real": evaluation.fid_real, "fid_protocol": protocol}))


def benchmark(
    source: str,
    batches: tuple[int, ...] = (1, 8),
    isa: tuple[str, ...] = ("native",),
    runs: int = 100,
    throughput: bool = True,
    policy: str = "policies/w4a8.yaml",
    out: str = "benchmark",
) -> None:
    """Time a folder of ours, or an architecture, against PyTorch, OpenVINO float32 and BF16, and NNCF's INT8, in turns
    in one process.

    Args:
        source: a run or deployed OpenVINO folder; or a denoiser's config.json, a folder with one, or the name of an
            architecture that ships, such as ddpm-cifar10-32: with random weights.
        batches: images of a call, as [1,8].
        isa: instruction sets, each but native in a process of its own: of native, avx2, avx2_vnni, avx512_core_vnni.
        runs: timed calls of each.
        throughput: also with several calls at a time; --nothroughput leaves it out.
        policy: whose quantization rules an architecture gets; its model and its training do not matter.
        out: folder for benchmark.json and benchmark.html.
    """
    from pqcad_qat.timing.hardware import INSTRUCTION_SETS

    sizes = [whole_number("batches", batch) for batch in several("batches", batches)]
    sets = one_of("isa", several("isa", isa), INSTRUCTION_SETS)
    whole_number("runs", runs)
    if not isinstance(throughput, bool):
        raise UsageError(f"--throughput: got {throughput!r}; allowed --throughput or --nothroughput")
    folder = output_folder(out)
    from pqcad_qat.commands.benchmark import measure_speed
    from pqcad_qat.report.benchmark_page import speed_tables, write_speed

    report = measure_speed(
        source, Path(policy), sizes, sets, runs=runs, throughput=throughput, command=command_line(), console=CONSOLE
    )
    _show(*speed_tables(report))
    _tell(*(f"{name}: not timed: {why}" for name, why in report.left_out.items()))
    _tell(f"page: {write_speed(report, folder)}")


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
    loaded = load_policy(Path(policy), with_model(set, model))
    folder = output_folder(out)
    from pqcad_qat.commands.rehearse import rehearse as rehearse_policy
    from pqcad_qat.report.tables import stages_table

    def tell(cost: StageCost) -> None:
        _tell(f"{cost.name}: {cost.seconds:.1f} s")

    found, record = rehearse_policy(loaded, folder, command_line(), tell)
    CONSOLE.print(stages_table(found))
    _tell(f"record: {record}")


def features(out: str, data: str = "fashion-mnist", path: str | None = None, size: int = 32) -> None:
    """Train the feature network of FID on a labelled data set, with its reference statistics.

    Args:
        out: folder to write.
        data: fashion-mnist, digits, noto-emoji, or folder.
        path: of the data, where it is not at its default place.
        size: pixels of a side.
    """
    from pqcad_qat.commands.features import features as train_features

    _tell(f"features: {train_features(Path(out), data, path, size, console=CONSOLE)}")


def schema(markdown: bool = False) -> None:
    """Print the JSON Schema of policy files, for editors.

    Args:
        markdown: print every key as a table to read instead.
    """
    sys.stdout.write(markdown_reference() if markdown else json.dumps(json_schema(), indent=2) + "\n")


COMMANDS: dict[str, Callable[..., None]] = {
    command.__name__: command
    for command in (
        run,
        plan,
        sensitivity,
        profile,
        compare,
        sweep,
        pretrain,
        sample,
        evaluate,
        benchmark,
        rehearse,
        features,
        schema,
    )
}


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script: exit code 0, or 2 with a message and no traceback where the user can mend it."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    keep_freed_memory()
    keep_to_share_of_cores()
    os.environ.setdefault("PAGER", "cat")  # Fire pages its help
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that is no UTF-8, or a terminal that shows less
    if HELP & set(given):
        sys.stdout.write(help_text(COMMANDS, given))
        return
    if given == ["--version"]:
        sys.stdout.write(f"pqcad-qat {__version__}\n")
        return
    with told_endings(given):
        fire.Fire(COMMANDS, command=fire_arguments(COMMANDS, given), name="pqcad-qat")


def _show_result(folder: Path, page: Path) -> None:
    """The report of a run, short, and where its page and its deployed folder are."""
    from pqcad_qat.report.report_files import read_report
    from pqcad_qat.report.tables import result_remarks, result_table

    report = read_report(folder)
    CONSOLE.print(result_table(report, folder))
    _tell(*result_remarks(report), f"report:   {page}")
    if (folder / "openvino").exists():
        _tell(f"deployed: {folder / 'openvino'}")


def _show(*tables: RenderableType) -> None:
    CONSOLE.print(*tables, sep="\n", highlight=False)


def _tell(*lines: RenderableType) -> None:
    """Lines that are not broken, so that a path can be copied."""
    for line in lines:
        CONSOLE.print(line, highlight=False, soft_wrap=True)
