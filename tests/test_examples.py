"""Every program in examples/ runs, as a user would run it."""

from __future__ import annotations

import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"
RUNS = {
    "functional_numpy.py": ([], "ratio"),
    "serve_http.py": (["--self-test"], "answered correctly"),
    "swap_layers.py": ([], "outputs agree"),
}
# Run in this process, which has paid for importing transformers once; shortened by their own options.
HERE = {
    "bert.py": (["--quick"], ["50.00%", "outputs agree", "model "]),
    "efficientnet_schedule.py": (
        ["--shorten", "100", "--size", "32", "--batch", "2"],
        ["half way the schedule asks for 76.25%", "step 10: 50.00% zeros", "80.00% zeros in ", "model "],
    ),
    "llama_generate.py": (["--quick"], ["50.00%", "tokens/s", "24 of 24 tokens are the same"]),
    "lstm.py": (["--quick"], ["no kernel accelerates LSTM", "80.00%", "of the tags right"]),
    "mlp_l1_8bit.py": (["--quick"], ["zeros in the first layer", "8 bits: accuracy", "times as fast"]),
    "prune_cnn.py": (["--quick"], ["by_weight: accuracy", "by_node: accuracy", "by_layer: accuracy"]),
    "resnet50_one_stage.py": (["--quick"], ["pruned to 90.00%", "model ", "outputs agree"]),
}


@pytest.fixture(autouse=True)
def process_as_before() -> Iterator[None]:
    """One thread: two that wait for each other are slow on a busy machine. The examples seed torch."""
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_rng_state(state)
    torch.set_num_threads(threads)


def test_no_example_is_left_out() -> None:
    assert {p.name for p in EXAMPLES.glob("*.py")} == RUNS.keys() | HERE.keys()


@pytest.mark.parametrize("name", sorted(HERE))
def test_example_in_this_process(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args, says = HERE[name]
    monkeypatch.setattr(sys, "argv", [name, *args])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    out = capsys.readouterr().out
    assert [text for text in says if text not in out] == []


def test_an_lstm_that_is_passed_over_in_silence_is_noticed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import pared._accelerate
    import pared.pruning.oneshot

    monkeypatch.setattr(pared._accelerate, "without_kernel", lambda model: [])
    monkeypatch.setattr(pared.pruning.oneshot, "RULES", {torch.nn.LSTM: None, torch.nn.Linear: None})
    with pytest.raises(AssertionError, match="no kernel accelerates LSTM"):
        test_example_in_this_process("lstm.py", monkeypatch, capsys)


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
