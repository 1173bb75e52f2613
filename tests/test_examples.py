"""Every program in examples/ runs, as a user would run it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
RUNS = {
    "functional_numpy.py": ([], "ratio"),
    "serve_http.py": (["--self-test"], "answered correctly"),
    "swap_layers.py": ([], "outputs agree"),
}


def test_no_example_is_left_out() -> None:
    assert {p.name for p in EXAMPLES.glob("*.py")} == set(RUNS)


@pytest.mark.parametrize("name", sorted(RUNS))
def test_example(name: str) -> None:
    args, says = RUNS[name]
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / name), *args],
        capture_output=True,
        text=True,
        timeout=6000,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert says in done.stdout


def test_an_example_whose_check_fails_is_noticed(tmp_path: Path) -> None:
    # The same program with a wrong reference has to fail: its own check is what the tests above rely on.
    source = (EXAMPLES / "functional_numpy.py").read_text()
    wrong = tmp_path / "functional_numpy.py"
    wrong.write_text(source.replace("0.5 * x * (1 + np", "0.6 * x * (1 + np"))
    assert wrong.read_text() != source
    done = subprocess.run([sys.executable, str(wrong)], capture_output=True, text=True, timeout=6000)
    assert done.returncode == 1
    assert "AssertionError" in done.stderr
