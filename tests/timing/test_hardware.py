"""The description of the machine that timings depend on: its CPU, instruction sets and caps.

Not here: timing (test_latency.py).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pqcad_qat.timing.hardware import hardware, lacking, native_bf16


def cpuinfo(folder: Path, flags: str) -> Path:
    path = folder / "cpuinfo"
    path.write_text(
        f"processor\t: 0\nmodel name\t: Some CPU @ 2.00GHz\nflags\t\t: fpu {flags}\n\nprocessor\t: 1\n",
        encoding="utf-8",
    )
    return path


def test_hardware_reads_model_and_instruction_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    found = hardware(cpuinfo(tmp_path, "avx2 avx512_vnni amx_bf16 amx_tile amx_int8 avx_vnni avx512_bf16 avx512_vnni2"))
    assert found.cpu == "Some CPU @ 2.00GHz"
    assert found.isa == ("avx2", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
    assert found.native_bf16 is True
    assert found.cores >= 1
    assert found.versions["torch"] == torch.__version__
    assert set(found.versions) >= {"python", "openvino", "nncf", "brevitas", "diffusers"}


def test_hardware_tells_two_models_of_one_name_apart(tmp_path: Path) -> None:
    path = cpuinfo(tmp_path, "avx2")
    path.write_text("cpu family\t: 26\nmodel\t\t: 2\n" + path.read_text(encoding="utf-8"), encoding="utf-8")
    assert hardware(path).cpu == "Some CPU @ 2.00GHz (family 26, model 2)"


def test_hardware_records_settings_that_change_timings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2_VNNI")
    found = hardware(cpuinfo(tmp_path, "avx2 avx512_bf16"))
    assert found.settings["ONEDNN_MAX_CPU_ISA"] == "AVX2_VNNI"
    assert found.native_bf16 is False


def test_hardware_without_cpuinfo_knows_nothing_of_instruction_sets(tmp_path: Path) -> None:
    found = hardware(tmp_path / "absent")
    assert found.isa == ()
    assert found.native_bf16 is None


@pytest.mark.parametrize(
    ("isa", "cap", "native"),
    [
        (("avx512_bf16",), "", True),
        (("amx_bf16",), "avx512_core_amx", True),
        (("avx2", "avx512_vnni"), "", False),
        (("amx_bf16",), "AVX512_CORE_VNNI", False),
    ],
)
def test_bf16_is_native_where_cpu_and_cap_allow(isa: tuple[str, ...], cap: str, native: bool) -> None:
    assert native_bf16(isa, {"ONEDNN_MAX_CPU_ISA": cap}) is native


@pytest.mark.parametrize(
    ("isa", "has", "why"),
    [
        ("native", ("avx2",), ""),
        ("avx2_vnni", ("avx2", "avx_vnni"), ""),
        ("avx2_vnni", ("avx2", "avx512_vnni"), "this CPU has no avx_vnni"),
        ("avx512_core_vnni", ("avx2", "avx_vnni"), "this CPU has no avx512_vnni"),
        ("avx512_core_vnni", (), ""),  # unknown
    ],
)
def test_a_cap_above_the_cpus_own_instruction_set_means_nothing(
    tmp_path: Path, isa: str, has: tuple[str, ...], why: str
) -> None:
    machine = hardware(cpuinfo(tmp_path, " ".join(has)) if has else tmp_path / "absent")
    assert lacking(isa, machine) == why
