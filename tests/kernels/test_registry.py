"""kernels.def is the one list: files, names, levels and tests follow it."""

from __future__ import annotations

import re
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


def run_session(folder: Path, tests: dict[str, str], *options: str) -> subprocess.CompletedProcess[str]:
    """A session of its own: this suite's conftest.py, and these as its kernel tests."""
    for name in ("conftest.py", "_ceilings.py"):
        shutil.copy(Path(__file__).parents[1] / name, folder)
    (folder / "kernels").mkdir(exist_ok=True)
    for name, text in tests.items():
        (folder / "kernels" / f"test_{name}.py").write_text(text)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--rootdir", folder, *options]
    return subprocess.run([*command, folder], capture_output=True, text=True, cwd=folder, check=False)


def test_a_test_that_runs_no_kernel_fails(tmp_path):
    run = run_session(tmp_path, {"planted": "def test_nothing(isa):\n    pass\n"})
    assert run.returncode == 1, run.stdout + run.stderr
    assert "this test checks nothing" in run.stdout


LAYER_NORM = """
import numpy as np, pared.ops
def test_layer_norm(isa):
    pared.ops.layer_norm(np.ones((2, 3), np.float32))
"""
MAX_POOL = """
import numpy as np, pared.ops
def test_max_pool(isa):
    pared.ops.max_pool2d(np.ones((1, 1, 4, 4), np.float32), 2)
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_a_kernel_that_no_test_runs_fails_the_session(tmp_path, processes):
    """Kernels that any process has run count; after a selection nothing is said."""
    options: tuple[str, ...] = ()
    if processes > 1:
        pytest.importorskip("xdist")
        options = ("-n", str(processes), "--dist", "loadfile")
    tests = {"norm": LAYER_NORM, "pool": MAX_POOL}
    run = run_session(tmp_path, tests, *options)
    assert run.returncode == 1, run.stdout + run.stderr
    (untested,) = re.findall(r"^kernels that no test has run with the `isa` fixture: (.*)$", run.stdout, re.M)
    ran = {k.name for k in pared.kernels() if k.supported} - set(untested.split(", "))
    assert ran
    assert {k.op for k in pared.kernels() if k.name in ran} == {"layer_norm", "max_pool"}
    assert re.search(r"= 1 failed, \d+ passed", run.stdout), run.stdout
    selected = run_session(tmp_path, tests, *options, "-k", "norm")
    assert selected.returncode == 0, selected.stdout + selected.stderr


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
