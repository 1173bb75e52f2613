"""kernels.def is the one list: files, names, levels and tests follow it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import pared
import pared.ops
from pared import _core


def test_names_follow_the_rule():
    for k in pared.kernels():
        assert k.name.startswith(f"{k.op}_"), k
        assert k.name.endswith(f"__{k.isa}"), k
        assert k.doc, k


def test_names_are_unique():
    names = [k.name for k in pared.kernels()]
    assert len(names) == len(set(names))


def test_every_op_has_a_scalar_kernel():
    ops = {k.op for k in pared.kernels()}
    assert ops
    assert {k.op for k in pared.kernels() if k.isa == "scalar"} == ops


def test_supported_means_the_level_is_supported():
    levels = _core.supported_isas()
    assert levels[0] == "scalar"
    for k in pared.kernels():
        assert k.supported == (k.isa in levels), k


def _untested(dispatched: set[str]) -> list[str]:
    return sorted({k.name for k in pared.kernels() if k.supported} - dispatched)


@pytest.mark.last
def test_every_kernel_ran_under_a_forced_level(session_kernels):
    assert not _untested(session_kernels), "kernels that no test has run with the `isa` fixture"


def test_an_untested_kernel_is_noticed():
    names = {k.name for k in pared.kernels() if k.supported}
    missing = min(names)
    assert _untested(names - {missing}) == [missing]


def test_a_test_that_runs_no_kernel_fails(tmp_path):
    for name in ("conftest.py", "_ceilings.py"):
        shutil.copy(Path(__file__).parents[1] / name, tmp_path)
    (tmp_path / "test_planted.py").write_text("def test_nothing(isa):\n    pass\n")
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "--rootdir",
            str(tmp_path),
            str(tmp_path),
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert run.returncode == 1, run.stdout + run.stderr
    assert "this test checks nothing" in run.stdout


def test_levels_agree(isa, rng):
    """One product at every level: the smallest proof that forcing a level reaches its code."""
    w = rng.standard_normal((19, 150)).astype(np.float32)
    w[rng.random(w.shape) < 0.7] = 0
    x = rng.standard_normal((37, 150)).astype(np.float32)
    y = pared.ops.linear(x, pared.ops.CSR.from_dense(w))
    exact = x.astype(np.float64) @ w.T.astype(np.float64)
    magnitude = np.abs(x).astype(np.float64) @ np.abs(w).T.astype(np.float64)
    # K products and K - 1 sums, each off by at most half a unit in the last place.
    assert np.all(np.abs(y - exact) <= 2 * 150 * 2.0**-24 * magnitude)
