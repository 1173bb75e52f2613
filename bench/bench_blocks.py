"""Int8 Linear with zeros in blocks (1x4, 4x4, 16x4) against torch's dense float32 and int8, and our own.

Activations come and go as float32: quantising them is part of the time. What is printed last: the block
sparsity from which a pattern beats dense int8, interpolated between those measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.nn import functional

import pared
from bench.bench_gemm_int8 import ENGINES, close, torch_dynamic
from bench.bench_linear import SHAPES, THREADS
from bench.table import geometric_mean

SPARSITIES = [0.5, 0.8, 0.9]
BLOCKS = [(1, 4), (4, 4), pytest.param((16, 4), marks=pytest.mark.full)]
TOKENS = [128, pytest.param(384, marks=pytest.mark.full), pytest.param(1024, marks=pytest.mark.full)]

# (pattern, threads) -> sparsity -> how many times faster than dense int8, a number a case.
_OVER_INT8: dict[tuple[str, int], dict[float, list[float]]] = {}


def block_pruned(out: int, inputs: int, sparsity: float, block: tuple[int, int]) -> torch.Tensor:
    """A Gaussian weight with its weakest blocks zeroed."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(out, inputs, generator=generator) * inputs**-0.5
    r, c = block
    strength = w.reshape(out // r, r, inputs // c, c).norm(dim=(1, 3))
    kept = round(strength.numel() * (1 - sparsity))
    threshold = strength.flatten().kthvalue(strength.numel() - kept).values
    return w * (strength > threshold).repeat_interleave(r, 0).repeat_interleave(c, 1)


def crossover(points: list[tuple[float, float]]) -> str:
    """The sparsity at which a speed-up over dense int8 passes 1; times are linear between two sparsities."""
    if points[0][1] >= 1:
        return f"below {points[0][0]:.0%}"
    for (s0, r0), (s1, r1) in pairwise(points):
        if r0 < 1 <= r1:
            return f"{s0 + (s1 - s0) * (1 / r0 - 1) / (1 / r0 - 1 / r1):.0%}"
    return f"above {points[-1][0]:.0%}"


@pytest.fixture(scope="module", autouse=True)
def _crossovers(pytestconfig: pytest.Config) -> Iterator[None]:
    yield
    lines = []
    for (pattern, threads), cells in _OVER_INT8.items():
        points = sorted((s, geometric_mean(ratios)) for s, ratios in cells.items())
        means = ", ".join(f"{ratio:.2f} at {s:.0%}" for s, ratio in points)
        lines.append(f"{pattern} over dense int8, threads {threads}: {means}; even {crossover(points)}")
    capture = pytestconfig.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print("\n" + "\n".join(lines))


@THREADS
@pytest.mark.parametrize("block", BLOCKS, ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("out", "inputs"), SHAPES)
def test_blocks_int8(
    versus: Any, out: int, inputs: int, tokens: int, sparsity: float, block: tuple[int, int], threads: int
) -> None:
    w, bias, x = block_pruned(out, inputs, sparsity, block), torch.randn(out), torch.randn(tokens, inputs)
    packed, dense = pared.ops.BSRInt8.from_dense(w, block=block), pared.ops.Int8.from_dense(w)
    reordered = torch.ops.mkldnn._reorder_linear_weight(w, tokens)
    calls: dict[str, Callable[[], Any]] = {
        "nn.Linear": lambda: functional.linear(x, w, bias),
        "oneDNN prepacked": lambda: torch.ops.mkldnn._linear_pointwise(x, reordered, bias, "none", [], ""),
        "pared dense int8": lambda: pared.ops.linear(x, dense, bias),
        "pared": lambda: pared.ops.linear(x, packed, bias),
    }
    expected = calls["nn.Linear"]()
    close(calls["pared"](), expected, 0.03)
    for engine in ENGINES:
        module = torch_dynamic(engine, w, bias)
        calls[f"torch int8 dynamic, {engine}"] = lambda module=module: module(x)
    pattern = f"{block[0]}x{block[1]}"
    t = versus(
        calls,
        suite=f"linear blocks {pattern} int8, >= 128 tokens",
        case=f"{out}x{inputs}, {tokens} tokens",
        cell=f"{sparsity * 100:.0f} %",
        rivals=("nn.Linear",),
        work=2.0 * tokens * packed.nnz,
        facts={"out": out, "in": inputs, "tokens": tokens, "nnz": packed.nnz, "dtype": "int8"},
    )
    ratio = t.speedup("pared", "pared dense int8").value
    _OVER_INT8.setdefault((pattern, threads), {}).setdefault(sparsity, []).append(ratio)
