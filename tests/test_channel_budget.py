"""pared.pruning.search_channels: the plan against all others, its costs against those of the pruned model."""

from __future__ import annotations

import copy
import itertools
import json
import random
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import pared
import pared._cost
from pared._cost import weight_uses
from pared._inputs import examples
from pared.pruning import channel_budget, search_channels
from pared.pruning.channel_budget import Tables, solve


def random_tables(rng: random.Random) -> Tables:
    n = rng.randint(1, 5)
    sizes = [rng.randint(1, 3) for _ in range(n)]
    errors = [[0.0, *sorted(rng.choice([0.5, 1.0, rng.random()]) for _ in range(k - 1))] for k in sizes]
    own = [sorted((rng.randint(0, 9) for _ in range(k)), reverse=True) for k in sizes]
    pairs = {
        (a, b): [[float(rng.randint(0, 9)) for _ in range(sizes[b])] for _ in range(sizes[a])]
        for a, b in itertools.combinations(range(n), 2)
        if rng.random() < 0.6
    }
    return Tables(errors, [[float(x) for x in row] for row in own], pairs, float(rng.randint(0, 5)))


def best(tables: Tables, budget: float) -> tuple[float, float] | None:
    """(error, cost) of the best of all choices."""
    found = []
    for chosen in itertools.product(*(range(len(row)) for row in tables.own)):
        cost = tables.cost(chosen)
        if cost <= budget:
            found.append((sum(row[i] for row, i in zip(tables.errors, chosen, strict=True)), cost))
    return min(found, default=None)


@pytest.mark.parametrize("seed", range(200))
def test_the_choice_is_the_best_of_all(seed: int) -> None:
    rng = random.Random(seed)
    tables = random_tables(rng)
    budget = rng.uniform(0.2, 1.0) * tables.cost([0] * len(tables.own))
    chosen, want = solve(tables, budget), best(tables, budget)
    assert (chosen is None) == (want is None)
    if chosen is not None and want is not None:
        error = sum(row[i] for row, i in zip(tables.errors, chosen, strict=True))
        assert (error, tables.cost(chosen)) == pytest.approx(want)


def test_a_choice_that_forgets_what_lies_between_groups_is_noticed() -> None:
    wrong = 0
    for seed in range(50):
        tables = random_tables(random.Random(seed))
        budget = 0.6 * tables.cost([0] * len(tables.own))
        chosen = solve(Tables(tables.errors, tables.own, {}, tables.rest), budget)
        want = best(tables, budget)
        wrong += chosen is not None and (want is None or tables.cost(chosen) > budget)
    assert wrong > 10


def test_a_thinned_search_keeps_the_budget() -> None:
    rng = random.Random(0)
    n = 12
    tables = Tables(
        [[0.0, rng.random(), 1 + rng.random()] for _ in range(n)],
        [[9 + rng.random(), 5 + rng.random(), rng.random()] for _ in range(n)],
        {(i, i + 1): [[rng.random() * (3 - a) for _ in range(3)] for a in range(3)] for i in range(n - 1)},
    )
    budget = 0.5 * tables.cost([0] * n)
    exact, thin = solve(tables, budget), solve(tables, budget, limit=24)
    assert exact is not None
    assert thin is not None
    error = [sum(row[i] for row, i in zip(tables.errors, c, strict=True)) for c in (exact, thin)]
    assert tables.cost(thin) <= budget
    assert error[0] <= error[1] <= 1.5 * error[0] + 0.5


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Conv2d(width, 12, 1, bias=False)
        self.norm = nn.BatchNorm2d(12)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.down = nn.Conv2d(12, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.depthwise(functional.relu(self.norm(self.up(x)))))


