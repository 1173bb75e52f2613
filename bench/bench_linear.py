"""Float32 Linear with packed weights against torch's dense engines, on the shapes of BERT-base and MiniLM.

Baselines: ``nn.functional.linear`` (MKL on x86), oneDNN with the weight packed once, and, with ``--full``,
torch.sparse CSR. The goal counts against the faster of the two dense ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional

import pared
from bench.roofline import linear_limit, measure
from pared._peers import one_layer, sparse_csr
from pared._timing import rotate

# [out, in] of the Linear layers of BERT-base (768 wide) and MiniLM (384 wide).
SHAPES = [(768, 768), (3072, 768), (768, 3072), (384, 384), (1536, 384), (384, 1536)]
SPARSITIES = [0.5, 0.7, 0.8, 0.9, 0.95]
QUICK_TOKENS = (128, 384)
TOKENS = [pytest.param(t, marks=() if t in QUICK_TOKENS else pytest.mark.full) for t in (16, 128, 384, 1024)]
FEWER_TOKENS = [128, pytest.param(384, marks=pytest.mark.full), pytest.param(1024, marks=pytest.mark.full)]
THREADS = pytest.mark.parametrize("threads", [1, 2], indirect=True, ids="{}t".format)
DENSE = ("nn.Linear", "oneDNN prepacked")


def pruned(out: int, inputs: int, sparsity: float, seed: int = 0) -> torch.Tensor:
    """A Gaussian weight with its smallest magnitudes zeroed, as magnitude pruning leaves it."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(out, inputs, generator=generator) * inputs**-0.5
    kept = round(w.numel() * (1 - sparsity))
    threshold = w.abs().flatten().kthvalue(w.numel() - kept).values if kept < w.numel() else -1.0
    return torch.where(w.abs() > threshold, w, 0.0)


def block_pruned(out: int, inputs: int, sparsity: float, rows: int) -> torch.Tensor:
    """A Gaussian weight with its weakest blocks of `rows` outputs by one input zeroed."""
    w = pruned(out, inputs, 0.0)
    strength = w.reshape(out // rows, rows, inputs).norm(dim=1)
    kept = round(strength.numel() * (1 - sparsity))
    threshold = strength.flatten().kthvalue(strength.numel() - kept).values
    return w * (strength > threshold).repeat_interleave(rows, 0)


def candidates(
    x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor, packed: pared.ops.PackedWeight, sparse: bool = False
) -> dict[str, Callable[[], Any]]:
    """The same layer by every engine, each with its weight prepared once."""
    reordered = torch.ops.mkldnn._reorder_linear_weight(w, x.shape[0])
    calls: dict[str, Callable[[], Any]] = {
        "nn.Linear": lambda: functional.linear(x, w, bias),
        "oneDNN prepacked": lambda: torch.ops.mkldnn._linear_pointwise(x, reordered, bias, "none", [], ""),
        "pared": lambda: pared.ops.linear(x, packed, bias),
    }
    if sparse:
        calls["torch.sparse CSR"] = sparse_csr(w, x).make()
    expected = calls["nn.Linear"]()
    for name in ("oneDNN prepacked", "pared"):
        torch.testing.assert_close(calls[name](), expected, rtol=1e-4, atol=1e-4)
    return calls


def run(
    versus: Callable[..., Any],
    kind: str,
    cell: str,
    w: torch.Tensor,
    packed: pared.ops.PackedWeight,
    tokens: int,
    threads: int,
    full: bool = False,
) -> None:
    """One row: all engines on ``[tokens, in] x w^T``; `full`: those outside of torch, and torch.sparse."""
    out, inputs = w.shape
    nnz = int(w.count_nonzero())
    x, bias = torch.randn(tokens, inputs), torch.randn(out)
    calls = candidates(x, w, bias, packed, full)
    if full:
        calls |= {name: peer.make() for name, peer in one_layer(w, bias, x, threads, int8=False).items()}
    versus(
        calls,
        suite=f"linear {kind} float32, {'>= 128' if tokens >= 128 else '16'} tokens",
        case=f"{out}x{inputs}, {tokens} tokens",
        cell=cell,
        rivals=DENSE,
        work=2.0 * tokens * nnz,
        limit_s=linear_limit(
            measure(threads), out, inputs, tokens, nnz, shared=1 if isinstance(packed, pared.ops.CSR) else 4
        ),
        facts={"out": out, "in": inputs, "tokens": tokens, "nnz": nnz, "dtype": "float32"},
    )


@THREADS
@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("out", "inputs"), SHAPES)
def test_csr(versus, request, out: int, inputs: int, tokens: int, sparsity: float, threads: int) -> None:
    w = pruned(out, inputs, sparsity)
    full = request.config.getoption("--full")
    run(versus, "CSR", f"{sparsity * 100:.0f} %", w, pared.ops.CSR.from_dense(w), tokens, threads, full)


