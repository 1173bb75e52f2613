"""What reads benchmark files: the comparison of two runs, and the plots."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from bench import bandwidth, compare, plots, table  # noqa: E402


def row(case: str, cell: str, value: float, spread: float = 0.02, **more: Any) -> dict[str, Any]:
    ratio = {"value": value, "low": value * (1 - spread), "high": value * (1 + spread)}
    return {
        "suite": "linear CSR float32, >= 128 tokens",
        "case": case,
        "cell": cell,
        "target": "pared",
        "best_rival": "nn.Linear",
        "speedup": {"nn.Linear": ratio},
        "times": {"pared": {"median_s": 1e-3 / value}, "nn.Linear": {"median_s": 1e-3}},
        "threads": 1,
        "isa": "scalar",
        "cpu": "a processor",
        "cold": False,
        "gflops": 50.0 * value,
        "gbytes_s": None,
        "limit_share": None,
        "out": 64,
        "in": 32,
        "nnz": 512,
        "tokens": 128,
        "dtype": "float32",
    } | more


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text(json.dumps({"benchmarks": [{"extra_info": r} for r in rows]}))
    return str(path)


def run(tmp_path: Path, before: list[Any], after: list[Any], *args: str) -> tuple[int, str]:
    console = Console(width=200, file=io.StringIO())
    code = compare.main(
        [write(tmp_path / "a.json", before), write(tmp_path / "b.json", after), *args], console
    )
    return code, console.file.getvalue()


def test_an_unchanged_run_passes(tmp_path):
    rows = [row("64x32", "50 %", 2.0), row("64x32", "90 %", 7.0)]
    code, text = run(tmp_path, rows, rows, "--verbose")
    assert code == 0
    assert "geometric mean of 2 rows" in text
    assert "slower" not in text


def test_a_planted_regression_is_found(tmp_path):
    before = [row("64x32", "50 %", 2.0), row("64x32", "90 %", 7.0)]
    after = [row("64x32", "50 %", 2.0), row("64x32", "90 %", 5.0)]
    code, text = run(tmp_path, before, after)
    assert code == 1
    assert "slower" in text
    assert "7.00" in text
    assert "5.00" in text
    assert "2.00" not in text  # what did not move is not printed
    assert run(tmp_path, after, before)[0] == 0  # faster is no regression


def test_noise_is_no_regression(tmp_path):
    code, _ = run(tmp_path, [row("a", "50 %", 7.0, 0.3)], [row("a", "50 %", 5.0, 0.3)])
    assert code == 0  # the intervals meet
    code, _ = run(tmp_path, [row("a", "50 %", 7.0, 0.01)], [row("a", "50 %", 6.7, 0.01)])
    assert code == 0  # within the tolerance
    code, _ = run(
        tmp_path, [row("a", "50 %", 7.0, 0.01)], [row("a", "50 %", 6.7, 0.01)], "--tolerance", "0.02"
    )
    assert code == 1


def test_a_row_that_is_gone_is_reported(tmp_path):
    code, text = run(tmp_path, [row("a", "50 %", 7.0), row("b", "50 %", 7.0)], [row("a", "50 %", 7.0)])
    assert code == 1
    assert "missing" in text
    other = row("a", "50 %", 7.0) | {"speedup": {"oneDNN": {"value": 7.0, "low": 7.0, "high": 7.0}}}
    code, text = run(tmp_path, [row("a", "50 %", 7.0)], [other])
    assert code == 1
    assert "missing" in text


@pytest.mark.parametrize("args", [("--tolerance", "1"), ("--tolerance", "-0.1")])
def test_a_tolerance_out_of_range_is_refused(tmp_path, capsys, args):
    with pytest.raises(SystemExit) as e:
        run(tmp_path, [row("a", "50 %", 7.0)], [row("a", "50 %", 7.0)], *args)
    assert e.value.code == 2
    assert "expected a number in [0, 1)" in capsys.readouterr().err


def test_every_plot_is_drawn_from_a_file(tmp_path, capsys):
    rows = [row("64x32", f"{s} %", 1 + s / 20, tokens=t) for s in (50, 80, 90) for t in (1, 2, 4, 8, 128)]
    sweep = {
        "sweep": {"1": 1e-3, "2": 1.1e-3, "16": 2e-3},
        "sparsity": 0.9,
        "kernel": "linear CSR",
        "gflops": None,
    }
    rows += [row("linear CSR 64x32, 1 -> 2", "90 % zeros", 1.1, threads=n, **sweep) for n in (1, 2)]
    file = write(tmp_path / "r.json", rows)
    assert plots.main([file, "--out", str(tmp_path / "images")]) == 0
    names = {Path(line).name for line in capsys.readouterr().out.split()}
    assert names == {"speedup_1t.svg", "latency_tokens.svg", "roofline_1t.svg"}
    for name in names:
        assert "linear CSR" in (tmp_path / "images" / name).read_text()
    assert plots.main([write(tmp_path / "none.json", []), "--out", str(tmp_path / "images")]) == 1


def test_what_falls_short_of_its_goal_has_the_limit_beside_it():
    rows = [row("a", "80 %", 2.0, limit_share=0.5), row("b", "80 %", 8.0, limit_share=0.25)]
    console = Console(width=200, file=io.StringIO())
    table.render([*rows, row("a", "99 %", 1.0, limit_share=0.5)], console)
    lines = {line.split("│")[1].strip(): line for line in console.file.getvalue().splitlines() if "│" in line}
    assert "2.00 (50 % of 4.0)" in lines["a"]  # of a goal of 3.4
    assert "1.00 " in lines["a"]  # without a goal
    assert "1.00 (" not in lines["a"]
    assert "8.00 " in lines["b"]
    assert "(" not in lines["b"]
    assert "(" not in lines["geometric mean"]  # 4.00
    assert "of 3.4" not in console.file.getvalue()
    rows[1] = row("b", "80 %", 3.0, limit_share=None)
    table.render(rows, console := Console(width=200, file=io.StringIO()))
    assert "2.45 " in console.file.getvalue()  # no limit is known of the mean
    assert "  80 %: 2.45 of 3.4\n" in console.file.getvalue()


@pytest.mark.parametrize(("share", "below"), [(0.5, ""), (0.8, ", which is below the goal")])
def test_a_cell_that_falls_short_says_by_how_much_and_why(share: float, below: str) -> None:
    suite = "conv2d CSR float32, ResNet-50"
    rows = [row("a", "80 %", 2.0, limit_share=share, suite=suite), row("a", "90 %", 5.0, suite=suite)]
    console = Console(width=400, file=io.StringIO())
    table.render(rows, console)
    text = console.file.getvalue()
    assert (
        f"  80 %: 2.00 of 3, {100 * share:.0f} % of the machine's limit of {2 / share:.1f}{below}\n" in text
    )
    assert "90 %: " not in text
    assert f"  because {table.REASONS[suite]}" in text


def test_every_reason_is_of_a_suite_with_goals() -> None:
    assert table.REASONS.keys() <= table.GOALS.keys()


def test_bandwidth_has_a_share_for_each_number_of_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        args = "--warm --shapes 512x512 320x768 --formats int8 csr --threads 1 --budget 0.01"
        assert bandwidth.main(args.split()) == 0
    finally:
        torch.set_num_threads(threads)
    lines = [line.split("│") for line in capsys.readouterr().out.splitlines() if "│" in line]
    assert [line[1].strip() for line in lines] == ["int8", "csr"]
    for *_, first, second, _ in lines:
        for cell in (first, second):
            found = [int(share) for share in cell.split()]
            assert len(found) == len(bandwidth.TOKENS)
            assert all(share >= 0 for share in found)
            assert any(share > 0 for share in found)
