"""The kernels for GPUs: `gpu_kernels.py` in a process of its own, for Triton is told to interpret them before it is
imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from tiny_runs import SUPPORT


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.skipif(
    find_spec("triton") is None,
    reason="Triton is not installed; it comes with torch's builds for GPUs, and with the extra `test`",
)
def test_kernels_give_the_eager_values_and_gradients() -> None:
    environment = dict(os.environ) if torch.cuda.is_available() else {**os.environ, "TRITON_INTERPRET": "1"}
    # without the fixtures of all tests, which import everything
    options = ["-q", "-p", "no:cacheprovider", "--noconftest"]
    command = [sys.executable, "-m", "pytest", *options, str(SUPPORT / "gpu_kernels.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def test_cpus_do_not_import_triton() -> None:
    code = (
        "import sys, torch; before = 'triton' in sys.modules; from "
        "pqcad_qat.quantization.fake_quantization import quantize; "
        "quantize(torch.ones(4), torch.tensor(1.0), None, (-7, 7), straight=True); "
        "assert before or 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
