"""Progressive pruning: each block's least-squares solution, on what the pruned blocks before it give."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pared
from pared.pruning import prune_progressively


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(8, 16), nn.Linear(16, 8), nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.norm(x + self.down(torch.relu(self.up(x))))
        return y


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[Block() for _ in range(3)]).double()


def inputs() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(8, 8, generator=generator, dtype=torch.float64)
    x = torch.randn(96, 8, generator=generator, dtype=torch.float64) @ mix
    return list(x.split(32))


def test_one_layer_is_the_least_squares_solution() -> None:
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(8, 6)).double(), inputs()
    dense, x = model[0].weight.detach().clone(), torch.cat(data)
    report = prune_progressively(model, 0.5, data=data, damping=0.0)
    w = model[0].weight.detach()
    for row, want in zip(w, dense, strict=True):
        own = row != 0
        solution = torch.linalg.lstsq(x[:, own], (x @ want).unsqueeze(1)).solution.squeeze(1)
        torch.testing.assert_close(row[own], solution, rtol=1e-8, atol=1e-8)
    assert int((w != 0).sum()) == 24
    assert report.blocks[0].rebuilt < report.blocks[0].masked
    with pytest.raises(AssertionError):  # the mask alone is not it
        torch.testing.assert_close(w, torch.where(w != 0, dense, 0.0), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("pattern", ["unstructured", "1x4", "2:4"])
def test_blocks_are_nearer_than_masks_alone(pattern: str) -> None:
    model, data = network(), inputs()
    model[0].up.weight.grad = torch.ones_like(model[0].up.weight)
    report = prune_progressively(model, 0.5, data=data, pattern=pattern)
    assert report.prune.sparsity == 0.5
    assert [b.name for b in report.blocks] == ["0", "1", "2"]
    assert all(b.rebuilt < b.masked for b in report.blocks)
    trained = network()
    again = prune_progressively(trained, 0.5, data=data, pattern=pattern, steps=30)
    assert again.prune.sparsity == 0.5
    assert all(b.rebuilt < a.rebuilt for a, b in zip(report.blocks[:1], again.blocks[:1], strict=True))
    assert all(p.grad is None for p in trained.parameters())
    assert all(m.training for m in model.modules())
    assert torch.equal(model[0].up.weight.grad, torch.ones_like(model[0].up.weight))


class Killed(BaseException):
    pass


class Stops:
    """Batches, and a kill in some pass."""

    def __init__(self, passes: int) -> None:
        self.passes = passes

    def __iter__(self) -> Iterator[torch.Tensor]:
        self.passes -= 1
        if self.passes < 0:
            raise Killed
        return iter(inputs())


@pytest.mark.parametrize("passes", [3, 6, 9])
def test_a_killed_run_goes_on_and_the_model_was_as_before(tmp_path: Path, passes: int) -> None:
    whole = network()
    want = prune_progressively(whole, 0.5, data=inputs())
    model = network()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(Killed):
        prune_progressively(model, 0.5, data=Stops(passes), resume=tmp_path / "run")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    got = prune_progressively(model, 0.5, data=inputs(), resume=tmp_path / "run")
    assert got.blocks == want.blocks
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), whole.parameters(), strict=True))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"data": []}, ValueError, "at least one batch, got none"),
        ({"data": iter(inputs())}, TypeError, "several times"),
        ({"data": [torch.full((4, 8), torch.nan).double()]}, ValueError, "NaN or infinity"),
        ({"data": inputs(), "steps": -1}, ValueError, "steps: expected a number of steps >= 0, got -1"),
        ({"data": inputs(), "importance": "sparsegpt"}, ValueError, "one that gives scores, got 'sparsegpt'"),
    ],
)
def test_errors_leave_the_model(options: dict[str, Any], error: type[Exception], message: str) -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        prune_progressively(model, 0.5, **options)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_report_reads_well() -> None:
    assert "0: error" in str(prune_progressively(network(), 0.5, data=inputs(), importance="magnitude"))


def test_names() -> None:
    assert pared.pruning.prune_progressively is prune_progressively
