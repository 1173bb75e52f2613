"""pared.report: the table, the JSON, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import pickle

import pytest
import torch
from _models import sparse_linear
from rich.console import Console
from torch import nn

import pared
from pared import Report
from pared._report import LayerReport, ModelTime


@pytest.fixture
def report() -> Report:
    layers = [
        LayerReport(
            "a.0",
            "Linear",
            [64, 32],
            0.9,
            "csr",
            "gelu",
            False,
            ["b.0"],
            2,
            [[4, 32]],
            1e-3,
            2e-4,
            5.0,
            1e-6,
            1e-5,
            "won",
        ),
        LayerReport("", "Conv2d", [8, 3, 3, 3], 0.01, reason="1.0% zeros cannot give 1.05x"),
    ]
    return Report(
        layers,
        dense=ModelTime(2e-3, 3e-3),
        fast=ModelTime(5e-4, 6e-4),
        speedup=4.0,
        relative_error=1e-7,
        memory_before=10_000_000,
        memory_after=2_000,
        machine={"cpu": "a CPU", "isa": "avx2", "threads": 2},
        ties=[["x", "y"]],
        notes=["a note"],
    )


def test_json_round_trip(report: Report) -> None:
    text = report.to_json()
    data = json.loads(text)
    assert data["layers"][0]["name"] == "a.0"
    assert data["layers"][0]["before"] == 1e-3
    assert data["layers"][1]["before"] is None
    assert data["fast"] == {"p50": 5e-4, "p95": 6e-4}
    assert Report.from_json(text) == report
    assert Report.from_json(Report().to_json(indent=None)) == Report()
    assert "\n" not in report.to_json(indent=None)
    assert pickle.loads(pickle.dumps(report)) == report
    assert set(data) == {f.name for f in dataclasses.fields(Report)}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"layers": [{"x": 1}]}', '{"layers": 3}', "{"])
def test_bad_json(text: str) -> None:
    with pytest.raises(ValueError, match="text: expected the JSON of a report"):
        Report.from_json(text)


def test_table(report: Report) -> None:
    text = str(report)
    for part in (
        "1 of 2 layers accelerated",
        "a.0",
        "= b.0",
        "(model)",
        "64x32",
        "90.0%",
        "csr + gelu",
        "1.00 ms",
        "200.0 us",
        "5.00x",
        "1.0e-06",
        "cannot give",
        "2.00 ms -> 500.0 us (p50)",
        "4.00x",
        "10.00 MB -> 2.00 kB",
        "a CPU, avx2, 2 thread(s)",
        "a note",
    ):
        assert part in text, part
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report)
    assert "csr + gelu" in console.export_text()
    console.file.close()
    assert "0 of 0 layers" in str(Report())
    assert [layer.name for layer in report.converted] == ["a.0"]


@pytest.mark.parametrize(("speedup", "said"), [(4.0, False), (0.84, True), (9.0, True)])
def test_a_gain_that_is_not_that_of_the_medians_is_explained(
    report: Report, speedup: float, said: bool
) -> None:
    text = " ".join(str(dataclasses.replace(report, speedup=speedup)).split())
    assert f"(p95): {speedup:.2f}x" in text
    assert (f"{speedup:.2f}x, the median of the rounds; of p50 4.00x, for rounds differ" in text) is said


def block(i: int, **changes: object) -> LayerReport:
    row = LayerReport(f"layers.{i}.up", "Linear", [64, 32], 0.5 + 0.001 * i, "csr", before=1e-3, after=2e-4)
    row = dataclasses.replace(row, speedup=5.0, error=1e-6 * (7 - i), reason="5.00x faster than dense")
    if i:
        row.reason += ", as timed for layers.0.up"
    return dataclasses.replace(row, **changes)  # type: ignore[arg-type]


def rows_of(layers: list[LayerReport]) -> list[str]:
    """The names of the table's rows."""
    return list(Report(layers).__rich__().columns[0].cells)  # type: ignore[arg-type]


def test_layers_of_repeated_blocks_share_a_row() -> None:
    rows = [LayerReport("in", "Linear", [32, 32], 0.0), *map(block, range(5)), block(7)]
    names = [str(name) for name in rows_of(rows)]
    assert names == ["in", "layers.{0-4,7}.up\n6 layers"]
    text = str(Report(rows))
    assert "50.0-50.7%" in text
    assert "7.0e-06" in text  # the largest error
    assert text.count("as timed for") == 0
    assert "7 of" not in text
    assert "6 of 7 layers accelerated" in text
    # Two of them stay two rows, each in its place.
    between = [block(0), rows[0], block(1)]
    assert [str(name) for name in rows_of(between)] == ["layers.0.up", "in", "layers.1.up"]


@pytest.mark.parametrize(
    "change",
    [
        {"kernel": "bitmap"},
        {"activation": "relu"},
        {"after": 3e-4},
        {"speedup": 4.9},
        {"shape": [64, 64]},
        {"aliases": ["b"]},
        {"reason": "the whole model was 0.9x with it"},
        {"name": "layers.1.down"},
    ],
)
def test_what_differs_has_a_row_of_its_own(change: dict[str, object]) -> None:
    assert len(rows_of([block(0), block(1, **change), block(2), block(3)])) == 2


def test_sizes_are_measured() -> None:
    model = nn.Sequential(sparse_linear(256, 256, 0.1))
    fast = pared.accelerate(model, torch.randn(2, 256), min_speedup=0, progress=False, formats=["csr"])
    report = pared.report(fast)
    state = model.state_dict()
    dense = sum(t.nbytes for t in state.values())
    assert report.memory_before == dense
    assert report.memory_after == fast[0].packed.nbytes + fast[0].bias.nbytes < dense / 3
    assert dense < report.disk_before < dense + 10_000
    assert report.disk_after < report.disk_before / 3
    assert {"cpu", "isa", "threads", "torch"} <= report.machine.keys()
    assert report.machine["threads"] == torch.get_num_threads()


def test_what_it_refuses() -> None:
    with pytest.raises(TypeError, match="model: expected a torch module, got str"):
        pared.report("model")
    with pytest.raises(ValueError, match=r"model: expected what pared\.accelerate returned, got a Linear"):
        pared.report(nn.Linear(2, 2))


def test_the_function_is_not_hidden_by_a_module() -> None:
    import pared._accelerate
    import pared._report

    assert callable(pared.report)
    assert callable(pared.accelerate)
    assert callable(pared.restore)
