"""The orders that theory promises, on a small trained model: LeNet-300-100's shape on digits."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import pared
from pared._inputs import examples
from pared.pruning import structured

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench.accuracy import layers as study


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    x = torch.from_numpy(data.data).float() / 16
    return x[order], torch.from_numpy(data.target)[order].long()


def cross_entropy(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def train(model: nn.Module, epochs: int, pruner: pared.Pruner | None = None, lr: float = 2e-3) -> None:
    x, y = digits()[0][:1437], digits()[1][:1437]
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    generator = torch.Generator().manual_seed(1)
    for _ in range(epochs):
        for rows in torch.randperm(1437, generator=generator).split(64):
            optimizer.zero_grad()
            cross_entropy(model, (x[rows], y[rows])).backward()
            optimizer.step()
            if pruner is not None:
                pruner.step()


@cache
def lenet() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))
    train(model, 15)
    return model.eval()


def accuracy(model: nn.Module) -> float:
    x, y = digits()[0][1437:], digits()[1][1437:]
    with torch.no_grad():
        return float((model(x).argmax(1) == y).double().mean())


def test_layer_errors_are_in_order_and_gptq_beats_rounding() -> None:
    model, x = copy.deepcopy(lenet()), digits()[0]
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    seen, held_out = (study.inputs_of(model, layers, [part]) for part in (x[:1437], x[1437:]))
    result = study.study(layers, seen, held_out)
    shares = [study.ordered(errors) for errors in result["errors"].values()]
    assert sum(shares) / len(shares) >= 0.9
    for errors in result["errors"].values():  # and the better the freer the pattern
        assert errors["sparsegpt"] < errors["random"]
    free, wide, narrow = (sum(result["errors"][p]["sparsegpt"]) for p in study.PATTERNS)
    assert free < wide < narrow
    assert all(study.gain(rounding) <= 0.8 for rounding in result["rounding"].values())


def test_a_wrong_order_is_noticed() -> None:
    errors = {c: [0.1 * i, 0.1 * i] for i, c in enumerate(study.CRITERIA)}
    assert study.ordered(errors) == 1.0
    errors["wanda"][1] = 0.9
    assert study.ordered(errors) == 0.5


def test_twelve_times_fewer_weights_within_a_point() -> None:
    model = copy.deepcopy(lenet())
    dense = accuracy(model)
    schedule = pared.schedules.Polynomial(0.5, 1 - 1 / 12, begin=0, end=23 * 15)
    pruner = pared.Pruner(model, schedule, update_every=10)
    train(model, 40, pruner)
    print(dense, accuracy(model))
    report = pruner.finalize()
    assert report.weights / report.kept >= 11.99
    assert accuracy(model) >= dense - 0.01


def spearman(a: torch.Tensor, b: torch.Tensor) -> float:
    ranks = torch.stack([v.argsort().argsort().double() for v in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


def test_taylor_follows_the_oracle_better_than_magnitude() -> None:
    """Rank correlation with the change of the loss that removing each neuron of the second layer makes."""
    x, y = digits()
    torch.manual_seed(0)  # early in training, where gradients are not noise yet
    model = nn.Sequential(nn.Linear(64, 60), nn.ReLU(), nn.Linear(60, 40), nn.ReLU(), nn.Linear(40, 10))
    train(model, 2)
    data = [(x[:400], y[:400])]
    graph = structured._graph(model, examples(x[:2])[0])
    groups, _ = structured._groups(graph, model, "2", None)
    scores = {}
    for name in ("change_rate", "taylor", "magnitude"):
        found, _ = structured._channel_scores(model, groups, name, data, cross_entropy)
        scores[name] = found[0]
    taylor = spearman(scores["taylor"], scores["change_rate"])
    print(taylor, spearman(scores["magnitude"], scores["change_rate"]))
    assert taylor >= 0.8
    assert taylor > spearman(scores["magnitude"], scores["change_rate"])


def test_int8_within_half_a_point() -> None:
    model = copy.deepcopy(lenet())
    dense = accuracy(model)
    pared.quantize(model, list(digits()[0][:1437].split(256)), bits=8)
    with pared.quant.simulate(model):
        assert accuracy(model) >= dense - 0.005
