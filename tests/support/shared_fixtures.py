"""Fixtures shared by several test files: a tiny full-precision model in diffusers layout, a policy for it, and one real
run.

conftest.py loads them in processes that run tests. Not here: any test, or helpers that no fixture needs.
"""

from __future__ import annotations

import io
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

# imported before torch, because it sets the environment
from tiny_runs import (
    POLICIES,
    REPOSITORY,
    SCHEDULER,
    CommandLine,
    FinishedRun,
    environment,
    program,
    saved_tiny_unet,
    tiny_overrides,
    with_one_setting_of_nncf,
    without_timed_estimates,
)

# isort: split

import pytest
import torch
from accelerate.state import AcceleratorState
from forked_program import ForkedProgram, program_server
from rich.console import Console

from pqcad_qat.models.denoiser import DiffusionModel
from pqcad_qat.models.model_loading import load_model
from pqcad_qat.policy.loading import load_policy
from pqcad_qat.policy.schema import Policy
from pqcad_qat.stages.time_estimate import measured_pace


@pytest.fixture(autouse=True)
def as_at_first() -> None:
    """Forget what earlier tests have set for the whole process: Accelerate's precision, and torch's number of threads.
    With one thread sums have one order, so repeated runs can be bitwise equal.
    """
    AcceleratorState._reset_state()
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def untimed_estimates() -> Iterator[None]:
    """All runs of this process but `tiny_run`."""
    with without_timed_estimates():
        yield


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Diffusers folder: UNet2DModel of 32x32, one channel, attention at the lower level, seeded random weights."""
    return saved_tiny_unet(tmp_path_factory.mktemp("model") / "tiny", SCHEDULER)


@pytest.fixture(scope="session")
def tiny_model(tiny_folder: Path) -> DiffusionModel:
    return load_model(str(tiny_folder))


@pytest.fixture(scope="session")
def tiny_policy(tiny_folder: Path) -> Policy:
    return load_policy(POLICIES / "smoke.yaml", tiny_overrides(tiny_folder))


@pytest.fixture(scope="session")
def tiny_run(tiny_policy: Policy, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """One real run from policy to report, made in this process."""
    from pqcad_qat.commands import run as pipeline

    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("runs") / "tiny"
    torch.set_num_threads(1)  # an earlier test may have timed something on all cores
    printed = io.StringIO()
    console = Console(file=printed, width=200)
    with with_one_setting_of_nncf(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("pqcad_qat.timing.latency.usable_cores", lambda: 1)  # tests do not check timings
        patch.setattr("pqcad_qat.commands.run.measured_pace", measured_pace)
        page = pipeline.run(tiny_policy, path, "python -m pqcad_qat run tiny.yaml", console)
    return FinishedRun(path, page, tiny_policy, printed.getvalue())


@pytest.fixture(scope="session")
def command_line() -> CommandLine:
    """Function that runs `python -m pqcad_qat ARGUMENTS` in a separate process."""

    def call(*arguments: str | Path, cwd: Path = REPOSITORY) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            program(arguments), cwd=cwd, env=environment(), capture_output=True, text=True, check=False, timeout=300
        )

    return call


@pytest.fixture(scope="session")
def start_program() -> Iterator[Callable[..., ForkedProgram]]:
    """Function that starts `python -m pqcad_qat ARGUMENTS` as a process which need not import anything."""
    with program_server(environment()) as start:
        yield start
