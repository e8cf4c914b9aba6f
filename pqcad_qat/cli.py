"""The command line: plain functions over the pipeline, read by Fire; what is printed, and exit codes.

Not here: any work. Heavy libraries are imported inside the commands, so that `--help` and a policy's faults come at
once.
"""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import fire
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pqcad_qat import __version__
from pqcad_qat.arguments import (
    HELP,
    fire_arguments,
    help_text,
    one_of,
    output_folder,
    several,
    size_limit,
    whole_number,
    with_model,
)
from pqcad_qat.errors import ModelError, UsageError, shortened
from pqcad_qat.machine.files import write_file
from pqcad_qat.machine.processes import launched
from pqcad_qat.machine.program import keep_freed_memory, keep_to_share_of_cores, told_endings
from pqcad_qat.policy.loading import json_schema, load_policy, load_pretrain_policy
from pqcad_qat.policy.reference import markdown_reference
from pqcad_qat.policy.schema import ConditionsPolicy, Policy

if TYPE_CHECKING:
    from pqcad_qat.stages.samplers import Variant
    from pqcad_qat.timing.stage_costs import StageCost

PIPED_WIDTH = 130
"""Columns of what is not shown on a terminal."""

CONSOLE = Console(
    width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else PIPED_WIDTH,
    quiet=launched()[0] > 0,
    markup=False,  # a pattern such as re:[/a-z]+ or a folder's name would be taken for it
    emoji=False,
)


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
    from pqcad_qat.commands import run as pipeline

    folder = Path(out) if out else Path("runs") / loaded.name
    page = pipeline.run(loaded, folder, _command_line(), CONSOLE, resume)
    _print_result(folder)
    deployed = f"\ndeployed: {folder / 'openvino'}" if (folder / "openvino").exists() else ""
    CONSOLE.print(f"report:   {page}{deployed}", soft_wrap=True)


def compare(*runs: str, out: str | None = None) -> None:
    """Put the reports of several runs into one table and picture; runs that differ in their seed alone become mean and
    spread.

    Args:
        runs: folders of finished runs.
        out: page to write, with the same as .json and .md beside it; or a folder for them; comparison.html beside the
            first run by default.
    """
    from pqcad_qat.report.comparison import compare_runs, named_runs
    from pqcad_qat.report.comparison_page import comparison_tables, write_comparison
    from pqcad_qat.report.report_files import read_report

    if not runs:
        raise UsageError("got no run; allowed one or more folders of finished runs")
    folders = [os.path.realpath(run) for run in runs]
    if twice := [run for run, folder in zip(runs, folders, strict=True) if folders.count(folder) > 1]:
        raise UsageError(f"{twice[0]}: got the same folder twice; allowed once")
    page = Path(folders[0]).parent if out is None else Path(out)
    if page.suffix != ".html":
        if page.suffix and not page.is_dir():
            raise UsageError(f"--out: got {shortened(str(out))!r}; allowed a name in .html, or a folder")
        page = page / "comparison.html"
    found = compare_runs("comparison", named_runs({run: read_report(Path(run)) for run in runs}), _command_line())
    CONSOLE.print(*comparison_tables(found), sep="\n", highlight=False)
    write_comparison(found, page)
    CONSOLE.print(f"page: {page}", soft_wrap=True)


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
    from pqcad_qat.commands.sweep import STUDY_PAGE, cells_table, check_cells, chosen_cells
    from pqcad_qat.commands.sweep import sweep as run_cells
    from pqcad_qat.machine.files import write_file
    from pqcad_qat.report.comparison_page import comparison_tables, markdown, with_section

    folder = Path(out) if out else Path("runs") / "studies" / loaded.name
    if page is not None:
        with_section(_page_text(page), loaded.name, "")
    if dry_run:
        check_cells(chosen_cells(loaded, str(only)), CONSOLE)
        CONSOLE.print(cells_table(loaded, folder, str(only)))
        return
    found = run_cells(loaded, folder, _command_line(), CONSOLE, whole_number("jobs", jobs), str(only))
    CONSOLE.print(*comparison_tables(found), sep="\n", highlight=False)
    if page is not None:
        write_file(Path(page), with_section(_page_text(page), loaded.name, markdown(found)))
    CONSOLE.print(f"page: {folder / STUDY_PAGE}", soft_wrap=True)


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
    from pqcad_qat.models.model_folder import local
    from pqcad_qat.quantization.plan import plan_table
    from pqcad_qat.stages.prepared import notes_on, planned_shapes

    denoiser, layers = planned_shapes(loaded)
    CONSOLE.print(plan_table(layers, denoiser))
    for note in notes_on(loaded, layers, local(loaded.model.source)):
        CONSOLE.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)


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
    from pqcad_qat.commands.profile import costs_table, step_costs

    states = loaded.training.batch_size
    costs = step_costs(loaded, whole_number("runs", runs), CONSOLE)
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
    report, mixed = measure_sensitivity(loaded, sizes, count, size, store, _command_line(), CONSOLE)
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

    CONSOLE.print(
        f"model: {train(loaded, Path(out) if out else Path('runs') / loaded.name, CONSOLE, resume)}", soft_wrap=True
    )


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
    if Path(out).suffix.lower() not in (".png", ".safetensors"):
        raise UsageError(f"--out: got {out!r}; allowed a name in .png, or of latents in .safetensors")
    number = (1 if prompt is not None else 64) if count is None else whole_number("count", count)
    whole_number("seed", seed, least=0)
    laid = None if steps is None else whole_number("steps", steps)
    scale = _guidance(guidance)
    if prompt is not None:
        if conditions is not None:
            raise UsageError("--conditions: got a second condition; allowed none beside --prompt")
        _sample_prompt(folder, prompt, negative, number, seed, laid, out, scale)
        return
    if negative is not None:
        raise UsageError("--negative: got it alone; allowed beside --prompt")
    _sample_choices(folder, number, seed, laid, out, conditions, scale)


