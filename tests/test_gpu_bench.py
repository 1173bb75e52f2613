"""The GPU benchmark's host part: figures from samples, goals, suites, the dry run."""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from bench.gpu import __main__ as command  # noqa: E402
from bench.gpu.measure import Case, Goal, Machine, measure, not_capturable, table  # noqa: E402

H200 = Machine("cuda", "NVIDIA H200", 60 << 20)


class FakeClock:
    """Times that the test decides; the second round is twice as slow for everybody."""

    def __init__(self, seconds):
        self.seconds, self.prepared = seconds, []

    def prepare(self, call, copies, graph):
        name = call(0)
        self.prepared.append((name, copies, graph))
        rounds = iter(range(100))
        return lambda: self.seconds[name] * (2 if next(rounds) == 1 else 1)


def case(**change):
    calls = {n: (lambda i, n=n: n) for n in ("pared", "fast", "slow")}
    fields = {"suite": "s", "name": "c", "calls": calls, "copies": 3, "goals": [Goal(["fast", "slow"], 2.0)]}
    return Case(**(fields | change))


SECONDS = {"pared": 1e-4, "fast": 3e-4, "slow": 9e-4}


def test_figures_and_goals():
    clock = FakeClock(SECONDS)
    got = measure(case(nbytes=4e5, operations=2e8, limit_s=5e-5, eager=["slow"]), clock, 5)
    assert clock.prepared == [("pared", 3, True), ("fast", 3, True), ("slow", 3, False)]
    assert got["times"]["pared"]["median_s"] == pytest.approx(1e-4)
    assert got["ratios"]["fast"]["value"] == pytest.approx(3.0)
    assert got["ratios"]["slow"]["low"] == pytest.approx(9.0)  # the slow round is slow for all
    assert got["gbytes_s"] == pytest.approx(4.0)
    assert got["tflops"] == pytest.approx(2.0)
    assert got["limit_share"] == pytest.approx(0.5)
    (goal,) = got["goals"]
    assert goal["got"] == pytest.approx(3.0)  # the best baseline decides
    assert goal["reached"]
    text = table([got])
    assert "s: c" in text
    assert "100.0" in text
    assert "2 x fast / slow: 3.00 yes" in text


@pytest.mark.parametrize(
    ("ratio", "limit", "reached"),
    [(3.0, None, True), (3.5, None, True), (3.6, None, False), (9.0, 8.6e-5, True), (9.0, 8.4e-5, False)],
)
def test_a_goal_is_reached_at_85_percent_of_it_or_of_the_limit(ratio, limit, reached):
    got = measure(case(goals=[Goal(["fast"], ratio)], limit_s=limit), FakeClock(SECONDS), 5)
    assert got["goals"][0]["reached"] == reached
    assert ("NO" in table([got])) != reached


def test_mistakes_of_a_suite():
    clock = FakeClock(SECONDS)
    with pytest.raises(ValueError, match=r"goals: expected names of calls in c, got \['other'\]"):
        measure(case(goals=[Goal(["other"], 1.0)]), clock, 3)
    with pytest.raises(ValueError, match="calls: expected one named 'mine'"):
        measure(case(target="mine"), clock, 3)

    def wrong():
        raise RuntimeError("wrong result")

    with pytest.raises(RuntimeError, match="wrong result"):
        measure(case(check=wrong), clock, 3)
    assert not clock.prepared, "something was timed that is wrong"


def test_calls_that_no_graph_holds_are_found_by_trying(monkeypatch):
    import contextlib

    import torch

    capturing = []

    @contextlib.contextmanager
    def graph(_):
        capturing.append(True)
        try:
            yield
        finally:
            capturing.pop()

    def waits(i):
        if capturing:
            raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    calls = {"waits": waits, "fits": lambda i: None, "other": waits}
    assert not_capturable(calls, ["waits", "fits"]) == ["waits"]


def test_copies_exceed_the_cache():
    assert H200.copies(1 << 20) == 180
    assert H200.copies(1 << 30) == 2
    assert Machine("cpu", "", 1 << 30, dry=True).copies(1) == 2


def test_every_module_is_a_suite():
    modules = {p.stem for p in (ROOT / "bench/gpu").glob("*.py")} - {"__init__", "__main__", "measure"}
    assert {m.__name__.rpartition(".")[2] for m in command.suites("")} == modules
    assert command.suites("no such") == []


def test_results_path():
    path = command.results_path(H200, datetime.datetime(2031, 2, 3, 4, 5))
    assert path == ROOT / "bench/results/gpu-nvidia-h200-20310203-0405.json"


def test_a_failure_costs_its_own_case_alone(capsys, monkeypatch):
    class Suite:
        @staticmethod
        def cases(machine):
            yield case(name="bad", goals=[Goal(["other"], 1.0)])
            yield case(name="good")

    monkeypatch.setattr(command, "suites", lambda only: [Suite])
    assert command.main(["--dry-run"]) == 1
    out, err = capsys.readouterr()
    assert "1 cases would be measured" in out
    assert "FAILED s: bad: ValueError: goals" in err


def test_the_whole_flow_as_a_dry_run():
    command_line = [ROOT / "bench/gpu.sh", "--dry-run"]
    run = subprocess.run(
        command_line, env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert "cases would be measured; nothing was" in run.stdout
    assert "FAILED" not in run.stderr
    for part in ("select_threshold: bfloat16", "csr float32", "2:4 linear", "conv 1x1 bsr", "mlp: Llama-8B"):
        assert part in run.stderr


def test_an_unknown_option_of_the_script():
    run = subprocess.run([ROOT / "bench/gpu.sh", "--fast"], capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert "unknown option --fast" in run.stderr
