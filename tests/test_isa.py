"""Which instruction-set level is in force, and how to force another."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

import pared
from pared import _core

SHOW = "import pared; print(pared.isa())"


def run(**env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", SHOW], env=os.environ | env, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("level", _core.supported_isas())
def test_the_environment_forces_each_supported_level(level):
    assert run(PARED_ISA=level).stdout.strip() == level


def test_an_empty_value_means_the_highest():
    assert run(PARED_ISA="").stdout.strip() == _core.supported_isas()[-1]


@pytest.mark.parametrize("value", ["avx1024", "AVX2", " scalar", "scalar,avx2"])
def test_an_unknown_level_fails_at_import_and_lists_the_choices(value):
    result = run(PARED_ISA=value)
    assert result.returncode == 1
    choices = ", ".join(_core.supported_isas())
    assert f"PARED_ISA: expected one of {choices} on this machine, got '{value}'" in result.stderr


def test_set_isa_returns_the_level_before():
    before = pared.isa()
    try:
        assert _core.set_isa("scalar") == before
        assert pared.isa() == "scalar"
    finally:
        assert _core.set_isa(before) == "scalar"


def test_set_isa_refuses_and_changes_nothing():
    before = pared.isa()
    with pytest.raises(ValueError, match="isa: expected one of scalar"):
        _core.set_isa("nope")
    assert pared.isa() == before


def processor_flags(name: str) -> set[str]:
    """The kernel lists a flag when the processor has it and the register state is enabled."""
    lines = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith(name)]
    return set(lines[0].split(":")[1].split()) if lines else set()


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64") or not Path("/proc/cpuinfo").exists(),
    reason="compares with the flags that Linux reports for x86",
)
def test_detection_agrees_with_the_operating_system():
    flags = processor_flags("flags")
    assert flags
    needs = {
        "avx2": {"avx2", "fma", "f16c", "bmi1", "bmi2", "popcnt", "abm"},
        "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd"},
        "avx512vnni": {"avx512_vnni"},
        "avx512vbmi2": {"avx512vbmi", "avx512_vbmi2"},
    }
    expected = ["scalar"]
    for level, wanted in needs.items():
        if not wanted <= flags:
            break
        expected.append(level)
        if level == "avx2" and "avx_vnni" in flags:
            expected.append("avxvnni")
    assert _core.supported_isas() == expected


@pytest.mark.skipif(
    platform.machine() not in ("aarch64", "arm64") or not Path("/proc/cpuinfo").exists(),
    reason="compares with the flags that Linux reports for AArch64",
)
def test_detection_agrees_with_the_operating_system_on_arm():
    flags = processor_flags("Features")
    if not flags:
        pytest.skip("an emulator that shows the host's processors")
    expected = ["scalar"]
    for level, wanted in {"neon": "asimd", "neondot": "asimddp", "neoni8mm": "i8mm"}.items():
        if wanted not in flags:
            break
        expected.append(level)
    assert _core.supported_isas() == expected
