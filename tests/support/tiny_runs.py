"""A tiny full-precision model, the overrides with which a run of it takes seconds, and helpers with which tests start
processes.

Not here: fixtures (shared_fixtures.py), or any test. Nothing needs a network or a data set.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

os.environ["HF_HUB_OFFLINE"] = "1"  # must be set before any hub client is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")  # fixes the order of sums, so that repeated runs can be bitwise equal
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads leave the cores to others

import no_usage_reports  # noqa: F401  # before OpenVINO is imported
import seldom_collected  # noqa: F401

# isort: split

import numpy as np
import openvino as ov
import torch
from diffusers import UNet2DModel

from pqcad_qat.models.model_loading import save_model
from pqcad_qat.policy.schema import Policy
from pqcad_qat.stages.time_estimate import Pace
from pqcad_qat.timing.baseline_trials import NNCF_SETTINGS, save_openvino

# A shell's background job ignores Ctrl-C, and processes started by tests would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

REPOSITORY = Path(__file__).resolve().parents[2]
POLICIES = REPOSITORY / "policies"
SUPPORT = Path(__file__).resolve().parent
AT_START = SUPPORT / "at_start"
"""Folder of the module that every process started by a test imports first."""

os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(AT_START), os.environ.get("PYTHONPATH"))))

SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "clip_sample": False,
}

TINY = (  # overrides of policies/smoke.yaml: a run that takes seconds, and still passes through every stage
    "name=tiny",
    "sampler.steps=4",
    "distillation.student_steps=2",
    "calibration.trajectories=4",
    "calibration.batch_size=4",
    "post_training.rounding=nearest",
    "progressive.steps=9",
    "distillation.steps=6",
    "training.batch_size=4",
    "training.checkpoint_every=3",
    "training.samples_every=4",
    "evaluation.images=8",
    "evaluation.batch_size=8",
    "evaluation.features=embedded:fashion-mnist",  # the tiny model makes images of its shape
    "export.latency_runs=2",
)


QUIET = ("training.checkpoint_every=1000", "training.samples_every=0")
"""Overrides for tests that look at what training ends with: no checkpoints and no samples on the way."""


@dataclass(frozen=True)
class FinishedRun:
    """A run that was made once, for tests that must not change it.

    Attributes:
        path: folder of the run.
        page: path of the report's page, as returned by the pipeline.
        policy: policy of the run.
        output: text that it printed.
    """

    path: Path
    page: Path
    policy: Policy
    output: str


CommandLine = Callable[..., subprocess.CompletedProcess[str]]


def tiny_unet() -> UNet2DModel:
    return UNet2DModel(
        sample_size=32,
        in_channels=1,
        out_channels=1,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        attention_head_dim=32,
        add_attention=False,  # beside the one above: each layer costs a run a second
        norm_num_groups=8,
    )


def saved_tiny_unet(folder: Path, scheduler: dict[str, object]) -> Path:
    """Write the tiny UNet with seeded random weights as a diffusers folder, and return the folder."""
    torch.manual_seed(0)
    save_model(tiny_unet().eval(), scheduler, folder)
    return folder


def tiny_overrides(model: Path, *more: str) -> list[str]:
    return [f"model.source={model}", *TINY, *more]


def without_images() -> AbstractContextManager[object]:
    """Runs that are made in this context end with their models: no images are sampled and compared, and no report is
    written.
    """
    return patch.multiple(
        "pqcad_qat.commands.run",
        sample=lambda *_, **__: None,
        evaluate=lambda *_: None,
        report=lambda _policy, _prepared, run, _command: run.path / "report.html",
    )


def without_page() -> AbstractContextManager[object]:
    """Reports that are written in this context have an empty page: charts take a second, and other runs of the same
    variants draw them.
    """
    return patch("pqcad_qat.report.report_files.render_page", lambda *_: "")


@contextmanager
def without_trials() -> Iterator[None]:
    """Runs and benchmarks that are made in this context start no processes for their baselines: full precision's graph
    is not tried out before it is timed, and a copy of it stands for NNCF's, which takes seconds to make. Few tests look
    at what comes of either.
    """
    for_baselines = {"nncf_baseline": _copied_graph, "try_out": lambda *_: None}
    with (
        patch.multiple("pqcad_qat.stages.baselines", **for_baselines),
        patch.multiple("pqcad_qat.commands.benchmark_subject", **for_baselines),
    ):
        yield


def without_timed_estimates() -> AbstractContextManager[object]:
    """Runs that are made in this context print an estimate of no meaning: to time calls and training steps for it takes
    seconds of each.
    """
    return patch("pqcad_qat.commands.run.measured_pace", lambda *_: Pace(full=1e-3, quantized=2e-3, step=1e-2))


def with_one_setting_of_nncf() -> AbstractContextManager[object]:
    """Runs that are made in this context try NNCF's defaults alone: each setting takes a quantization of its own."""
    return patch("pqcad_qat.stages.baselines.NNCF_SETTINGS", NNCF_SETTINGS[:1])


def _copied_graph(float_xml: Path, _inputs: object, folder: Path, *_: object, **__: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for file in (float_xml, float_xml.with_suffix(".bin")):
        shutil.copyfile(file, folder / file.name)
    return folder / float_xml.name


def fixed_batch_graph(batch: int, sample_shape: tuple[int, ...], folder: Path) -> Path:
    """Write a graph with a denoiser's inputs and a constant batch size; return its xml file."""
    ports = [
        ov.opset13.parameter([batch, *sample_shape], np.float32, name="sample"),
        ov.opset13.parameter([batch], np.int64, name="timestep"),
    ]
    rows = ov.opset13.reshape(ports[0], np.array([batch, -1, 1]), special_zero=False)
    image = ov.opset13.reshape(rows, np.array([batch, *sample_shape]), special_zero=False)
    return save_openvino(ov.Model([ov.opset13.result(image)], ports), folder)


def program(arguments: Sequence[str | Path]) -> list[str]:
    return [sys.executable, "-m", "pqcad_qat", *map(str, arguments)]


def environment() -> dict[str, str]:
    """Environment of a subprocess: this source tree, no network, one thread, plain text."""
    search = os.pathsep.join(map(str, (AT_START, REPOSITORY)))
    return {**os.environ, "PYTHONPATH": search, "COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}
