"""Thresholds that give each layer its share, and LAMP's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import pared
from pared.pruning import LAMP, Statistics, criteria, oneshot
from pared.pruning import threshold as limits


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(13, 32), nn.ReLU(), nn.Conv1d(1, 4, 3), nn.ReLU(), nn.Linear(30, 7))
    with torch.no_grad():
        model[4].weight.mul_(100)
    return model


@settings(max_examples=15)
@given(value=st.floats(0.01, 2), rule=st.sampled_from(["absolute", "std", "norm"]), seed=st.integers(0, 9))
def test_what_is_below_goes_and_nothing_else(value: float, rule: str, seed: int) -> None:
    model = network(seed)
    before = {n: p.detach().numpy().copy() for n, p in model.named_parameters()}
    shares = limits(model, value, rule)
    assert all(np.array_equal(before[n], p.detach().numpy()) for n, p in model.named_parameters())
    pared.prune(model, shares)
    for name, share in shares.items():
        old, new = before[name].astype(np.float64), model.get_parameter(name).detach().numpy()
        scale = {"absolute": 1.0, "std": old.std(), "norm": np.sqrt((old**2).mean())}[rule]
        kept = np.abs(before[name]) >= value * scale
        if share < 0.99:
            assert np.array_equal(new != 0, kept)
        else:
            assert 1 <= np.count_nonzero(new) <= 0.01 * new.size + 1


def test_shares_of_filters_and_bounds() -> None:
    model = network()
    shares = limits(model, 0.1, include=nn.Linear, keep_last=1)
    assert list(shares) == ["0.weight"]
    assert limits(model, 1e9, most=0.5) == {"0.weight": 0.5, "2.weight": 0.5, "4.weight": 0.5}
    assert limits(model, 1e-30) == {"0.weight": 0.0, "2.weight": 0.0, "4.weight": 0.0}
    for p in model.parameters():
        p.data.zero_()
    assert set(limits(model, 0.5, "std").values()) == {0.0}  # nothing is below a threshold of zero


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((0,), ValueError, "value: expected a number > 0, got 0"),
        ((float("nan"),), ValueError, "value: expected a number > 0, got nan"),
        (("a",), TypeError, "value: expected a number > 0, got str"),
        ((0.1, "sigma"), ValueError, "rule: expected .*absolute.*std.*norm.*got 'sigma'"),
    ],
)
def test_arguments(args: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        limits(network(), *args)
    with pytest.raises(ValueError, match=r"most: expected a number in \(0, 1\), got 1"):
        limits(network(), 0.1, most=1)
    broken = network()
    broken[0].weight.data[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"0\.weight"):
        limits(broken, 0.1)


def lamp(w: torch.Tensor) -> torch.Tensor:
    flat = w.double().flatten()
    larger = torch.stack([flat[flat.abs() >= v.abs()].square().sum() for v in flat])
    return (flat.square() / larger).reshape(w.shape)


def test_lamp_is_its_definition() -> None:
    w = torch.randn(9, 11, generator=torch.Generator().manual_seed(0))
    w[0] = 0
    layer = nn.Linear(11, 9)
    scores = LAMP().score(layer, Statistics(weight=w, layer="a", parameter="weight"))
    torch.testing.assert_close(scores.double(), lamp(w), rtol=1e-6, atol=0)
    assert scores.max() == 1.0
    assert (scores[0] == 0).all()


def test_lamp_does_not_depend_on_scales_and_keeps_the_largest_of_each_layer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept = []
    for scale in (1.0, 1e-3):
        model = network()
        with torch.no_grad():
            model[0].weight.mul_(scale)
        report = pared.prune(model, 0.97, importance="lamp")
        assert report.scope == "global"
        kept.append([layer.kept for layer in report.layers])
        before = network()
        for layer in report.layers:
            new, old = model.get_parameter(layer.name), before.get_parameter(layer.name)
            assert layer.kept >= 1
            assert old.abs()[new != 0].min() >= old.abs()[new == 0].max()  # magnitude within the layer
    assert kept[0] == kept[1]
    assert oneshot.resolve("lamp").name == "lamp"
    # Planted: without the sum behind it the score is magnitude, and the small layer is nearly emptied.
    monkeypatch.setattr(criteria.LAMP, "score", lambda self, module, seen: seen.weight.square())
    model = network()
    with torch.no_grad():
        model[0].weight.mul_(1e-3)
    assert [layer.kept for layer in pared.prune(model, 0.97, importance="lamp").layers] != kept[0]
