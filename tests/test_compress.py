"""pared.compress: the sparsest model that keeps the metric; the user's own is not touched."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pared


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def model_and_data() -> tuple[nn.Module, list[tuple[torch.Tensor, torch.Tensor]]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    x = torch.randn(256, 16)
    return model, [(x[:128], x[:128, 0]), (x[128:], x[128:, 0])]


def zeros(model: nn.Module) -> float:
    weights = torch.cat([m.weight.detach().flatten() for m in model.modules() if isinstance(m, nn.Linear)])
    return float((weights == 0).double().mean())


def by_sparsity(limit: float) -> Any:
    """A metric that falls off a cliff beyond `limit`."""

    def evaluate(model: nn.Module) -> float:
        plain = model if any(isinstance(m, nn.Linear) for m in model.modules()) else pared.restore(model)
        return 0.0 if zeros(plain) > limit + 0.01 else 1.0

    return evaluate


@pytest.mark.parametrize(("limit", "want"), [(0.62, 0.6), (0.0, 0.0), (0.99, 0.95), (0.3, 0.3)])
def test_finds_the_sparsest_that_keeps_the_bound(limit: float, want: float) -> None:
    model, data = model_and_data()
    before = copy.deepcopy(model.state_dict())
    result = pared.compress(model, data, by_sparsity(limit), importance="magnitude", min_speedup=0)
    assert result.sparsity == want
    assert result.metric == 1.0
    assert zeros(result.pruned) == pytest.approx(want, abs=0.01)
    assert len(result.steps) <= 4  # bisection over ten
    assert all(s.accepted == (s.sparsity <= limit + 0.01) for s in result.steps)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=True))
    x = data[0][0]
    torch.testing.assert_close(result.model(x), result.pruned.eval()(x), rtol=1e-4, atol=1e-5)
    assert json.loads(result.to_json())["sparsity"] == want
    assert "metric 1 -> 1" in str(result)


def test_fine_tuning_holds_the_zeros_and_sparsegpt_needs_none() -> None:
    model, data = model_and_data()
    seen = []

    def fine_tune(m: nn.Module, pruner: pared.Pruner) -> None:
        optimizer = torch.optim.Adam(m.parameters(), lr=1e-2)
        before = zeros(m)
        for x, y in data:
            optimizer.zero_grad()
            F.mse_loss(m(x)[:, 0], y).backward()
            optimizer.step()
            pruner.step()
        assert zeros(m) == before
        seen.append(before)

    result = pared.compress(model, data, lambda m: 1.0, fine_tune=fine_tune, sparsities=(0.5, 0.9))
    assert seen == pytest.approx([0.5, 0.9], abs=0.01) or seen == pytest.approx([0.9], abs=0.01)
    assert result.sparsity == 0.9
    result = pared.compress(model, data, lambda m: 1.0, pattern="2:4")
    assert result.sparsity == 0.5
    assert [s.sparsity for s in result.steps] == [0.5]


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"max_drop": -1}, ValueError, "max_drop: expected a number >= 0, got -1"),
        ({"sparsities": (0.9, 0.5)}, ValueError, "sparsities: expected ascending numbers"),
        ({"sparsities": (1.5,)}, ValueError, "sparsity: expected a number"),
        ({"evaluate": lambda m: float("nan")}, ValueError, r"evaluate: expected a number, .* got NaN"),
        ({"data": []}, ValueError, "data: expected at least one batch"),
        ({"data": iter([1])}, TypeError, "data: expected batches that can be gone through several times"),
    ],
)
def test_errors(kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    model, data = model_and_data()
    with pytest.raises(error, match=message):
        pared.compress(model, **{"data": data, "evaluate": lambda m: 1.0, **kwargs})
