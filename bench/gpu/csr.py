"""Unstructured Linear layers, against cuSPARSE (through torch, in its best order of operands) and cuBLAS."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

import pared
from bench.gpu.measure import Case, Goal, Machine, copies_of, not_capturable
from pared._cuda_sparse import DeviceCSR

SHAPE = (8192, 8192)
ZEROS = (0.9, 0.95, 0.99)
TOKENS = (1, 16, 2048)
# The least that cuSPARSE has to be beaten by.
GOAL = 1.3


def cases(machine: Machine) -> Iterator[Callable[[], Case]]:
    outputs, inputs = (96, 64) if machine.dry else SHAPE
    for dtype in (torch.float32, torch.bfloat16):
        for zeros in ZEROS[:1] if machine.dry else ZEROS:
            for tokens in TOKENS:
                yield partial(
                    linear, machine, outputs, inputs, dtype, zeros, min(tokens, 40) if machine.dry else tokens
                )


def linear(
    machine: Machine, outputs: int, inputs: int, dtype: torch.dtype, zeros: float, tokens: int
) -> Case:
    size = torch.finfo(dtype).bits // 8
    copies = machine.copies(int((size + 2) * outputs * inputs * (1 - zeros)))
    generator = torch.Generator(machine.device).manual_seed(0)
    kind = {"generator": generator, "device": machine.device}
    x = torch.randn(tokens, inputs, **kind).to(dtype)
    w = torch.randn(outputs, inputs, **kind).to(dtype)
    w[torch.rand(outputs, inputs, **kind) < zeros] = 0
    dense = [w, w.clone()]  # hundreds would not fit, and one exceeds the L2
    quick = copies_of(DeviceCSR.from_dense(w).tuned(tokens), copies)
    s = w.to_sparse_csr()

    def theirs() -> torch.Tensor:
        """cuSPARSE's copy; 64-bit indices would cost it bytes."""
        return torch.sparse_csr_tensor(
            s.crow_indices().int(), s.col_indices().int(), s.values().clone(), s.shape
        )

    csr = [theirs() for _ in range(copies)]
    calls: dict[str, Callable[[int], object]] = {
        "pared": lambda i: pared.ops.linear(x, quick[i]),
        "cuBLAS": lambda i: torch.nn.functional.linear(x, dense[i % 2]),
    }
    goals, eager = [], []
    if not machine.dry:
        # Both orders of the dense operand, the turned one for nothing. Of one vector there is one, and a
        # product of its own, which is not there for every dtype.
        turned = x.t().contiguous()
        calls["cuSPARSE"] = lambda i: torch.mm(csr[i], x.t())
        if tokens == 1:
            calls["cuSPARSE of a vector"] = lambda i: torch.mv(csr[i], x[0])
        else:
            calls["cuSPARSE, x turned before"] = lambda i: torch.mm(csr[i], turned)
        rivals = [n for n in calls if n.startswith("cuSPARSE")]
        eager = not_capturable(calls, rivals)
        goals = [Goal(rivals, GOAL)]

    def check() -> None:
        want = x.double() @ dense[0].double().T
        error = (pared.ops.linear(x, quick[0]).double() - want).abs().max()
        if error > 2 * torch.finfo(dtype).eps * inputs**0.5 * want.abs().max():
            raise RuntimeError(f"linear: off by {float(error)}")

    return Case(
        suite=f"csr {str(dtype).removeprefix('torch.')}",
        name=f"{outputs} x {inputs}, {zeros:.0%} zeros, {tokens} tokens",
        calls=calls,
        copies=copies,
        goals=goals,
        nbytes=quick[0].nbytes + size * tokens * (inputs + outputs),
        operations=2.0 * tokens * quick[0].nnz,
        check=check,
        eager=eager,
    )
