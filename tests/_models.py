"""Models that several test files share."""

from __future__ import annotations

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
