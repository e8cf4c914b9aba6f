"""Nothing on the way of a run or of serving needs a module that Windows lacks."""

from __future__ import annotations

import subprocess
import sys

import pytest
from tiny_runs import REPOSITORY, environment

PROGRAM = """
import importlib, pkgutil, sys

# what other libraries do with these modules is theirs
for name in ("accelerate", "brevitas", "diffusers", "filelock", "matplotlib.pyplot", "nncf", "openvino", "psutil"):
    importlib.import_module(name)
for name in ("sklearn.datasets", "torch.utils.tensorboard", "torchmetrics", "transformers"):
    importlib.import_module(name)

for name in ("fcntl", "grp", "pwd", "resource", "termios"):
    sys.modules[name] = None
import pqcad_qat

for entry in pkgutil.walk_packages(pqcad_qat.__path__, "pqcad_qat."):
    if not entry.name.endswith("__main__"):
        importlib.import_module(entry.name)
"""
"""A program in which the modules cannot be imported."""


@pytest.mark.long
def test_every_file_is_imported_without_the_modules_of_posix() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=REPOSITORY, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
