"""pared.restore: plain modules that are what they were."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from _models import fused_is_faster, set_times, sparse_conv, sparse_linear
from torch import Tensor, nn

import pared
import pared._accelerate
from pared.nn import Conv2d, Fused, Linear, PackedModule


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(sparse_conv(3, 8, 3, padding="same"), nn.ReLU(inplace=True))
        self.embed = nn.Embedding(8, 8)
        self.head = sparse_linear(8, 8, bias=False)
        self.head.weight = self.embed.weight
        self.frozen = sparse_linear(8, 4)
        self.frozen.weight.requires_grad_(False)
        self.register_buffer("scale", torch.tensor(2.0))
        self.register_buffer("local", torch.tensor(3.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x).mean((2, 3)) + self.embed(torch.tensor(1))
        return self.frozen(self.head(y) * self.scale)


@pytest.fixture(autouse=True)
def known_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever can be fused is, however busy the machine."""
    set_times(monkeypatch, fused_is_faster)
    monkeypatch.setattr(pared._accelerate.timing, "MODEL_SECONDS", 0.0)


def convert(model: nn.Module, x: Any) -> nn.Module:
    return pared.accelerate(model, x, min_speedup=0, progress=False, formats=["csr"])


def test_everything_comes_back() -> None:
    model, x = Net(), torch.randn(2, 3, 6, 6)
    fast = convert(model, x)
    assert any(isinstance(m, PackedModule) for m in fast.modules())
    before = copy.deepcopy(fast.state_dict())
    plain = pared.restore(fast)
    assert not any(isinstance(m, (PackedModule, Fused)) for m in plain.modules())
    assert repr(plain) == repr(model)
    assert type(plain) is Net
    expected, state = model.state_dict(), plain.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[k], expected[k]) for k in expected)
    assert [k for k, p in plain.named_parameters() if p.requires_grad] == [
        k for k, p in model.named_parameters() if p.requires_grad
    ]
    assert plain.head.weight is plain.embed.weight
    assert torch.equal(plain.local, model.local)
    assert not plain.training
    with pytest.raises(ValueError, match="without a report"):
        pared.report(plain)
    assert torch.equal(plain(x), model.eval()(x))
    # It is a model of its own, and trains.
    assert all(torch.equal(v, before[k]) for k, v in fast.state_dict().items())
    plain.train()(x).sum().backward()
    assert plain.stem[0].weight.grad is not None
    with torch.no_grad():
        for p in plain.parameters():
            p.add_(1)
    assert all(torch.equal(v, before[k]) for k, v in fast.state_dict().items())
    # And is accelerated again.
    again = convert(plain, x)
    assert isinstance(again.head, Linear)


def test_ties_that_someone_broke_stay_broken() -> None:
    fast = convert(Net(), torch.randn(2, 3, 6, 6))
    with torch.no_grad():
        fast.embed.weight.add_(1)
    plain = pared.restore(fast)
    assert plain.head.weight is not plain.embed.weight
    assert torch.equal(plain.embed.weight, fast.embed.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    model = nn.Sequential(sparse_linear(8, 8), sparse_linear(8, 4, bias=False)).to(dtype)
    plain = pared.restore(convert(model, torch.randn(2, 8).to(dtype)))
    for a, b in zip(plain.parameters(), model.parameters(), strict=True):
        assert a.dtype == dtype
        assert torch.equal(a, b)


def test_a_model_built_by_hand() -> None:
    model = nn.Sequential(
        Linear.from_module(sparse_linear(8, 8), activation="relu"),
        Fused(nn.ReLU()),
        Conv2d.from_module(sparse_conv(1, 1, 1)),
    )
    plain = pared.restore(model)
    assert [type(m) for m in plain] == [nn.Linear, nn.ReLU, nn.Conv2d]


def test_what_it_refuses() -> None:
    with pytest.raises(TypeError, match="model: expected a torch module, got int"):
        pared.restore(3)
    with pytest.raises(ValueError, match="model: expected an accelerated model, got a plain Linear"):
        pared.restore(nn.Linear(2, 2))
    # Nothing was faster: still a model of accelerate, and still plain.
    fast = convert(nn.Sequential(nn.ReLU()), torch.randn(2, 2))
    assert repr(pared.restore(fast)) == repr(nn.Sequential(nn.ReLU()))
