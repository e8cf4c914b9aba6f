"""The commands that take a folder or data: arguments become one call into commands/, and what comes back is printed.

Not here: the commands that take a policy (cli.py), nor any work. Heavy libraries are imported inside the
functions.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from pqcad_qat import console
from pqcad_qat.arguments import command_line, guidance_scale, one_of, output_folder, several, whole_number
from pqcad_qat.errors import UsageError
from pqcad_qat.policy.shipped import policy_file


def report(folder: str) -> None:
    """Make the report and page of a finished run again; its folder holds all that they need.

    Args:
        folder: of the run.
    """
    from pqcad_qat.commands.report import report as report_again

    console.show_result(Path(folder), report_again(Path(folder)))


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
    console.show(*comparison_tables(comparison))
    console.tell(f"page: {page}")


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
    from pqcad_qat.commands.sample import SampleRequest
    from pqcad_qat.commands.sample import sample as sample_folder

    request = SampleRequest(
        folder=folder,
        count=None if count is None else whole_number("count", count),
        seed=whole_number("seed", seed, least=0),
        steps=None if steps is None else whole_number("steps", steps),
        out=Path(out),
        conditions=conditions,
        guidance=guidance_scale(guidance),
        prompt=prompt,
        negative=negative,
    )
    sampled = sample_folder(request, console.PROGRESS)
    console.tell(*(f"warning: {warning}" for warning in sampled.warnings), f"{out}: {sampled.text}")


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
        console=console.PROGRESS,
    )
    protocol = {**asdict(evaluation.fid_protocol), "under_10000": evaluation.fid_protocol.under_10000}
    console.CONSOLE.print_json(json.dumps({"fid_real": evaluation.fid_real, "fid_protocol": protocol}))


def benchmark(
    source: str,
    batches: tuple[int, ...] = (1, 8),
    isa: tuple[str, ...] = ("native",),
    runs: int = 100,
    throughput: bool = True,
    policy: str = "w4a8",
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
        source,
        policy_file(policy),
        sizes,
        sets,
        runs=runs,
        throughput=throughput,
        command=command_line(),
        console=console.CONSOLE,
    )
    console.show(*speed_tables(report))
    console.tell(*(f"{name}: not timed: {why}" for name, why in report.left_out.items()))
    console.tell(f"page: {write_speed(report, folder)}")


def features(out: str, data: str = "fashion-mnist", path: str | None = None, size: int = 32) -> None:
    """Train the feature network of FID on a labelled data set, with its reference statistics.

    Args:
        out: folder to write.
        data: fashion-mnist, digits, noto-emoji, or folder.
        path: of the data, where it is not at its default place.
        size: pixels of a side.
    """
    from pqcad_qat.commands.features import features as train_features

    console.tell(f"features: {train_features(Path(out), data, path, size, console=console.CONSOLE)}")
