"""WoodFisher against the explicit inverse, the papers' recursion and brute force; Fisher of whole groups."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import pared
from pared.pruning import WoodFisher, calibration
from pared.pruning.patterns import parse_pattern
from pared.pruning.targets import Target
from pared.pruning.woodfisher import InverseFisher


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


Batch = tuple[torch.Tensor, torch.Tensor]


def cross_entropy(model: nn.Module, batch: Batch) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]).flatten(1), batch[1])


def make(kind: str) -> tuple[nn.Module, list[Batch]]:
    """A layer in double precision whose output is a few logits, and 40 samples for it."""
    torch.manual_seed(0)
    if kind == "linear":
        model: nn.Module = nn.Linear(10, 6)
        x = torch.randn(40, 10)
    else:
        groups = 2 if kind == "grouped" else 1
        model = nn.Sequential(nn.Conv2d(4, 6, 2, groups=groups), nn.AdaptiveAvgPool2d(1))
        x = torch.randn(40, 4, 3, 3)
    y = torch.randint(0, 6, (40,))
    return model.double(), [(x[i : i + 10].double(), y[i : i + 10]) for i in range(0, 40, 10)]


def target_of(model: nn.Module) -> Target:
    layer = "" if isinstance(model, nn.Linear) else "0"
    return Target(model.get_submodule(layer), layer, "weight", [f"{layer}.weight".strip(".")])


def gradients(model: nn.Module, data: list[Batch]) -> torch.Tensor:
    """Of each sample, [samples, *weight]."""
    weight = target_of(model).tensor
    found = []
    for x, y in data:
        for i in range(len(y)):
            loss = cross_entropy(model, (x[i : i + 1], y[i : i + 1]))
            found.append(torch.autograd.grad(loss, weight)[0])
    return torch.stack(found)


def seen(model: nn.Module, data: list[Batch], pattern: str, size: int, damping: float) -> InverseFisher:
    target = target_of(model)
    observer = WoodFisher(size, damping=damping).observe(target, parse_pattern(pattern))
    calibration.collect(model, [target], {target.name: observer}, data, cross_entropy, "'woodfisher'")
    result = observer.result()
    assert isinstance(result, InverseFisher)
    return result


def sherman_morrison(g: torch.Tensor, damping: float) -> torch.Tensor:
    """The papers' recursion for the inverse of ``damping I + 1/n sum g g^T``: [samples, size] -> matrix."""
    inverse = torch.eye(g.shape[1], dtype=g.dtype) / damping
    for row in g:
        u = inverse @ row
        inverse = inverse - torch.outer(u, u) / (len(g) + row @ u)
    return inverse


