"""Bad input to every entry point: a clear error, and a model that is exactly as it was."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pared
from pared import training
from pared.pruning import WoodFisher, as_linears


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def network() -> nn.Sequential:
    """Flags, modes, hooks, gradients and buffers that are not what a call would leave behind."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.5), nn.Linear(12, 4))
    model.train()
    model[1].eval()
    model[1].weight.requires_grad_(False)
    model[0].weight.grad = torch.ones(12, 8)
    model[2].register_forward_hook(lambda *a: None)
    return model


def fingerprint(model: nn.Module) -> tuple[Any, ...]:
    """Everything of a model that a call could leave changed."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    modules = tuple(
        (
            name,
            type(m),
            id(m),
            m.training,
            tuple(map(id, m._forward_hooks.values())),
            tuple(map(id, m._forward_pre_hooks.values())),
            tuple(map(id, m._backward_hooks.values())),
        )
        for name, m in model.named_modules()
    )
    parameters = tuple(
        (name, id(p), p.requires_grad, None if p.grad is None else p.grad.numpy().tobytes())
        for name, p in model.named_parameters()
    )
    return digest.hexdigest(), modules, parameters, torch.backends.mha.get_fastpath_enabled()


Batch = tuple[torch.Tensor, torch.Tensor]


def good() -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, 8, generator=generator)
    return [(x[:4], torch.arange(4)), (x[4:], torch.arange(4))]


def with_nan() -> list[Batch]:
    (x, y), second = good()
    x[2, 3] = torch.nan
    return [second, (x, y)]


def loss_fn(model: nn.Module, batch: Batch) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def without_gradient(model: nn.Module, batch: Batch) -> torch.Tensor:
    return loss_fn(model, batch).detach()


def fails(model: nn.Module, batch: Batch) -> torch.Tensor:
    loss_fn(model, batch)
    raise RuntimeError("the user's own code")


def exhausted() -> Any:
    iterator = iter(good())
    list(iterator)
    return iterator


DATA = ("wanda", "activation", "apoz", "entropy", "mutual_information", "change_rate", "sparsegpt", "obc")
GRADIENTS = ("gradient", "taylor", "fisher", "woodfisher")
X = torch.randn(4, 8, generator=torch.Generator().manual_seed(2))


def prune(**options: Any) -> Callable[[nn.Module], object]:
    return lambda model: pared.prune(model, 0.5, **options)


def channels(**options: Any) -> Callable[[nn.Module], object]:
    return lambda model: pared.prune_channels(model, X, 0.5, **options)


def layers(**options: Any) -> Callable[[nn.Module], object]:
    return lambda model: pared.prune_layers(model, X, 1, **options)


def pruner(**options: Any) -> Callable[[nn.Module], object]:
    def call(model: nn.Module) -> None:
        pared.Pruner(model, pared.schedules.OneShot(0.5), **options).step()

    return call


def quantize(data: Any, **options: Any) -> Callable[[nn.Module], object]:
    return lambda model: pared.quantize(model, data, **options)


CASES: dict[str, tuple[Callable[[nn.Module], object], str]] = {}
for name in DATA:
    CASES[f"{name}: no data"] = (prune(importance=name), f"data: expected batches.*{name}")
    CASES[f"{name}: NaN"] = (prune(importance=name, data=with_nan()), "NaN or infinity")
    CASES[f"{name}: exhausted"] = (
        prune(importance=name, data=exhausted()),
        "several times" if name in ("sparsegpt", "obc") else "at least one batch, got none",
    )
    CASES[f"{name}: empty"] = (prune(importance=name, data=[]), "at least one batch, got none")
for name in GRADIENTS:
    CASES[f"{name}: no data"] = (prune(importance=name, loss_fn=loss_fn), f"data: expected batches.*{name}")
    CASES[f"{name}: no loss"] = (prune(importance=name, data=good()), f"loss_fn: expected a callable.*{name}")
    for what, loss, text in (
        ("no gradient", without_gradient, "without a gradient in batch 0"),
        ("no scalar", lambda m, b: m(b[0]), r"scalar tensor .* got shape \[\d, 4\] in batch 0"),
        ("no tensor", lambda m, b: 1.0, "scalar tensor .* got float in batch 0"),
        ("the user's error", fails, "the user's own code"),
    ):
        CASES[f"{name}: {what}"] = (prune(importance=name, data=good(), loss_fn=loss), text)
    CASES[f"{name}: NaN"] = (
        prune(importance=name, data=with_nan(), loss_fn=loss_fn),
        "finite loss, got nan in batch 1",
    )
    CASES[f"{name}: exhausted"] = (
        prune(importance=name, data=exhausted(), loss_fn=loss_fn),
        "at least one batch, got none",
    )
CASES |= {
    "prune: everything": (lambda m: pared.prune(m, 1.0), r"sparsity: expected a number in \[0, 1\), got 1.0"),
    "prune: percent": (lambda m: pared.prune(m, 90), "90 % is 0.9"),
    "prune: no match": (prune(include="encoder.*"), "include: expected a filter that matches"),
    "prune: scores with NaN": (
        prune(importance=lambda m: m.weight * torch.nan),
        "scores without NaN of layer '0'",
    ),
    "prune: scores of another shape": (
        prune(importance=lambda m: m.weight[:1]),
        r"scores of shape \[12, 8\]",
    ),
    "prune: a criterion that fails": (prune(importance=lambda m: 1 / 0), "division by zero"),
    "pruner: no data": (pruner(importance="wanda"), "data: expected batches"),
    "pruner: an iterator": (pruner(importance="wanda", data=exhausted()), "gone through at every choice"),
    "pruner: NaN": (pruner(importance="wanda", data=with_nan()), "NaN or infinity at layer '0' in batch 1"),
    "pruner: no gradient": (
        pruner(importance="taylor", data=good(), loss_fn=without_gradient),
        "without a gradient",
    ),
    "pruner: beyond one": (
        lambda m: pared.Pruner(m, lambda step: 1.0).step(),
        r"schedule: expected a sparsity in \[0, 1\) at step 1",
    ),
    "channels: everything": (
        lambda m: pared.prune_channels(m, X, 1.0),
        r"ratio: expected a number in \[0, 1\)",
    ),
    "channels: no data": (channels(importance="wanda"), "data: expected batches"),
    "channels: NaN": (channels(importance="entropy", data=with_nan()), "NaN or infinity"),
    "channels: no gradient": (
        channels(importance="fisher", data=good(), loss_fn=without_gradient),
        "without a gradient",
    ),
    "channels: inputs of another size": (
        lambda m: pared.prune_channels(m, torch.zeros(2, 5), 0.5),
        "example_inputs: expected inputs that the model runs with, got RuntimeError",
    ),
    "layers: too many": (lambda m: pared.prune_layers(m, X, 9), "n: expected 0 to"),
    "layers: NaN": (layers(data=with_nan(), include="re:^[03]$"), "NaN or infinity|n: expected"),
    "quantize: no data": (quantize(None), "data: expected batches"),
    "quantize: empty": (quantize([]), "at least one batch, got none"),
    "quantize: an iterator": (quantize(exhausted()), "several times"),
    "quantize: NaN": (quantize(with_nan()), "NaN or infinity"),
    "as_linears: nothing there": (as_linears, "got none of them"),
    "prune_until: NaN": (
        lambda m: training.prune_until(m, lambda _: float("nan")),
        "evaluate: expected a number",
    ),
    "prune_until: data": (
        lambda m: training.prune_until(m, lambda _: 1.0, importance="wanda", data=with_nan(), rounds=2),
        "NaN or infinity",
    ),
    "sensitivity: fails": (lambda m: training.sensitivity(m, fails_later()), "the user's own code"),
    "woodfisher: NaN": (
        prune(importance=WoodFisher(8), data=with_nan(), loss_fn=loss_fn),
        "finite loss, got nan in batch 1",
    ),
}


def fails_later() -> Callable[[nn.Module], float]:
    """Good for the baseline and the first layer, and then no more."""
    calls: list[int] = []

    def evaluate(model: nn.Module) -> float:
        calls.append(1)
        if len(calls) > 2:
            raise RuntimeError("the user's own code")
        return 1.0

    return evaluate


@pytest.mark.parametrize("case", CASES)
def test_the_error_is_clear_and_the_model_as_it_was(case: str) -> None:
    call, message = CASES[case]
    model = network()
    before = fingerprint(model)
    with pytest.raises((ValueError, TypeError, RuntimeError, ZeroDivisionError), match=message):
        call(model)
    assert fingerprint(model) == before


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            raise TypeError("no backward pass")
        return self.b(self.a(x))


def test_a_graph_that_cannot_be_traced() -> None:
    model = Untraceable()
    before = fingerprint(model)
    with pytest.raises(ValueError, match=r"graph torch-pruning can trace .* TypeError: no backward pass"):
        pared.prune_channels(model, X, 0.5)
    assert fingerprint(model) == before


def test_a_ratio_never_empties_a_layer() -> None:
    """What would be emptied keeps its best unit, instead of an error."""
    model = network()
    with torch.no_grad():
        model[0].weight *= 1e-6
    pared.prune(model, 0.9)
    assert int((model[0].weight != 0).sum()) >= 1
    other = network().eval()
    pared.prune_channels(other, X, 0.99, round_to=1)
    assert other[0].out_features == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.eval(),
        lambda m: m[0].weight.requires_grad_(False),
        lambda m: m[0].weight.data.mul_(1.0000001),
        lambda m: m[4].register_forward_pre_hook(lambda *a: None),
        lambda m: setattr(m[0].weight, "grad", None),
        lambda m: m[1].running_mean.add_(1),
        lambda m: m.__setitem__(2, nn.ReLU()),
    ],
)
def test_the_fingerprint_sees_every_kind_of_change(change: Callable[[Any], object]) -> None:
    model = network()
    before = fingerprint(model)
    change(model)
    assert fingerprint(model) != before
