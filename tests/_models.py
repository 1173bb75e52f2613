"""Models that several test files share."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


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
    return layer
