"""The commands that take a folder or data: each makes one call into commands/ and prints the result.

Not here: the commands that take a policy (policy_commands.py), nor any work. Heavy libraries are imported inside the
functions, so that `--help` appears at once.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from pqcad_qat import console
from pqcad_qat.arguments import (
    command_line,
    guidance_scale,
    height_and_width,
    one_of,
    output_folder,
    scaled_file,
    several,
    whole_number,
)
from pqcad_qat.errors import UsageError
from pqcad_qat.policy.shipped import policy_file
from pqcad_qat.policy.variants import DEPLOYED


def report(folder: str) -> None:
    """Make the report and the page of a finished run again, from what its folder holds.

    Args:
        folder: folder of the run.
    """
    from pqcad_qat.commands.report import report as report_again

    console.show_result(Path(folder), report_again(Path(folder)))


def assemble(
    source: str,
    out: str,
    config: str | None = None,
    loras: tuple[str, ...] = (),
    embeddings: tuple[str, ...] = (),
) -> None:
    """Make a folder in diffusers' layout of a checkpoint in a single file, LoRA files and textual inversions.

    Args:
        source: .safetensors file with a whole pipeline, diffusers folder, or hub id.
        out: folder to write, in float32; new or empty. Give it to the other commands as --model.
        config: for a single file, the diffusers folder or hub id of the same architecture; its weights are not read.
        loras: LoRA files, which are added to the weights, each as FILE or as FILE:SCALE, such as style.safetensors:0.8.
        embeddings: files of textual inversions; prompts write <NAME> for NAME.safetensors.
    """
    from pqcad_qat.commands.assemble import assemble as assemble_folder
    from pqcad_qat.models.lora import Lora

    folder = output_folder(out)
    scaled = [Lora(Path(file), scale) for file, scale in map(scaled_file, loras)]
    made = assemble_folder(
        source,
        folder,
        config=config,
        loras=scaled,
        words=[Path(file) for file in embeddings],
        console=console.CONSOLE,
    )
    console.tell(
        *(f"added: {file}, {layers} layers" for file, layers in made.loras.items()),
        *(f"in prompts: {word}" for word in made.words.values()),
        f"{made.pipeline}: {folder}",
    )


def export(
    run: str,
    out: str,
    variant: str | None = None,
    weights: str | None = None,
    batch_size: int | None = None,
    size: str | None = None,
    module: str | None = None,
) -> None:
    """Deploy what a run has trained or calibrated in another format, batch or size; nothing is trained again.

    Args:
        run: folder of the run, or a PyTorch folder that it has left (student/), wherever that lies now.
        out: folder to write; an older deployed folder there is replaced.
        variant: ptq, fixed-bit, pq, pq-distilled or pqcad; by default the first that the run deploys.
        weights: format on disk, int8 or packed; by default the policy's.
        batch_size: fixed batch size; by default the policy's.
        size: height and width of x_t, as 64 or as 64,96; by default the run's.
        module: module of your own that the run was made with, as FILE.py:FUNCTION.
    """
    from pqcad_qat.commands.export import FolderAsked
    from pqcad_qat.commands.export import export as export_variant
    from pqcad_qat.models.own_model import own_model_of
    from pqcad_qat.serving.packing import PACKED_WIDTHS

    if variant is not None:
        one_of("variant", [variant], tuple(DEPLOYED))
    if weights is not None:
        one_of("weights", [weights], tuple(PACKED_WIDTHS))
    asked = FolderAsked(
        variant,
        next((name for name in PACKED_WIDTHS if name == weights), None),
        None if batch_size is None else whole_number("batch-size", batch_size),
        None if size is None else height_and_width("size", size),
    )
    own, folder = None if module is None else own_model_of(module), output_folder(out)
    done = export_variant(Path(run), asked, out=folder, console=console.CONSOLE, own=own)
    console.tell(*done.facts(), f"deployed: {folder}")


def compare(*runs: str, out: str | None = None) -> None:
    """Compare finished runs in one table and chart; runs that differ only in their seed become a mean and a spread.

    Args:
        runs: folders of finished runs.
        out: page to write, or a folder for it; by default comparison.html beside the first run. The same table is
            written beside the page as .json and .md.
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
    size: str | None = None,
    image: str | None = None,
    mask: str | None = None,
    strength: float | None = None,
    solver: str | None = None,
) -> None:
    """Sample images from a folder, also from a prompt, and write them as a grid; or write latents.

    Args:
        folder: a run, a deployed OpenVINO folder, a quantized student, embedded:NAME, or another full-precision
            diffusers folder.
        count: number of images; by default 64, and 1 with a prompt.
        seed: seed of the noise; image k of a seed starts from the same noise in every kind of folder.
        steps: number of sampling steps; by default the number that the folder was made for.
        out: PNG file for images. A model of latents writes a safetensors file of latents, or pictures if its folder has
            a VAE.
        conditions: conditions of a conditional model: all, class labels as [0,3], or a safetensors file of embeddings;
            by default those of a run's policy, or all classes.
        guidance: scale of classifier-free guidance; by default the one that the folder was made for.
        prompt: what the image shows, for a run or deployed folder with a whole text-to-image pipeline; needs no
            PyTorch.
        negative: what the image does not show; only with a prompt and guidance.
        size: height and width of the images in pixels, as 512 or as 512,768; only with a prompt.
        image: file of a picture that the prompt changes.
        mask: file of a picture of the same size; where it is bright, the image is painted anew, and else kept.
        strength: share of the sampling steps that change the image, over 0 to 1; by default 0.8, or 1 with a mask.
        solver: another sampler than the folder's own: euler, dpm++2m, unipc or lcm; only with a prompt.
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
        size=None if size is None else height_and_width("size", size),
        image=None if image is None else Path(image),
        mask=None if mask is None else Path(mask),
        strength=strength,
        solver=solver,
    )
    sampled = sample_folder(request, console.PROGRESS)
    console.tell(*(f"warning: {warning}" for warning in sampled.warnings), f"{out}: {sampled.text}")


def demo(folder: str, host: str = "127.0.0.1", port: int = 7860) -> None:
    """Show a page that makes pictures with a deployed folder, beside full precision's from the same noise.

    Args:
        folder: a run, beside which full precision is shown, or a deployed folder.
        host: address that it listens at; 0.0.0.0 shows it to the whole network.
        port: port that it listens at.
    """
    from pqcad_qat.commands.demo import demo as show_demo

    show_demo(Path(folder), host=host, port=whole_number("port", port, most=65535), tell=console.tell)


def evaluate(
    folder: str,
    images: int = 512,
    seed: int = 1234,
    steps: int | None = None,
    features: str | None = None,
    reference: str | None = None,
    conditions: str | None = None,
    guidance: float | None = None,
) -> None:
    """Print the distances of a folder's images to real ones, with the protocol of their measurement.

    Args:
        folder: a run, a deployed OpenVINO folder, a quantized student, embedded:NAME, or another full-precision
            diffusers folder.
        images: number of images that are sampled.
        seed: seed of their noise.
        steps: number of sampling steps; by default the number that the folder was made for.
        features: feature network: embedded:NAME or a folder, with statistics of real images, efficientnet-lite0, or the
            file of FID's Inception weights; by default the one of a run's policy, or an embedded model's own.
        reference: folder of real pictures; by default that of a run's policy, or the feature network's statistics.
        conditions: conditions of a conditional model: all, class labels as [0,3], or a safetensors file of embeddings;
            by default those of a run's policy, or all classes.
        guidance: scale of classifier-free guidance; by default the one that the folder was made for.
    """
    from pqcad_qat.commands.evaluate import evaluate as evaluate_folder

    evaluation = evaluate_folder(
        folder,
        images=whole_number("images", images, least=2),
        seed=whole_number("seed", seed, least=0),
        steps=None if steps is None else whole_number("steps", steps),
        features=features,
        reference=reference,
        conditions=conditions,
        guidance=guidance_scale(guidance),
        console=console.PROGRESS,
    )
    protocol = {**asdict(evaluation.fid_protocol), "under_10000": evaluation.fid_protocol.under_10000}
    keys = ("fid_real", "kid_real", "kid_real_error", "precision", "recall")
    figures = {key: getattr(evaluation.figures, key) for key in keys}
    console.CONSOLE.print_json(json.dumps({**figures, "fid_protocol": protocol}))


def benchmark(
    source: str,
    batches: tuple[int, ...] = (1, 8),
    isa: tuple[str, ...] = ("native",),
    runs: int = 100,
    throughput: bool = True,
    peers: bool = False,
    policy: str = "w4a8",
    out: str = "benchmark",
) -> None:
    """Time a deployed folder or an architecture in turns with PyTorch, OpenVINO in float32 and BF16, and NNCF's INT8.

    Args:
        source: a run or deployed OpenVINO folder; or an architecture with random weights: a denoiser's config.json, a
            folder with one, or the name of one that ships, such as ddpm-cifar10-32.
        batches: numbers of images in a call, as [1,8].
        isa: instruction sets out of native, avx2, avx2_vnni, avx512_core_vnni; each except native gets a process of
            its own.
        runs: number of timed calls of each candidate.
        throughput: also measure throughput with several calls at a time; --nothroughput leaves it out.
        peers: beside NNCF's defaults, a row for each further setting of it, and one for optimum-intel's hybrid one.
        policy: policy file, or the name of one that ships; an architecture gets its quantization rules. Its model and
            its training do not matter.
        out: folder for benchmark.json and benchmark.html.
    """
    from pqcad_qat.timing.baseline_trials import NNCF_SETTINGS
    from pqcad_qat.timing.hardware import INSTRUCTION_SETS

    sizes = [whole_number("batches", batch) for batch in several("batches", batches)]
    sets = one_of("isa", several("isa", isa), INSTRUCTION_SETS)
    whole_number("runs", runs)
    for flag, value in (("throughput", throughput), ("peers", peers)):
        if not isinstance(value, bool):
            raise UsageError(f"--{flag}: got {value!r}; allowed --{flag} or --no{flag}")
    folder = output_folder(out)
    from pqcad_qat.commands.benchmark import measure_speed
    from pqcad_qat.report.benchmark_page import speed_tables, write_speed

    report = measure_speed(
        source,
        policy_file(policy),
        sizes,
        sets,
        nncf=NNCF_SETTINGS if peers else NNCF_SETTINGS[:1],
        runs=runs,
        throughput=throughput,
        command=command_line(),
        console=console.CONSOLE,
    )
    console.show(*speed_tables(report))
    console.tell(*(f"{name}: not timed: {why}" for name, why in report.left_out.items()))
    console.tell(f"page: {write_speed(report, folder)}")


def features(out: str, data: str = "fashion-mnist", path: str | None = None, size: int = 32) -> None:
    """Train a feature network for distances on a labelled data set, with its reference statistics.

    Args:
        out: folder that gets the network.
        data: kind of data, one of fashion-mnist, digits, noto-emoji and folder.
        path: path of the data, which the kind folder needs; the others have a usual place.
        size: side of the images in pixels.
    """
    from pqcad_qat.commands.features import features as train_features

    console.tell(f"features: {train_features(Path(out), data, path, size, console=console.CONSOLE)}")
