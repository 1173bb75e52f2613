"""pared.search_budget: exact against every combination, within the budget, and applied as it says."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import pared
import pared._search as search
from pared._cost import weight_uses
from pared._inputs import examples
from pared._search import Options, knapsack, measure_options


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(before)


def model_and_data() -> tuple[nn.Sequential, list[torch.Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 5)).eval()
    with torch.no_grad():
        model[2].weight.mul_(torch.rand(32, 48) ** 6)  # a layer that bears pruning better than the others
    return model, list(torch.randn(96, 24).split(32))


# ---- the knapsack

tables = st.lists(
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 20)), min_size=1, max_size=4),
    min_size=1,
    max_size=5,
)


def brute(options: list[list[tuple[int, int]]], budget: float) -> tuple[int, int] | None:
    """Least error, then least cost, of all combinations."""
    sums = (
        (sum(e for _, e in pick), sum(c for c, _ in pick))
        for pick in itertools.product(*options)
        if sum(c for c, _ in pick) <= budget
    )
    return min(sums, default=None)


def solve(options: list[list[tuple[int, int]]], budget: float, limit: int = 20_000) -> tuple[int, int]:
    arrays = [(np.array([c for c, _ in t], float), np.array([e for _, e in t], float)) for t in options]
    picks = knapsack(arrays, budget, limit=limit)
    chosen = [t[i] for t, i in zip(options, picks, strict=True)]
    return sum(e for _, e in chosen), sum(c for c, _ in chosen)


@given(tables, st.integers(0, 40))
@settings(max_examples=200)
def test_the_choice_is_the_best_of_all_combinations(
    options: list[list[tuple[int, int]]], budget: int
) -> None:
    want = brute(options, budget)
    if want is None:
        with pytest.raises(ValueError, match="budget: expected at least"):
            solve(options, budget)
    else:
        assert solve(options, budget) == want


def test_a_greedy_choice_would_be_caught() -> None:
    # By error removed per cost the first item's large option looks best, and leaves no room for the other's.
    options = [[(0, 10), (6, 0)], [(0, 9), (5, 0)], [(0, 9), (5, 0)]]
    assert brute(options, 10) == (10, 10) == solve(options, 10)
    assert brute(options, 10) != (18, 6)


@given(st.integers(0, 2**31), st.integers(2, 9))
@settings(max_examples=30)
def test_a_thinned_search_stays_within_the_budget_and_near_the_best(seed: int, limit: int) -> None:
    rng = np.random.default_rng(seed)
    tables = [(rng.random(5), rng.random(5)) for _ in range(6)]
    budget = sum(float(c.min()) for c, _ in tables) + 0.8
    exact, thin = knapsack(tables, budget), knapsack(tables, budget, limit=limit)
    for picks in (exact, thin):
        assert sum(float(c[i]) for (c, _), i in zip(tables, picks, strict=True)) <= budget + 1e-12
    error = [sum(float(e[i]) for (_, e), i in zip(tables, p, strict=True)) for p in (exact, thin)]
    assert error[0] <= error[1] + 1e-12


# ---- plans


@pytest.mark.parametrize("unit", ["parameters", "macs"])
@pytest.mark.parametrize("with_data", [True, False])
def test_a_plan_keeps_the_budget_and_beats_one_sparsity_for_all(unit: str, with_data: bool) -> None:
    model, data = model_and_data()
    before = copy.deepcopy(model.state_dict())
    for budget in (0.3, 0.5, 0.8, 1.0):
        plan = pared.search_budget(
            model, budget, cost=unit, data=data if with_data else None, example_inputs=data[0]
        )
        assert plan.cost <= plan.budget == pytest.approx(budget * plan.before)
        assert plan.uniform is not None
        assert plan.uniform[1] <= plan.budget
        assert plan.error <= plan.uniform[2]
        pruned = copy.deepcopy(model)
        pared.prune(pruned, plan.sparsities)
        if unit == "parameters":
            found = sum(int(torch.count_nonzero(p)) for p in pruned.parameters())
        else:
            found = sum(n * nz for n, nz in weight_uses(pruned, examples(data[0])).values())
        assert found == plan.cost
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=True))
    tight = pared.search_budget(model, 0.3, cost=unit, data=data, example_inputs=data[0])
    assert tight.uniform is not None
    assert tight.error < 0.8 * tight.uniform[2]  # the layer with small weights carries more of it
    assert tight.sparsities["2.weight"] == max(tight.sparsities.values())


def test_a_search_that_was_thinned_too_far_is_not_worse_than_one_sparsity(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, data = model_and_data()
    options = measure_options(model, data=data)
    monkeypatch.setattr(search, "knapsack", lambda tables, room: [len(c) - 1 for c, _ in tables])
    plan = options.plan(0.5)
    assert plan.uniform is not None
    assert plan.error == plan.uniform[2]
    assert plan.cost == plan.uniform[1] <= plan.budget


def test_errors_are_those_of_the_layers_outputs() -> None:
    model, data = model_and_data()
    options = measure_options(model, levels=(0.0, 0.5), data=data)
    x = torch.cat(data)
    for i, layer in zip((0, 2, 4), options.layers, strict=True):
        inputs = model[:i](x)
        pruned = copy.deepcopy(model)
        pared.prune(pruned, {layer.name: 0.5})
        new, old = (m[i](inputs) - m[i].bias for m in (pruned, model))
        want = float((new - old).square().sum() / old.square().sum())
        assert layer.errors == (0.0, pytest.approx(want, rel=1e-4))


@pytest.mark.parametrize("importance", ["wanda", "sparsegpt", "obc", "taylor"])
def test_other_criteria_and_patterns(importance: str) -> None:
    model, data = model_and_data()
    loss = (lambda m, x: m(x).square().mean()) if importance == "taylor" else None
    plan = pared.search_budget(
        model, 0.5, data=data, importance=importance, loss_fn=loss, levels=(0.0, 0.4, 0.6, 0.8)
    )
    assert plan.cost <= plan.budget
    options: dict[str, Any] = {"data": data, "importance": importance, "loss_fn": loss}
    with torch.enable_grad():
        report = pared.prune(model, plan.sparsities, **options)
    found = {x.name: pytest.approx(x.sparsity, abs=0.03) for x in report.layers}
    assert found == {k: v for k, v in plan.sparsities.items() if v}
    plan = pared.search_budget(model_and_data()[0], 0.8, data=data, pattern="2:4")
    assert set(plan.sparsities.values()) == {0.0, 0.5}
    assert plan.cost <= plan.budget
    model = model_and_data()[0]
    report = pared.prune(model, plan.sparsities, pattern="2:4")
    assert {x.name: x.sparsity for x in report.layers} == {k: v for k, v in plan.sparsities.items() if v}


def test_the_fall_of_a_metric() -> None:
    model, data = model_and_data()
    calls = []

    def evaluate(m: nn.Module) -> float:
        calls.append(1)
        return -float((m(data[0]) - model(data[0])).square().mean())

    plan = pared.search_budget(model, 0.5, evaluate=evaluate, levels=(0.0, 0.5, 0.9))
    assert len(calls) == 1 + 3 * 2
    assert plan.measure == "fall of the metric"
    assert plan.cost <= plan.budget


def test_measured_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """With given times: a layer that no kernel makes faster keeps its weights."""
    model, data = model_and_data()

    def seconds(m: nn.Sequential, inputs: Any, precision: str) -> dict[str, tuple[float, float]]:
        zeros = [float((m[i].weight == 0).double().mean()) for i in (0, 2)]
        return {"0": (3.0, 1 / (1.01 - zeros[0])), "2": (1.0, 0.5 + 0.1 * zeros[1])}

    monkeypatch.setattr(search, "layer_seconds", seconds)
    monkeypatch.setattr(search, "model_seconds", lambda m, inputs: 5.0)
    plan = pared.search_budget(model, 0.7, cost="time", data=data, example_inputs=data[0])
    assert plan.before == 5.0
    assert plan.cost <= plan.budget == 3.5
    assert [name for name, s in plan.sparsities.items() if s] == ["0.weight"]
    with pytest.raises(ValueError, match=r"budget: expected at least 0\.\d+ of the model's time"):
        pared.search_budget(model, 0.3, cost="time", example_inputs=data[0])


def test_measured_time_with_real_kernels() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256), nn.LSTM(256, 8))
    x = torch.randn(64, 256)
    options = measure_options(model, cost="time", levels=(0.0, 0.9), example_inputs=x)
    first, *lstm = options.layers
    assert first.before > 0
    assert all(0 < c <= first.before for c in first.costs)
    assert all(layer.costs == (0.0, 0.0) for layer in lstm)  # no kernel takes them
    assert options.plan(1.0).cost <= options.before


def test_what_is_multiplied_is_counted() -> None:
    conv = nn.Conv2d(4, 6, 3, stride=2, groups=2)
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    with torch.no_grad():
        conv.weight[0] = 0
    x = torch.randn(2, 4, 9, 9)
    assert weight_uses(conv, examples(x)) == {"weight": (2 * 4 * 4, 5 * 2 * 9)}
    q = torch.randn(3, 5, 8)
    assert weight_uses(attention.eval(), examples((q, q, q))) == {
        "in_proj_weight": (15.0, 192),
        "out_proj.weight": (15.0, 64),
    }
    lstm = nn.LSTM(4, 3)
    assert set(weight_uses(lstm, examples(torch.randn(7, 2, 4))).values()) == {(14.0, 48), (14.0, 36)}
    dense = nn.Linear(8, 5)
    fast = pared.accelerate(dense, torch.randn(3, 7, 8), min_speedup=0)
    for model in (dense, fast):
        assert weight_uses(model, examples(torch.randn(3, 7, 8))) == {"weight": (21.0, 40)}


def test_options_survive_json() -> None:
    model, data = model_and_data()
    options = measure_options(model, data=data)
    again = Options.from_dict(json.loads(json.dumps(options.to_dict())))
    assert again == options
    assert again.plan(0.4) == options.plan(0.4)
    plan = options.plan(0.4)
    assert json.loads(plan.to_json())["cost"] == plan.cost
    assert "2.weight" in str(plan)


@pytest.mark.parametrize(
    ("budget", "kwargs", "error", "message"),
    [
        (0, {}, ValueError, r"budget: expected a share in \(0, 1\]"),
        ("half", {}, TypeError, r"budget: expected a share in \(0, 1\], got str"),
        (0.01, {}, ValueError, r"budget: expected at least 0\.\d+ of the model's parameters"),
        (0.5, {"cost": "flops"}, ValueError, "cost: expected 'parameters', 'macs', 'time', got 'flops'"),
        (0.5, {"cost": "macs"}, ValueError, "example_inputs: expected inputs of the model"),
        (0.5, {"levels": (0.5, 0.2)}, ValueError, "levels: expected ascending numbers"),
        (0.5, {"levels": ()}, ValueError, "levels: expected ascending numbers"),
        (0.5, {"importance": "wanda"}, ValueError, "data: expected batches, which 'wanda' needs"),
        (0.5, {"evaluate": lambda m: float("nan")}, ValueError, "evaluate: expected a number"),
        (0.5, {"data": iter([])}, TypeError, "data: expected batches that can be gone through several times"),
    ],
)
def test_errors(budget: Any, kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    model, _ = model_and_data()
    with pytest.raises(error, match=message):
        pared.search_budget(model, budget, **kwargs)


# ---- pared.prune with a share for each layer


def test_prune_takes_a_share_for_each_layer() -> None:
    model, _ = model_and_data()
    report = pared.prune(model, {"0": 0.5, "*.weight": 0.9}, exclude="4")
    zeros = {i: float((model[i].weight == 0).double().mean()) for i in (0, 2, 4)}
    assert zeros == {0: pytest.approx(0.5, abs=1e-3), 2: pytest.approx(0.9, abs=1e-3), 4: 0.0}
    assert report.target == pytest.approx((0.5 * 24 * 48 + 0.9 * 48 * 32) / (24 * 48 + 48 * 32))
    report = pared.prune(model, {"4": 0.5})
    assert ("0.weight", "no filter in sparsity matches") in report.dense
    for shares, message in (
        ({}, "sparsity: expected at least one filter"),
        ({"nothing": 0.5}, "sparsity: expected filters that match a selected weight, got 'nothing'"),
        ({"0": 1.5}, "sparsity: expected a number in"),
    ):
        with pytest.raises(ValueError, match=message):
            pared.prune(model, shares)
    with pytest.raises(ValueError, match="scope: expected 'layer', 'row' or None with a sparsity for each"):
        pared.prune(model, {"0": 0.5}, scope="global")
