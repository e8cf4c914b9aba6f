"""What machine this is, as far as it decides timings: CPU, instruction sets and caps on them, cores, library versions.

Not here: any timing (latency.py).
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Mapping
from pathlib import Path

from pqcad_qat.machine.cores import usable_cores
from pqcad_qat.report.record import Hardware

# the report's name of an instruction set -> the kernel's name in /proc/cpuinfo
ISA_FLAGS: Mapping[str, str] = {
    "avx2": "avx2",
    "avx_vnni": "avx_vnni",
    "avx512_vnni": "avx512_vnni",
    "avx512_bf16": "avx512_bf16",
    "amx_int8": "amx_int8",
    "amx_bf16": "amx_bf16",
}
NATIVE = "native"
CAPS: Mapping[str, Mapping[str, str]] = {
    "avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
    "avx2_vnni": {"ONEDNN_MAX_CPU_ISA": "AVX2_VNNI", "ATEN_CPU_CAPABILITY": "avx2"},
    "avx512_core_vnni": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"},
}
"""What a process must find in its environment when it starts, to compute as on a smaller CPU: OpenVINO and PyTorch read
it once.
"""

INSTRUCTION_SETS = (NATIVE, *CAPS)
_CAP_NEEDS: Mapping[str, str] = {"avx2": "avx2", "avx2_vnni": "avx_vnni", "avx512_core_vnni": "avx512_vnni"}
# values of ONEDNN_MAX_CPU_ISA under which OpenVINO may still compute bfloat16 in hardware
_BF16_CAPS = (
    "",
    "ALL",
    "DEFAULT",
    "AVX512_CORE_BF16",
    "AVX512_CORE_FP16",
    "AVX512_CORE_AMX",
    "AVX512_CORE_AMX_FP16",
    "AVX10_1_512_AMX",
)
_LIBRARIES = ("torch", "openvino", "nncf", "brevitas", "diffusers", "numpy")
_SETTINGS = (
    "ONEDNN_MAX_CPU_ISA",
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "KMP_BLOCKTIME",
    "DNNL_MAX_CPU_ISA",
    "ATEN_CPU_CAPABILITY",
)


def hardware(cpuinfo: Path = Path("/proc/cpuinfo")) -> Hardware:
    """This machine. Where the system has no ``cpuinfo`` the instruction sets are unknown and left empty."""
    text = cpuinfo.read_text(encoding="utf-8", errors="replace") if cpuinfo.is_file() else ""
    flags = set(_field(text, "flags").split())
    isa = tuple(name for name, flag in ISA_FLAGS.items() if flag in flags)
    settings = {name: os.environ[name] for name in _SETTINGS if name in os.environ}
    return Hardware(
        cpu=_cpu(text) or platform.processor() or "unknown",
        isa=isa,
        cores=usable_cores(),
        versions={"python": platform.python_version()} | {name: _version(name) for name in _LIBRARIES},
        native_bf16=native_bf16(isa, settings) if text else None,
        settings=settings,
    )


def native_bf16(isa: tuple[str, ...], settings: Mapping[str, str]) -> bool:
    """Whether OpenVINO's bfloat16 runs in hardware here; elsewhere it is emulated and no baseline."""
    cap = (settings.get("ONEDNN_MAX_CPU_ISA") or settings.get("DNNL_MAX_CPU_ISA") or "").upper()
    return bool({"avx512_bf16", "amx_bf16"} & set(isa)) and cap in _BF16_CAPS


def lacking(isa: str, machine: Hardware) -> str:
    """Why a machine cannot compute as with this instruction set, or nothing: under a cap above its own it would use
    another.
    """
    need = _CAP_NEEDS.get(isa)
    return "" if need is None or not machine.isa or need in machine.isa else f"this CPU has no {need}"


def _cpu(text: str) -> str:
    """The model's name, and its family and number: of a virtual machine the name is often no more than "AMD EPYC"."""
    name, numbers = (
        _field(text, "model name"),
        [f"{key} {_field(text, of)}" for key, of in (("family", "cpu family"), ("model", "model"))],
    )
    return f"{name} ({', '.join(numbers)})" if name and all(number[-1].isdigit() for number in numbers) else name


def _field(text: str, key: str) -> str:
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