def check_inverse(found: InverseFisher, g: torch.Tensor, damping: float) -> None:
    rows = torch.stack([found.order.rows(one) for one in g], 1)  # [rows, samples, size]
    eye = torch.eye(found.order.size, dtype=torch.float64)
    for own, inverse in zip(rows, found.inverse, strict=True):
        explicit = torch.linalg.inv(damping * eye + own.t() @ own / len(g))
        torch.testing.assert_close(inverse, explicit, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(inverse, sherman_morrison(own, damping), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", ["linear", "conv", "grouped"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "1x4", "2x3"])
@pytest.mark.parametrize("size", [1, 7, 12, 64])
def test_the_inverse_is_the_explicit_one_and_the_recursions(kind: str, pattern: str, size: int) -> None:
    model, data = make(kind)
    found, g = seen(model, data, pattern, size, 0.01), gradients(model, data)
    check_inverse(found, g, 0.01)
    back = found.order.weight(found.weight)
    assert torch.equal(back, target_of(model).weight)


def test_a_wrong_divisor_is_caught() -> None:
    model, data = make("linear")
    found, g = seen(model, data, "unstructured", 8, 0.01), gradients(model, data)
    with pytest.raises(AssertionError):
        check_inverse(found, g[:-1], 0.01)


def test_scores_are_those_of_the_formula() -> None:
    model, data = make("linear")
    g = gradients(model, data).flatten(1)
    inverse = torch.linalg.inv(0.01 * torch.eye(60, dtype=torch.float64) + g.t() @ g / len(g))
    weight = target_of(model).weight.flatten()
    found = seen(model, data, "unstructured", 60, 0.01)
    want = weight.square() / (2 * inverse.diagonal())
    torch.testing.assert_close(found.order.weight(found.element_losses()).flatten(), want, rtol=1e-8, atol=0)

    blocks = seen(model, data, "1x5", 60, 0.01)
    losses = blocks.order.units(blocks.unit_losses())[0].flatten()
    for i, loss in enumerate(losses):
        own = slice(5 * i, 5 * i + 5)
        price = weight[own] @ torch.linalg.inv(inverse[own, own]) @ weight[own] / 2
        torch.testing.assert_close(loss, price, rtol=1e-8, atol=0)


def test_a_block_of_one_is_the_diagonal_fisher_criterion() -> None:
    model, data = make("conv")
    found = seen(model, data, "unstructured", 1, 1e-9)
    g = gradients(model, data)
    want = target_of(model).weight.square() * (g.square().mean(0) + 1e-9) / 2
    torch.testing.assert_close(found.order.weight(found.element_losses()), want, rtol=1e-8, atol=1e-14)


def quadratic(delta: torch.Tensor, g: torch.Tensor, damping: float) -> torch.Tensor:
    return ((g.flatten(1) @ delta.flatten()).square().mean() + damping * delta.square().sum()) / 2


def test_survivors_are_where_the_quadratic_is_least() -> None:
    """Nothing within the mask is better, and one weight alone costs what its score says."""
    model, data = make("linear")
    g, before = gradients(model, data), target_of(model).weight.clone()
    found = seen(model, data, "unstructured", 60, 0.01)
    dropped = torch.rand(6, 10, generator=torch.Generator().manual_seed(3)) < 0.5
    new = WoodFisher(60, damping=0.01).compensate(found, dropped)
    assert new is not None
    assert bool((new[dropped] == 0).all())
    best = quadratic(new - before, g, 0.01)
    assert best < quadratic(torch.where(dropped, 0.0, before) - before, g, 0.01)
    variable = new.clone().requires_grad_()
    (slope,) = torch.autograd.grad(quadratic(variable - before, g, 0.01), variable)
    assert float(slope[~dropped].abs().max()) < 1e-10

    one = torch.zeros_like(dropped)
    one[2, 3] = True
    alone = WoodFisher(60, damping=0.01).compensate(found, one)
    assert alone is not None
    price = found.order.weight(found.element_losses())[2, 3]
    torch.testing.assert_close(quadratic(alone - before, g, 0.01), price, rtol=1e-8, atol=0)


def test_pruning_with_the_update_costs_less() -> None:
    digits = load_digits()
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32)[:300], torch.tensor(digits.target)[:300]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(80):  # the empirical Fisher matrix means something where training has converged
        optimizer.zero_grad()
        cross_entropy(model, (x, y)).backward()
        optimizer.step()
    losses = {}
    for update in (True, False):
        own = copy.deepcopy(model)
        importance = WoodFisher(32, update=update)
        report = pared.prune(own, 0.5, importance=importance, data=[(x, y)], loss_fn=cross_entropy)
        assert report.sparsity == 0.5
        losses[update] = float(cross_entropy(own, (x, y)).detach())
    assert losses[True] < 0.7 * losses[False]


def test_n_of_m_with_the_update() -> None:
    model, data = make("conv")
    pared.prune(model, pattern="2:4", importance="woodfisher", data=data, loss_fn=cross_entropy)
    assert bool(((target_of(model).weight != 0).sum(1) == 2).all())


def test_what_was_zero_stays_zero() -> None:
    model, data = make("linear")
    with torch.no_grad():
        model.weight[:, ::3] = 0
    was = model.weight.detach() == 0
    pared.prune(model, 0.1, importance="woodfisher", data=data, loss_fn=cross_entropy)
    assert bool((model.weight.detach()[was] == 0).all())
    pared.prune(model, 0.7, importance="woodfisher", data=data, loss_fn=cross_entropy)
    assert int((model.weight == 0).sum()) == 42


def test_a_pruner_takes_the_scores() -> None:
    model, data = make("linear")
    before = model.weight.detach().clone()
    pruner = pared.Pruner(
        model, pared.schedules.OneShot(0.5), importance="woodfisher", data=data, loss_fn=cross_entropy
    )
    pruner.step()
    kept = model.weight.detach() != 0
    assert int(kept.sum()) == 30
    assert torch.equal(model.weight.detach()[kept], before[kept])


@pytest.mark.parametrize(
    ("make_one", "error", "message"),
    [
        (lambda: WoodFisher(0), ValueError, "block: expected a number of weights >= 1, got 0"),
        (lambda: WoodFisher(1.5), TypeError, "block: expected a number of weights, got float"),  # type: ignore[arg-type]
        (lambda: WoodFisher(damping=0), ValueError, "damping: expected a number > 0, got 0"),
        (lambda: WoodFisher(damping="x"), TypeError, "damping: expected a number > 0, got str"),  # type: ignore[arg-type]
    ],
)
def test_wrong_arguments(make_one: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make_one()


# ---------------------------------------------------------------- groups


class Residual(nn.Module):
    """Two layers whose outputs are summed share their channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.head(torch.relu(self.a(x) + self.b(x)))
        return y


def group_scores(model: nn.Module, data: list[Batch]) -> torch.Tensor:
    total = torch.zeros(8, dtype=torch.float64)
    for x, y in data:
        for i in range(len(y)):
            model.zero_grad()
            cross_entropy(model, (x[i : i + 1], y[i : i + 1])).backward()
            sums = [(m.weight.grad * m.weight.detach()).double().sum(1) for m in (model.a, model.b)]
            total += (sums[0] + sums[1]).square()
    model.zero_grad()
    return total / 2 / sum(len(y) for _, y in data)


def test_fisher_of_a_group_adds_before_it_squares() -> None:
    from pared._inputs import examples
    from pared.pruning import structured

    torch.manual_seed(0)
    model = Residual()
    x, y = torch.randn(21, 6), torch.randint(0, 3, (21,))
    data = [(x[:8], y[:8]), (x[8:], y[8:])]
    want = group_scores(model, data)
    groups, _ = structured._groups(structured._graph(model, examples(x)[0]), model, None, None)
    (group,) = [g for g in groups if set(g.producers) == {"a", "b"}]
    scores, name = structured._channel_scores(model, [group], "fisher", data, cross_entropy)
    assert name == "fisher"
    torch.testing.assert_close(scores[0].double(), want, rtol=1e-5, atol=1e-12)
    # The squares of each layer alone, added up, order the channels otherwise.
    separate = torch.zeros(8, dtype=torch.float64)
    for i in range(21):
        model.zero_grad()
        cross_entropy(model, (x[i : i + 1], y[i : i + 1])).backward()
        for m in (model.a, model.b):
            separate += (m.weight.grad * m.weight.detach()).double().sum(1).square()
    assert not torch.equal(separate.argsort(), want.argsort())
    report = pared.prune_channels(
        model, x, 0.5, importance="fisher", data=data, loss_fn=cross_entropy, round_to=1
    )
    assert report.groups[0][1:] == (8, 4)
