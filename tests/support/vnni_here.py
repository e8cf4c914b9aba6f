"""What 8-bit weights come to on the CPU that runs the tests: without VNNI their integer sums may overflow.

Not here: any test, or which layers need VNNI (pqcad_qat/export/traceable_modules.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from pqcad_qat.serving.vnni import has_vnni

VNNI = has_vnni() is not False

NEEDS_VNNI = pytest.mark.skipif(not VNNI, reason="this CPU has no VNNI: integer sums of 8-bit weights may overflow")


def exact_or_excused(report: Mapping[str, Any]) -> int:
    """Number of layers of a report that give PyTorch's integers, or overflow for want of VNNI as the report says."""
    excused = set() if VNNI else {*report["execution"]["needs_vnni"]}
    inexact = {row["layer"] for row in report["layers"] if row["exact"] is False}
    exact: int = report["parity"]["layers_exact"]
    return exact + len(inexact & excused)
