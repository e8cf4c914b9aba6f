"""The reports of OpenVINO and NNCF to their maker, which this program does not send.

Not here: what a run tells its user (progress.py, and the package report).
"""

from __future__ import annotations

import sys


def report_no_usage() -> None:
    """Keep OpenVINO and NNCF from sending a report with every conversion.

    They send it without asking, from a forked copy of the process, which took longer than the conversion of a small
    model. The package that sends is optional for both, and here it cannot be imported. It must be called before
    either of them is imported.
    """
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