def _sample_prompt(
    folder: str,
    prompt: str,
    negative: str | None,
    count: int,
    seed: int,
    steps: int | None,
    out: str,
    guidance: float | None,
) -> None:
    """Pictures of a prompt, without PyTorch."""
    from pqcad_qat.report.grid import save_grid
    from pqcad_qat.serving.text_to_image import TextToImage

    if Path(out).suffix.lower() != ".png":
        raise UsageError(f"--out: got {out!r}; allowed a name in .png, for a prompt makes pictures")
    with CONSOLE.status(Text(f"sample: {prompt}")) as status, warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)
        pipeline = TextToImage.from_pretrained(folder)
        laid, done = steps or pipeline.steps, 0

        def advance(_images: int) -> None:
            nonlocal done
            done += 1
            status.update(f"sample: step {done} of {laid}")

        save_grid(pipeline(prompt, negative, guidance, steps, seed, count, advance), Path(out))
    for warning in told:
        CONSOLE.print(f"warning: {warning.message}", soft_wrap=True, markup=False, highlight=False)
    scale = pipeline.guidance if guidance is None else guidance
    CONSOLE.print(
        f"{out}: {count} images of {prompt!r}, {laid} steps, guidance {scale:g}, openvino",
        soft_wrap=True,
        highlight=False,
    )


