"""CSR float32 Linear against torch's dense engines, on the Linear shapes of BERT-base and MiniLM.

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
from pared._timing import rotate

# [out, in] of the Linear layers of BERT-base (768 wide) and MiniLM (384 wide).
SHAPES = [(768, 768), (3072, 768), (768, 3072), (384, 384), (1536, 384), (384, 1536)]
SPARSITIES = [0.5, 0.7, 0.8, 0.9, 0.95]
QUICK_TOKENS = (128, 384)
TOKENS = [pytest.param(t, marks=() if t in QUICK_TOKENS else pytest.mark.full) for t in (16, 128, 384, 1024)]
THREADS = pytest.mark.parametrize("threads", [1, 2], indirect=True, ids="{}t".format)
DENSE = ("nn.Linear", "oneDNN prepacked")


def pruned(out: int, inputs: int, sparsity: float, seed: int = 0) -> torch.Tensor:
    """A Gaussian weight with its smallest magnitudes zeroed, as magnitude pruning leaves it."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(out, inputs, generator=generator) * inputs**-0.5
    kept = round(w.numel() * (1 - sparsity))
    threshold = w.abs().flatten().kthvalue(w.numel() - kept).values if kept < w.numel() else -1.0
    return torch.where(w.abs() > threshold, w, 0.0)


def candidates(
    x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor, sparse: bool
) -> dict[str, Callable[[], Any]]:
    """The same layer by every engine, each with its weight prepared once."""
    packed = pared.ops.CSR.from_dense(w)
    reordered = torch.ops.mkldnn._reorder_linear_weight(w, x.shape[0])
    calls: dict[str, Callable[[], Any]] = {
        "nn.Linear": lambda: functional.linear(x, w, bias),
        "oneDNN prepacked": lambda: torch.ops.mkldnn._linear_pointwise(x, reordered, bias, "none", [], ""),
        "pared": lambda: pared.ops.linear(x, packed, bias),
    }
    if sparse:
        csr = w.to_sparse_csr()
        xt = x.T.contiguous()
        calls["torch.sparse CSR"] = lambda: csr @ xt
    expected = calls["nn.Linear"]()
    for name in ("oneDNN prepacked", "pared"):
        torch.testing.assert_close(calls[name](), expected, rtol=1e-4, atol=1e-4)
    return calls


@THREADS
@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("out", "inputs"), SHAPES)
def test_csr(versus, request, out: int, inputs: int, tokens: int, sparsity: float, threads: int) -> None:
    w = pruned(out, inputs, sparsity)
    nnz = int(w.count_nonzero())
    calls = candidates(
        torch.randn(tokens, inputs), w, torch.randn(out), sparse=request.config.getoption("--full")
    )
    versus(
        calls,
        suite=f"linear CSR float32, {'>= 128' if tokens >= 128 else '16'} tokens",
        case=f"{out}x{inputs}, {tokens} tokens",
        cell=f"{sparsity * 100:.0f} %",
        rivals=DENSE,
        work=2.0 * tokens * nnz,
        limit_s=linear_limit(measure(threads), out, inputs, tokens, nnz),
        facts={"out": out, "in": inputs, "tokens": tokens, "sparsity": sparsity, "dtype": "float32"},
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
