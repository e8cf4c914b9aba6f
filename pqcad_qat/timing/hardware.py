"""Hardware and software that timings depend on: CPU, instruction sets and their caps, cores, library versions.

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

ISA_FLAGS: Mapping[str, str] = {
    "avx2": "avx2",
    "avx_vnni": "avx_vnni",
    "avx512_vnni": "avx512_vnni",
    "avx512_bf16": "avx512_bf16",
    "amx_int8": "amx_int8",
    "amx_bf16": "amx_bf16",
}
"""Flag in the kernel's /proc/cpuinfo, by the report's name of the instruction set."""

NATIVE = "native"
"""Name of the CPU's own instruction sets, without a cap."""

CAPS: Mapping[str, Mapping[str, str]] = {
    "avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
    "avx2_vnni": {"ONEDNN_MAX_CPU_ISA": "AVX2_VNNI", "ATEN_CPU_CAPABILITY": "avx2"},
    "avx512_core_vnni": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"},
}
"""Environment variables, by cap, with which a process computes as on a smaller CPU.

OpenVINO and PyTorch read them once, so they must be set when the process starts.
"""

INSTRUCTION_SETS = (NATIVE, *CAPS)
"""Names of all choices: no cap, or one of the caps."""

_CAP_NEEDS: Mapping[str, str] = {"avx2": "avx2", "avx2_vnni": "avx_vnni", "avx512_core_vnni": "avx512_vnni"}
"""Instruction set that the CPU must have, by cap."""

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
"""Values of ONEDNN_MAX_CPU_ISA under which OpenVINO can still compute bfloat16 in hardware."""

_LIBRARIES = ("torch", "openvino", "nncf", "brevitas", "diffusers", "numpy")
"""Libraries whose versions are recorded."""

_SETTINGS = (
    "ONEDNN_MAX_CPU_ISA",
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "KMP_BLOCKTIME",
    "DNNL_MAX_CPU_ISA",
    "ATEN_CPU_CAPABILITY",
)
"""Environment variables that are recorded because they change timings."""


def hardware(cpuinfo: Path = Path("/proc/cpuinfo")) -> Hardware:
    """Describe this machine; where there is no ``cpuinfo``, the instruction sets are unknown and left empty."""
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
    """Whether OpenVINO's bfloat16 runs in hardware here; emulated bfloat16 is no useful baseline."""
    cap = (settings.get("ONEDNN_MAX_CPU_ISA") or settings.get("DNNL_MAX_CPU_ISA") or "").upper()
    return bool({"avx512_bf16", "amx_bf16"} & set(isa)) and cap in _BF16_CAPS


def lacking(isa: str, machine: Hardware) -> str:
    """Why a machine cannot compute with this instruction set; empty if it can.

    Under a cap above the CPU's own instruction sets it would use others.
    """
    need = _CAP_NEEDS.get(isa)
    if need is None or not machine.isa or need in machine.isa:
        return ""
    return f"this CPU has no {need}"


def _cpu(text: str) -> str:
    """Name, family and model number of the CPU: a virtual machine's name is often no more than "AMD EPYC"."""
    name, family, model = (_field(text, key) for key in ("model name", "cpu family", "model"))
    known = name and family[-1:].isdigit() and model[-1:].isdigit()
    return f"{name} (family {family}, model {model})" if known else name


def _field(text: str, key: str) -> str:
    """The first value of a key in /proc/cpuinfo; empty if there is none."""
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