def _sample_choices(
    folder: str, count: int, seed: int, steps: int | None, out: str, conditions: str | None, guidance: float | None
) -> None:
    """Images or latents of what the folder's policy says, or of the choices that are given."""
    import torch
    from safetensors.torch import save_file

    from pqcad_qat.data.images import to_uint8
    from pqcad_qat.machine.progress import progress_bar
    from pqcad_qat.report.grid import save_grid
    from pqcad_qat.stages.samplers import sample_states

    variant = _opened(folder, steps, conditions, guidance)
    suffixes = [".png"] * (not variant.latent or variant.decode is not None) + [".safetensors"] * variant.latent
    if (suffix := Path(out).suffix.lower()) not in suffixes:
        made = "images" if not variant.latent else "latents" if variant.decode else "latents, and has no VAE"
        raise UsageError(f"--out: got {out!r}; allowed a name in {' or '.join(suffixes)}, for {folder} makes {made}")
    with progress_bar(CONSOLE) as bar:
        task = bar.add_task("sample", total=count * variant.steps, note=variant.runtime)
        states = sample_states(variant, count, seed, min(count, 64), lambda done: bar.update(task, advance=done))
    if suffix == ".safetensors":
        save_file({"latents": states.contiguous()}, out)
    else:
        pictures = states if variant.decode is None else torch.from_numpy(variant.decode(states.numpy()))
        save_grid(to_uint8(pictures).numpy(), Path(out))
    made = "latents" if suffix == ".safetensors" else "images"
    CONSOLE.print(f"{out}: {count} {made}, {variant.steps} steps, {variant.runtime}", soft_wrap=True)


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
    from pqcad_qat.machine.progress import progress_bar
    from pqcad_qat.quality.feature_network import check_shape, load_features
    from pqcad_qat.quality.fidelity import evaluate_images, fid_protocol
    from pqcad_qat.stages.samplers import sample_images

    whole_number("images", images, least=2)
    whole_number("seed", seed, least=0)
    laid = None if steps is None else whole_number("steps", steps)
    variant = _opened(folder, laid, conditions, _guidance(guidance))
    if variant.latent:
        raise UsageError(f"{folder}: makes latents of {variant.sample_shape[0]} channels; allowed a model of images")
    source = features or _features_of(folder)
    try:
        check_shape(source, variant.sample_shape)
    except ModelError as error:
        raise UsageError(f"--features: {error}") from error
    network = load_features(source)
    with progress_bar(CONSOLE) as bar:
        task = bar.add_task("sample", total=images * variant.steps, note=variant.runtime)
        found = sample_images(variant, images, seed, 64, lambda done: bar.update(task, advance=done))
    figures = evaluate_images(found, None, network)
    protocol = fid_protocol(network, images, variant.schedule.sampler, variant.steps, seed)
    CONSOLE.print_json(json.dumps({"fid_real": figures.fid_real, "fid_protocol": asdict(protocol)}))


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

    report = measure_speed(source, Path(policy), sizes, sets, runs, throughput, _command_line(), CONSOLE)
    for table in speed_tables(report):
        CONSOLE.print(table)
    for name, why in report.left_out.items():
        CONSOLE.print(f"{name}: not timed: {why}", highlight=False)
    CONSOLE.print(f"page: {write_speed(report, folder)}", soft_wrap=True)


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
    from pqcad_qat.commands.rehearse import rehearse as rehearsed
    from pqcad_qat.commands.rehearse import stages_table, write_rehearsal
    from pqcad_qat.models.untrained import architecture_configs, architectures

    source = loaded.model.source
    if (configs := architecture_configs(source)) is None:
        known = ", ".join(architectures())
        raise UsageError(
            f"--model: got {source!r}; allowed a denoiser's config.json, a folder with one, or an architecture: {known}"
        )

    def tell(cost: StageCost) -> None:
        CONSOLE.print(f"{cost.name}: {cost.seconds:.1f} s", highlight=False)

    found = rehearsed(loaded, configs, folder, _command_line(), tell)
    CONSOLE.print(stages_table(found))
    CONSOLE.print(f"record: {write_rehearsal(found, folder)}", soft_wrap=True)


def features(out: str, data: str = "fashion-mnist", path: str | None = None, size: int = 32) -> None:
    """Train the feature network of FID on a labelled data set, with its reference statistics.

    Args:
        out: folder to write.
        data: fashion-mnist, digits, noto-emoji, or folder.
        path: of the data, where it is not at its default place.
        size: pixels of a side.
    """
    from pqcad_qat.data.images import load_images
    from pqcad_qat.machine.progress import progress_bar
    from pqcad_qat.quality.feature_training import RECIPES, FeatureRecipe, make_features

    train = load_images(data, path, size)
    test = load_images(data, path, size, split="test") if data == "fashion-mnist" else None
    with progress_bar(CONSOLE) as bar:
        task = bar.add_task("features", total=None, note="")
        recipe = RECIPES.get(data, FeatureRecipe())
        make_features(
            Path(out),
            train,
            test,
            recipe,
            lambda step, steps, loss: bar.update(task, total=steps, completed=step, note=f"{loss:.3f}"),
        )
    CONSOLE.print(f"features: {out}", soft_wrap=True)


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


