"""Unstructured weights with few tokens: bitmap formats against torch's dense layer, from memory and cache.

One to sixteen tokens: reading the weight is the cost, so that the weights rotate among copies that exceed the
last-level cache ("cold"); small layers that stay in the cache are measured too. bench_tokens.py sweeps the
token counts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional

import pared
from bench.bench_linear import THREADS, pruned
from bench.roofline import expand_limit, measure
from pared._timing import rotate
from pared.ops._formats import FORMATS

SPARSITIES = [0.5, 0.8, 0.9]
LARGE = [(4096, 4096), (5120, 5120), (3072, 768), (768, 3072)]
SMALL = [(768, 768), (3072, 768), (768, 3072), (384, 384), (1536, 384)]
QUICK = {(4096, 4096), (3072, 768), (768, 768)}
TOKENS = [1, 2, 4, 8, 16]


def count(tokens: int) -> str:
    return f"{tokens} token{'s' if tokens > 1 else ''}"


def quick(values: list[Any], chosen: Any) -> list[Any]:
    """Parameters of which the chosen ones run without ``--full``."""
    return [
        pytest.param(*(v if isinstance(v, tuple) else (v,)), marks=() if v in chosen else pytest.mark.full)
        for v in values
    ]


def layer(w: torch.Tensor, x: torch.Tensor, bias: torch.Tensor) -> Callable[[int], Callable[[], object]]:
    """The dense layer with a weight of its own for each copy."""

    def make(_: int) -> Callable[[], object]:
        mine = w.clone()
        return lambda: functional.linear(x, mine, bias)

    return make


def packed_layer(
    packed: pared.ops.PackedWeight, x: torch.Tensor, bias: torch.Tensor
) -> Callable[[int], Callable[[], object]]:
    """The same with a packed weight."""
    wide = bias.float()  # biases of packed layers are float32

    def make(_: int) -> Callable[[], object]:
        mine = copy.deepcopy(packed)
        return lambda: pared.ops.linear(x, mine, wide)

    return make


def run(
    versus: Callable[..., Any],
    out: int,
    inputs: int,
    tokens: int,
    sparsity: float,
    threads: int,
    cold: bool,
    cls: type[pared.ops.PackedWeight],
    others: tuple[type[pared.ops.PackedWeight], ...] = (),
    dtype: torch.dtype = torch.float32,
) -> None:
    """One row: the layer in format `cls`, beside the dense one and other formats."""
    w, bias, x = pruned(out, inputs, sparsity), torch.randn(out), torch.randn(tokens, inputs)
    w, bias, x = w.to(dtype), bias.to(dtype), x.to(dtype)
    precision = FORMATS[cls.kind].precision if dtype == torch.float32 else str(dtype).removeprefix("torch.")
    itemsize = {"float32": 4, "bfloat16": 2}.get(precision, 1)
    weights: dict[str, pared.ops.PackedWeight] = {"pared": cls.from_dense(w)}
    weights |= {f"pared {other.kind}": other.from_dense(w) for other in others}
    calls: dict[str, Callable[[], object]] = {}
    expected = functional.linear(x, w, bias)
    for name, make, nbytes in [
        ("nn.Linear", layer(w, x, bias), w.nbytes),
        *((name, packed_layer(p, x, bias), p.nbytes) for name, p in weights.items()),
    ]:
        calls[name] = rotate(make, nbytes) if cold else make(0)
        close = {4: 1e-3, 2: 2e-2, 1: 0.1}[itemsize]
        torch.testing.assert_close(calls[name](), expected, rtol=close, atol=close)
    packed = weights["pared"]
    versus(
        calls,
        suite=f"linear Bitmap {precision}, {count(tokens)}, {'cold' if cold else 'warm'}",
        case=f"{out}x{inputs}",
        cell=f"{sparsity * 100:.0f} %",
        rivals=("nn.Linear",),
        work=2.0 * tokens * packed.nnz,
        moved=float(packed.nbytes),
        limit_s=expand_limit(measure(threads), out, inputs, tokens, packed.nbytes, cold, itemsize),
        cold=cold,
        facts={"out": out, "in": inputs, "tokens": tokens, "nnz": packed.nnz, "dtype": precision},
    )


@THREADS
@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("tokens", quick(TOKENS, {1}))
@pytest.mark.parametrize(("out", "inputs"), quick(LARGE, QUICK))
def test_cold(versus, out: int, inputs: int, tokens: int, sparsity: float, threads: int) -> None:
    run(versus, out, inputs, tokens, sparsity, threads, cold=True, cls=pared.ops.Bitmap)


@THREADS
@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("tokens", quick(TOKENS, {1}))
@pytest.mark.parametrize(("out", "inputs"), quick(LARGE, QUICK))
def test_bfloat16_cold(versus, out: int, inputs: int, tokens: int, sparsity: float, threads: int) -> None:
    """A model in bfloat16, against torch in bfloat16."""
    cls, dtype = pared.ops.Bitmap, torch.bfloat16
    run(versus, out, inputs, tokens, sparsity, threads, cold=True, cls=cls, dtype=dtype)


@THREADS
@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("tokens", quick(TOKENS, {8}))
@pytest.mark.parametrize(("out", "inputs"), quick(SMALL, QUICK))
def test_warm(versus, out: int, inputs: int, tokens: int, sparsity: float, threads: int) -> None:
    run(
        versus,
        out,
        inputs,
        tokens,
        sparsity,
        threads,
        cold=False,
        cls=pared.ops.Bitmap,
        others=(pared.ops.CSR,),
    )


@THREADS
@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("tokens", quick(TOKENS, {1}))
@pytest.mark.parametrize(("out", "inputs"), quick(LARGE, QUICK))
def test_int8_cold(versus, out: int, inputs: int, tokens: int, sparsity: float, threads: int) -> None:
    cls, dense = pared.ops.Bitmap8, pared.ops.Int8
    run(versus, out, inputs, tokens, sparsity, threads, cold=True, cls=cls, others=(dense,))


@THREADS
@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("tokens", quick([16, 32, 128, 512], {16}))
@pytest.mark.parametrize(("out", "inputs"), quick(SMALL, {(3072, 768)}))
def test_int8_many_tokens(versus, out: int, inputs: int, tokens: int, sparsity: float, threads: int) -> None:
    """Against the dense int8 kernel, which the weight's tiles are expanded for: never slower."""
    cls, dense = pared.ops.Bitmap8, pared.ops.Int8
    run(versus, out, inputs, tokens, sparsity, threads, cold=False, cls=cls, others=(dense,))
