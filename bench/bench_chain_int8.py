"""The feed-forward part of a transformer in 8 bits, Linear-GELU-Linear: in one call, in two, and in MKL.

In one call a row that the first layer writes is quantised by the second while it is in L2; the outputs are
the same bits. Dense int8 weights, and blocks of 4x4 with 80 % zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional

import pared
from bench.bench_blocks import block_pruned
from bench.bench_gemm_int8 import TOKENS, close, torch_dynamic
from bench.bench_linear import THREADS, pruned


@THREADS
@pytest.mark.parametrize("sparsity", [0.0, 0.8])
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("width", "hidden"), [(768, 3072), (384, 1536)])
def test_chain_int8(versus: Any, width: int, hidden: int, tokens: int, sparsity: float, threads: int) -> None:
    block = (4, 4)
    shapes = ((hidden, width), (width, hidden))
    up, down = (block_pruned(*s, sparsity, block) if sparsity else pruned(*s, 0.0) for s in shapes)
    biases = (torch.randn(hidden), torch.randn(width))
    x = torch.randn(tokens, width)
    linear, gelu = functional.linear, functional.gelu
    packed = [
        pared.ops.BSRInt8.from_dense(w, block=block) if sparsity else pared.ops.Int8.from_dense(w)
        for w in (up, down)
    ]
    first, second = (torch_dynamic("x86", w, b) for w, b in zip((up, down), biases, strict=True))

    def apart() -> Any:
        y = pared.ops.linear(x, packed[0], biases[0], "gelu")
        return pared.ops.linear(y, packed[1], biases[1])

    calls: dict[str, Callable[[], Any]] = {
        "nn.Linear": lambda: linear(gelu(linear(x, up, biases[0])), down, biases[1]),
        "torch int8 dynamic, x86": lambda: second(gelu(first(x))),
        "pared, a call a layer": apart,
        "pared": lambda: pared.ops.linear_chain(x, packed, biases, ("gelu", None)),
    }
    close(calls["pared"](), calls["nn.Linear"](), 0.05)
    assert torch.equal(calls["pared"](), apart())
    versus(
        calls,
        suite="linear chain int8",
        case=f"{width}-{hidden}-{width}, {tokens} tokens",
        cell="dense" if not sparsity else f"4x4 {sparsity * 100:.0f} %",
        rivals=("nn.Linear", "pared, a call a layer"),
        work=2.0 * tokens * sum(w.nnz for w in packed),
        facts={"tokens": tokens, "sparsity": sparsity, "dtype": "int8"},
    )
