"""Models that several test files share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import pared._accelerate as acc
from pared.nn import PackedModule


def sparse_linear(
    n_in: int,
    n_out: int,
    density: float = 0.2,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> nn.Linear:
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(n_in, n_out, bias=bias).to(dtype).eval()
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
        layer.weight.mul_(torch.rand(n_out, n_in, generator=generator) < density)
        layer.weight.mul_(max(1.0, n_in * density) ** -0.5)  # outputs as large as inputs
    return layer


def sparse_conv(
    channels: int, out: int, kernel: int | tuple[int, int], density: float = 0.3, seed: int = 0, **kwargs: Any
) -> nn.Conv2d:
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Conv2d(channels, out, kernel, **kwargs).eval()
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
        layer.weight.mul_(torch.rand(layer.weight.shape, generator=generator) < density)
        layer.weight.mul_(max(1.0, layer.weight[0].numel() * density) ** -0.5)
    return layer


class FakeTimings:
    """What interleave would return, of known times."""

    def __init__(self, **seconds: float) -> None:
        self.seconds = seconds

    def median(self, name: str) -> float:
        return self.seconds[name]

    p95 = median

    def gain(self, name: str, baseline: str) -> float:
        return self.seconds[baseline] / self.seconds[name]


def set_times(monkeypatch: pytest.MonkeyPatch, seconds: Callable[[str, PackedModule | None], float]) -> None:
    """Give `pared.accelerate` the time of each layer (name, module; None for the dense one): what it decides
    then does not depend on how busy the machine is. The model as a whole is twice as fast."""

    def time_layer(c: acc.layers.Candidate, variants: dict[str, acc.layers.Variant]) -> float:
        before = seconds(c.name, None)
        for v in variants.values():
            v.after = seconds(c.name, v.module)
            v.speedup = before / v.after
        return before

    monkeypatch.setattr(acc.timing, "time_layer", time_layer)
    monkeypatch.setattr(acc.timing, "time_hand_over", lambda layers, calls: 0.0)
    monkeypatch.setattr(acc.timing, "time_sharing", lambda *_: 0.0)
    monkeypatch.setattr(acc.timing, "time_block", lambda *rest: (0.0, 1.0))
    race = FakeTimings(dense=1.0, pared=0.5)
    monkeypatch.setattr("pared._target.interleave", lambda calls, **kwargs: race)


def fused_is_faster(name: str, module: PackedModule | None) -> float:
    """For `set_times`: every kernel beats the dense layer, and one with a fused activation the others."""
    return 1.0 if module is None else 0.5 if module.activation is None else 0.25