class Joined(nn.Module):
    """Reads two groups that are concatenated."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(width, 8, 1), nn.Conv2d(width, 4, 1), nn.Conv2d(12, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(torch.cat([self.a(x), self.b(x)], 1))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        Block(8),
        Joined(8),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 5),
    ).eval()


def real_cost(model: nn.Module, x: torch.Tensor, cost: str) -> float:
    if cost == "parameters":
        return float(sum(p.numel() for p in model.parameters()))
    sizes = {n: p.numel() for n, p in model.named_parameters()}
    return sum(uses * sizes[name] for name, (uses, _) in weight_uses(model, examples(x)).items())


@pytest.mark.parametrize("cost", ["parameters", "macs"])
def test_costs_are_those_of_the_pruned_model(cost: str) -> None:
    """Residual sum, depthwise convolution, concatenation, flattening into a Linear layer, BatchNorm."""
    x = torch.randn(2, 3, 6, 6)
    for budget in (0.35, 0.6, 0.9):
        model = net()
        plan = search_channels(model, x, budget, cost=cost, levels=(0.0, 0.25, 0.5, 0.75), round_to=1)
        assert plan.before == real_cost(model, x, cost)
        assert plan.cost <= plan.budget + 1e-6 * plan.before
        report = pared.prune_channels(model, x, plan.ratios, round_to=1)
        assert [g[1:] for g in report.groups] == [(g.before, g.after) for g in plan.groups]
        assert real_cost(model, x, cost) == pytest.approx(plan.cost, rel=1e-12)


def small() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4), nn.ReLU(), nn.Linear(4, 2)
    ).eval()


@pytest.mark.parametrize("budget", [0.4, 0.6, 0.8])
@pytest.mark.parametrize("cost", ["parameters", "macs"])
def test_the_plan_is_the_best_of_every_way_to_prune(budget: float, cost: str) -> None:
    model, x, levels = small(), torch.randn(64, 6), (0.0, 0.25, 0.5)
    before, outputs = real_cost(model, x, cost), model(x).detach()
    alone: dict[tuple[str, float], float] = {}
    found = []
    for ratios in itertools.product(levels, repeat=3):
        shares = dict(zip(("0", "2", "4"), ratios, strict=True))
        pruned = copy.deepcopy(model)
        pared.prune_channels(pruned, x, shares, round_to=1)
        moved = [(name, share) for name, share in shares.items() if share]
        if len(moved) == 1:
            lost = (pruned(x).detach() - outputs).double().square().sum()
            alone[moved[0]] = float(lost / outputs.double().square().sum())
        found.append((moved, real_cost(pruned, x, cost)))
    sums = [sum(alone[m] for m in moved) for moved, spent in found if spent <= budget * before]
    plan = search_channels(model, x, budget, cost=cost, levels=levels, round_to=1)
    assert plan.error == pytest.approx(min(sums), rel=1e-6, abs=1e-12)


def test_measured_times_by_the_widths_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    """With given times: the layer between the first two groups is all that costs anything."""

    class Times:
        def __init__(self, calls: Mapping[str, Any]) -> None:
            for call in calls.values():
                call()  # the layer of those widths takes those inputs
            self.calls = calls

        def median(self, name: str) -> float:
            rows, columns = map(int, name.split())
            return rows * columns * 1e-3 if "12 8" in self.calls else 1e-9

    monkeypatch.setattr(channel_budget, "interleave", lambda calls, **options: Times(calls))
    monkeypatch.setattr(pared._cost, "model_seconds", lambda model, inputs: 0.1)
    model, x = small(), torch.randn(16, 6)
    plan = search_channels(model, x, 0.6, cost="time", levels=(0.0, 0.5), round_to=1)
    assert plan.before == pytest.approx(0.1, rel=1e-3)
    after = {g.name: g.after for g in plan.groups}
    assert plan.cost == pytest.approx(0.1 - 0.096 + 1e-3 * after["0"] * after["2"], rel=1e-3)
    assert plan.cost <= plan.budget
    assert after["4"] == 4  # it would save nothing


def test_the_fall_of_a_metric_is_what_counts_where_there_is_one() -> None:
    model, x = small(), torch.randn(32, 6)
    asked = []

    def evaluate(m: nn.Module) -> float:
        asked.append(m)
        return -float(m[0].out_features == 8)  # only the first group may not... be kept: narrower is better

    plan = search_channels(model, x, 0.9, evaluate=evaluate, levels=(0.0, 0.5), round_to=1)
    assert plan.measure == "fall of the metric"
    assert plan.error == 0.0
    assert len(asked) == 1 + 3
    with pytest.raises(ValueError, match="got NaN"):
        search_channels(model, x, 0.9, evaluate=lambda m: float("nan"))


def test_the_plan_as_table_and_json() -> None:
    plan = search_channels(small(), torch.randn(8, 6), 0.7, round_to=1)
    assert "parameters" in str(plan)
    assert [g["name"] for g in json.loads(plan.to_json())["groups"]] == ["0", "2", "4"]


def test_shares_by_filter() -> None:
    model, x = small(), torch.randn(8, 6)
    report = pared.prune_channels(model, x, {"2": 0.5, nn.Linear: 0.25}, round_to=1)
    assert [g[1:] for g in report.groups] == [(8, 6), (12, 6), (4, 3)]
    model = small()
    report = pared.prune_channels(model, x, {"0": 0.5}, round_to=1)
    assert [g[1:] for g in report.groups] == [(8, 4), (12, 12), (4, 4)]
    with torch.no_grad():  # the graph needs gradients, the caller need not know
        pared.prune_channels(small(), x, 0.5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x: pared.prune_channels(m, x, {"7": 0.5}), "ratio: expected .*'7', which matches none"),
        (
            lambda m, x: pared.prune_channels(m, x, {"0": 1.5}),
            r"ratio: expected a number in \[0, 1\), got 1.5",
        ),
        (lambda m, x: pared.prune_channels(m, x, {}), "ratio: expected at least one filter"),
        (lambda m, x: pared.prune_channels(m, x, {"0": 0.5}, scope="global"), "scope: expected 'layer'"),
        (lambda m, x: search_channels(m, x, 0.5, cost="joules"), "cost: expected"),
        (lambda m, x: search_channels(m, x, 1.5), r"budget: expected a share in \(0, 1\]"),
        (lambda m, x: search_channels(m, x, 0.01), "budget: expected at least 0"),
        (lambda m, x: search_channels(m, x, 0.5, levels=(0.5, 0.2)), "levels: expected ascending"),
        (lambda m, x: search_channels(m, x, 0.5, data=iter([x])), "data: expected"),
        (
            lambda m, x: search_channels(m, x, 0.5, importance="taylor"),
            "data: expected batches, which 'taylor'",
        ),
        (
            lambda m, x: search_channels(m, torch.full((2, 6), torch.nan), 0.5),
            "example_inputs: expected .* got NaN",
        ),
    ],
)
def test_bad_input_leaves_the_model_as_it_was(call: Any, message: str) -> None:
    model, x = small(), torch.randn(8, 6)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises((ValueError, TypeError), match=message):
        call(model, x)
    after = model.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items())