def _features_of(folder: str) -> str:
    """The feature network that belongs to a run's or an embedded model's images."""
    from pqcad_qat.quality.feature_network import embedded_features

    policy = _policy_of(folder)
    if folder in embedded_features():
        return folder
    if policy is None or policy.features is None:
        raise UsageError(
            f"--features: got none, and {folder} has none of its own; allowed "
            f"{', '.join(embedded_features())}, or a folder"
        )
    return policy.features


def _guidance(guidance: object) -> float | None:
    if guidance is not None and (not isinstance(guidance, int | float) or isinstance(guidance, bool) or guidance < 1):
        raise UsageError(f"--guidance: got {guidance!r}; allowed a number from 1")
    return guidance


def _opened(folder: str, steps: int | None, conditions: str | None, guidance: float | None) -> Variant:
    """A folder as the options of `sample` and `evaluate` want it."""
    from pqcad_qat.stages.run_folder import EMBEDDINGS
    from pqcad_qat.stages.samplers import open_folder

    section = None if (policy := _policy_of(folder)) is None else policy.conditions
    if (kept := Path(folder) / EMBEDDINGS).is_file():
        section = ConditionsPolicy(embeddings=str(kept))
    if conditions is not None and re.fullmatch(r"\[[\d, ]+\]", conditions):
        section = ConditionsPolicy(classes=tuple(int(label) for label in re.findall(r"\d+", conditions)))
    elif conditions is not None:
        section = ConditionsPolicy() if conditions == "all" else ConditionsPolicy(embeddings=conditions)
    return open_folder(folder, steps, section, guidance)


def _policy_of(folder: str) -> Policy | None:
    """The policy of a run's folder."""
    return load_policy(policy) if (policy := Path(folder) / "policy.yaml").is_file() else None


def _command_line() -> str:
    """What makes the run again, from its beginning."""
    count = launched()[1]
    start = f"accelerate launch --multi_gpu --num_processes {count}" if count > 1 else "python"
    line = f"{start} -m pqcad_qat " + shlex.join(
        argument for argument in sys.argv[1:] if argument not in ("--resume", "-r")
    )
    return line.encode(errors="backslashreplace").decode()  # it is written into pages


def _print_result(folder: Path) -> None:
    """The report's table and targets, short."""
    from pqcad_qat.report.record import UNSTEADY, UNSTEADY_NOTE
    from pqcad_qat.report.report_files import read_report

    report = read_report(folder)
    table = Table(
        "variant", "bits", "steps", "FID real", "PSNR dB", "ms/image", "MB", title=f"{report.policy['name']}: {folder}"
    )
    for row in report.variants:
        bits = "" if row.weight_bits is None else f"W{row.weight_bits:g}A{row.activation_bits:g}"
        numbers = [
            row.fid_real,
            row.psnr_fp,
            row.latency_ms_per_image,
            None if row.size_bytes is None else row.size_bytes / 1e6,
        ]
        cells = ["" if number is None else f"{number:.2f}" for number in numbers]
        cells[2] += f" {UNSTEADY}" if cells[2] and row.name in report.unsteady else ""
        table.add_row(row.name, bits, str(row.steps), *cells)
    CONSOLE.print(table)
    for row in report.variants:
        if row.did_not_run:
            CONSOLE.print(f"{row.name} did not run: {row.did_not_run}", highlight=False, markup=False, soft_wrap=True)
    if report.unsteady:
        CONSOLE.print(UNSTEADY_NOTE, highlight=False, soft_wrap=True)
    if report.quality_note:
        CONSOLE.print(report.quality_note, highlight=False)
    if floating := [f"{row.layer} ({row.kind})" for row in report.layers if row.weight_bits is None]:
        CONSOLE.print(f"in floating point: {', '.join(floating)}", highlight=False, markup=False)
    for goal in report.targets:
        mark = {True: ("holds", "green"), False: ("does not hold", "red"), None: ("not measured", "")}[goal.holds]
        measured = "-" if goal.measured is None else f"{goal.measured:.4g}"
        why = f" ({goal.note})" if goal.holds is None and goal.note else ""
        told = f": {goal.name}: {measured} {goal.comparison} {goal.bound:g}{why}"
        CONSOLE.print(Text.assemble("  ", mark, told), soft_wrap=True)
