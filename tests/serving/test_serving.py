"""What pqcad_qat/serving/README.md says runs as it stands there, without the dependencies that it does without."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import served_folder
import serving
from tiny_runs import REPOSITORY, environment

ABSENT = f"import sys; sys.modules.update(dict.fromkeys({serving.ABSENT!r})); "


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    served_folder.make(folder)
    return folder


def test_both_scripts_of_the_page_sample_the_images_of_the_full_environment(served: Path) -> None:
    program = ABSENT + "import runpy; runpy.run_path('tests/support/serving.py', run_name='__main__')"
    command = [sys.executable, "-c", program, str(served), "plain", "serve"]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == ["plain", "serve"]


def test_openvinos_own_benchmark_runs_the_shipped_file(served: Path) -> None:
    line = next(
        line
        for line in serving.PAGE.read_text().split("<!-- benchmark_app -->")[1].splitlines()
        if line.startswith("benchmark_app")
    )
    arguments = line.replace(serving.FOLDER, str(served / "int8")).replace("-t 10", "-niter 2").split()[1:]
    program = "from openvino.tools.benchmark.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "sample (node: sample) : f32 / " in done.stdout
    assert "Throughput:" in done.stdout


def test_the_serving_environment_has_the_packages_own_bounds() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    extra = project["project"]["optional-dependencies"]["text"]  # for prompts
    assert set(project["dependency-groups"]["serving"]) < {*project["project"]["dependencies"], *extra}
