"""A run sends no usage reports: both libraries find nothing that could send them."""

from __future__ import annotations

import subprocess
import sys

from tiny_runs import environment

SCRIPT = """
from pqcad_qat.machine.usage_reports import report_no_usage

report_no_usage()
import nncf.telemetry.wrapper, openvino.tools.ovc.telemetry_utils as conversion

assert "stub" in conversion.tm.__name__, conversion.tm
assert isinstance(nncf.telemetry.wrapper.telemetry, nncf.telemetry.wrapper.NNCFTelemetryStub)
"""


def test_neither_library_has_a_sender() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_tests_send_none() -> None:
    assert sys.modules["openvino_telemetry"] is None