@THREADS
@pytest.mark.parametrize("rows", [4, pytest.param(16, marks=pytest.mark.full)])
@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("tokens", FEWER_TOKENS)
@pytest.mark.parametrize(("out", "inputs"), SHAPES)
def test_blocks(versus, out: int, inputs: int, tokens: int, sparsity: float, rows: int, threads: int) -> None:
    w = block_pruned(out, inputs, sparsity, rows)
    packed = pared.ops.BSR.from_dense(w, block=(rows, 1))
    run(versus, f"blocks {rows}x1", f"{sparsity * 100:.0f} %", w, packed, tokens, threads)


@THREADS
@pytest.mark.parametrize("tokens", FEWER_TOKENS)
@pytest.mark.parametrize(("out", "inputs"), SHAPES)
def test_dense(versus, out: int, inputs: int, tokens: int, threads: int) -> None:
    w = pruned(out, inputs, 0.0)
    run(versus, "Dense", "0 %", w, pared.ops.Dense.from_dense(w), tokens, threads)


@THREADS
@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("tokens", FEWER_TOKENS)
@pytest.mark.parametrize(("width", "hidden"), [(768, 3072), (384, 1536)])
def test_chain(versus, width: int, hidden: int, tokens: int, sparsity: float, threads: int) -> None:
    """The feed-forward part of BERT-base and MiniLM: Linear, GELU, Linear, the panel handed over between."""
    up, down = pruned(hidden, width, sparsity), pruned(width, hidden, sparsity, seed=1)
    bias = (torch.randn(hidden), torch.randn(width))
    x = torch.randn(tokens, width)
    packed = [pared.ops.CSR.from_dense(w) for w in (up, down)]
    reordered = [torch.ops.mkldnn._reorder_linear_weight(w, tokens) for w in (up, down)]
    linear, gelu, onednn = functional.linear, functional.gelu, torch.ops.mkldnn._linear_pointwise

    def prepacked() -> torch.Tensor:
        y = onednn(x, reordered[0], bias[0], "gelu", [], "none")
        return onednn(y, reordered[1], bias[1], "none", [], "")  # type: ignore[no-any-return]

    calls: dict[str, Callable[[], Any]] = {
        "nn.Linear": lambda: linear(gelu(linear(x, up, bias[0])), down, bias[1]),
        "oneDNN prepacked": prepacked,
        "pared, a call a layer": lambda: pared.ops.linear(
            pared.ops.linear(x, packed[0], bias[0], "gelu"), packed[1], bias[1]
        ),
        "pared": lambda: pared.ops.linear_chain(x, packed, bias, ("gelu", None)),
    }
    expected = calls["nn.Linear"]()
    for call in calls.values():
        torch.testing.assert_close(call(), expected, rtol=1e-4, atol=1e-4)
    versus(
        calls,
        suite="linear chain CSR float32, >= 128 tokens",
        case=f"{width}-{hidden}-{width}, {tokens} tokens",
        cell=f"{sparsity * 100:.0f} %",
        rivals=DENSE,
        work=2.0 * tokens * sum(p.nnz for p in packed),
        facts={"tokens": tokens, "sparsity": sparsity, "dtype": "float32"},
    )


@THREADS
@pytest.mark.parametrize("sparsity", [0.5, 0.8, 0.9])
@pytest.mark.parametrize(
    "tokens", [1, pytest.param(4, marks=pytest.mark.full), 8, pytest.param(16, marks=pytest.mark.full)]
)
@pytest.mark.parametrize(("out", "inputs"), [(3072, 768), (4096, 4096)])
def test_few_tokens_cold(versus, out: int, inputs: int, tokens: int, sparsity: float, threads: int) -> None:
    """Few tokens with the weights in memory: reading them is the cost."""
    w, bias = pruned(out, inputs, sparsity), torch.randn(out)
    x = torch.randn(tokens, inputs)
    packed = pared.ops.CSR.from_dense(w)

    def dense(_: int) -> Callable[[], object]:
        copy = w.clone()
        return lambda: functional.linear(x, copy, bias)

    def sparse(_: int) -> Callable[[], object]:
        copy = pared.ops.CSR.from_dense(w)
        return lambda: pared.ops.linear(x, copy, bias)

    versus(
        {
            "nn.Linear": rotate(dense, w.nbytes),
            "pared": rotate(sparse, packed.nbytes),
        },
        suite="linear CSR float32, few tokens",
        case=f"{out}x{inputs}, {tokens} token{'s' if tokens > 1 else ''}",
        cell=f"{sparsity * 100:.0f} %",
        rivals=("nn.Linear",),
        work=2.0 * tokens * packed.nnz,
        moved=float(packed.nbytes),
        cold=True,
        facts={"out": out, "in": inputs, "tokens": tokens, "sparsity": sparsity, "dtype": "float32"},
    )
