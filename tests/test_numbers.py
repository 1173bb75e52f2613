"""Random numbers of a test are its own, whatever ran before it in the process: see conftest.py."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent

SUITE = """
import pytest
import torch

@pytest.fixture(scope="module")
def shared():
    return float(torch.rand(()))

def test_before():
    torch.rand(5)

def test_it(shared, rng):
    print("numbers", shared, float(torch.rand(())), rng.random())
"""


def numbers(folder: Path, *chosen: str, **environment: str) -> str:
    arguments = ["-p", "no:cacheprovider", "-q", "-s", "--rootdir", folder, *chosen]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return next(line for line in run.stdout.splitlines() if "numbers" in line).partition("numbers")[2]


def test_numbers_do_not_depend_on_the_tests_before(tmp_path: Path) -> None:
    for name in ("conftest.py", "_ceilings.py"):
        shutil.copy(HERE / name, tmp_path / name)
    (tmp_path / "test_suite.py").write_text(SUITE)
    alone = numbers(tmp_path, "test_suite.py::test_it")
    assert numbers(tmp_path, "test_suite.py") == alone
    assert numbers(tmp_path, "test_suite.py::test_it", PARED_TEST_SEED="1") != alone
