"""Whether this process may use VNNI, without which integer sums of 8-bit weights can overflow.

Not here: which layers need it (export/traceable_modules.py).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CAPS_WITHOUT_VNNI = ("SSE41", "AVX", "AVX2", "AVX512_CORE")
"""Values of ONEDNN_MAX_CPU_ISA that exclude VNNI. The variable limits oneDNN, and so OpenVINO, to the instructions of
an older CPU.
"""


def has_vnni(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool | None:
    """Whether OpenVINO may use VNNI in this process: the CPU has it and ONEDNN_MAX_CPU_ISA allows it.

    None means that neither is known.
    """
    cap = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    if cap in CAPS_WITHOUT_VNNI:
        return False
    if not cpuinfo.is_file():
        return None
    flags = set(cpuinfo.read_text(encoding="utf-8", errors="replace").split())
    return "avx_vnni" in flags or ("avx512_vnni" in flags and not cap.startswith("AVX2"))


def warn_without_vnni(manifest: Mapping[str, Any], folder: Path) -> None:
    """Warn if layers of the folder need VNNI and this process has none."""
    needing = [name for name, layer in manifest["layers"].items() if layer.get("needs_vnni")]
    if needing and has_vnni() is False:
        warnings.warn(
            f"{folder}: this CPU has no VNNI, without which the integer sums of {len(needing)} layers may overflow, "
            f"{needing[0]} for one: predictions may be wrong; weights of 7 bits and fewer are exact on every CPU",
            stacklevel=3,
        )
