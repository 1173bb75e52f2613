"""What pruning and rounding cost a classifier: LeNet-300-100's shape on scikit-learn's digits.

A seed draws the split (1437 images to train on, 360 to test on), the start, and the order of the images.
Every comparison is between models of the same seed that were trained for the same number of epochs.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

import pared
from pared._inputs import examples
from pared.pruning import structured

TRAIN = 1437
BATCH = 64
STEPS = -(-TRAIN // BATCH)  # an epoch
SETTINGS = {"dense epochs": 15, "epochs at 12x": 40, "epochs at 95 %": 30, "epochs before Taylor": 2}
WORK = 7  # calls of `advance` in `run`

Advance = Callable[[str], object]


class Digits(NamedTuple):
    """Images [n, 64] in [0, 1] and labels [n]."""

    x: torch.Tensor
    y: torch.Tensor
    x_test: torch.Tensor
    y_test: torch.Tensor


def load(seed: int) -> Digits:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    images, labels = torch.from_numpy(x).float()[order] / 16, torch.from_numpy(y).long()[order]
    return Digits(images[:TRAIN], labels[:TRAIN], images[TRAIN:], labels[TRAIN:])


def network(seed: int, *widths: int) -> nn.Sequential:
    """Linear layers and ReLUs; without `widths` 64-300-100-10."""
    torch.manual_seed(seed)
    sizes = (64, *(widths or (300, 100)), 10)
    layers: list[nn.Module] = []
    for n_in, n_out in itertools.pairwise(sizes):
        layers += [nn.Linear(n_in, n_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def cross_entropy(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def train(
    model: nn.Module, data: Digits, epochs: int, *, seed: int = 0, pruner: pared.Pruner | None = None
) -> nn.Module:
    """Adam at a constant rate, in place."""
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(TRAIN, generator=generator).split(BATCH):
            optimizer.zero_grad()
            cross_entropy(model, (data.x[rows], data.y[rows])).backward()
            optimizer.step()
            if pruner is not None:
                pruner.step()
    return model


def accuracy(model: nn.Module, data: Digits) -> float:
    with torch.no_grad():
        return float((model(data.x_test).argmax(1) == data.y_test).double().mean())


def pruned(
    dense: nn.Module, data: Digits, schedule: pared.schedules.Schedule, epochs: int, seed: int
) -> tuple[float, float]:
    """Accuracy after pruning on `schedule` while training, and how many times fewer weights there are."""
    model = copy.deepcopy(dense)
    pruner = pared.Pruner(model, schedule, update_every=5)
    train(model, data, epochs, seed=seed + 1, pruner=pruner)
    report = pruner.finalize()
    return accuracy(model, data), report.weights / report.kept


def iterative(sparsity: float, rounds: int, steps: int) -> pared.schedules.Schedule:
    """`rounds` times prune the same share of what is left, and train on for as long each time."""

    def schedule(step: int) -> float:
        done = min(rounds, 1 + (step - 1) * rounds // steps)
        return 1 - (1 - sparsity) ** (done / rounds)

    return schedule


def spearman(a: torch.Tensor, b: torch.Tensor) -> float:
    ranks = torch.stack([v.argsort().argsort().double() for v in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


def rank_correlations(model: nn.Module, data: Digits, layer: str) -> dict[str, float]:
    """Of criteria, over a layer's neurons, with the change of the loss that removing each of them makes."""
    seen = [(data.x[:400], data.y[:400])]
    graph = structured._graph(model, examples(data.x[:2])[0])
    groups, _ = structured._groups(graph, model, layer, None)

    def scores(name: str) -> torch.Tensor:
        return structured._channel_scores(model, groups, name, seen, cross_entropy)[0][0]

    oracle = scores("change_rate")
    return {name: spearman(scores(name), oracle) for name in ("taylor", "fisher", "magnitude")}


def run(seed: int, advance: Advance = lambda what: None) -> dict[str, float]:
    """Accuracies (0 to 1) and rank correlations of one seed."""
    data, epochs = load(seed), SETTINGS
    out: dict[str, float] = {}
    advance("digits: dense")
    dense = train(network(seed), data, epochs["dense epochs"], seed=seed)
    out["dense"] = accuracy(dense, data)

    advance("digits: 8 bits")
    rounded = copy.deepcopy(dense)
    pared.quantize(rounded, list(data.x.split(256)), bits=8)
    with pared.quant.simulate(rounded):
        out["int8"] = accuracy(rounded, data)

    n = epochs["epochs at 12x"]
    advance("digits: 12 times fewer weights")
    ramp = pared.schedules.Polynomial(0.5, 1 - 1 / 12, begin=0, end=STEPS * n * 2 // 5)
    out["12x"], out["12x, times fewer"] = pruned(dense, data, ramp, n, seed)
    out["12x, dense"] = accuracy(train(copy.deepcopy(dense), data, n, seed=seed + 1), data)

    n = epochs["epochs at 95 %"]
    schedules = {
        "one-shot": pared.schedules.OneShot(0.95),
        "iterative": iterative(0.95, 5, STEPS * n),
        "cubic": pared.schedules.Polynomial(0.0, 0.95, begin=0, end=STEPS * n * 3 // 5),
    }
    for name, schedule in schedules.items():
        advance(f"digits: 95 %, {name}")
        out[f"95 %, {name}"], fewer = pruned(dense, data, schedule, n, seed)
        assert math.isclose(fewer, 20, rel_tol=0.01)

    advance("digits: Taylor and the oracle")
    early = train(network(seed, 60, 40), data, epochs["epochs before Taylor"], seed=seed)
    for name, value in rank_correlations(early, data, "2").items():
        out[f"oracle, {name}"] = value
    trained = train(early, data, epochs["dense epochs"], seed=seed + 1)
    for name, value in rank_correlations(trained, data, "2").items():
        out[f"oracle of a trained model, {name}"] = value
    return out
