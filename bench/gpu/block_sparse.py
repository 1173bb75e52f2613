"""Block-sparse Linear layers on tensor cores, against cuBLAS in bfloat16 and torch's BSR product."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

import pared
from bench.gpu.measure import Case, Goal, Machine, copies_of, forced, not_capturable
from pared import _cuda
from pared._cuda_block_sparse import DeviceBlocks

# Block, tokens, share of zeros, goal against cuBLAS.
DECODE = [(64, 16, 0.8, 3.0), (64, 16, 0.9, 5.0)]
PREFILL = [(128, 8192, 0.5, 1.2), (128, 8192, 0.8, 3.0), (128, 8192, 0.9, 5.5)]
# Warps and tokens of a tile for torch's Triton kernel for BSR, which has tables of its own for an A100 alone.
# More stages change nothing: each block's place is read before the block.
TRITON_FEW, TRITON_MANY = [(2, 16), (4, 16), (8, 16)], [(4, 128), (8, 128), (8, 256)]


def cases(machine: Machine) -> Iterator[Callable[[], Case]]:
    outputs, inputs = (256, 128) if machine.dry else (8192, 8192)
    for block, tokens, zeros, goal in DECODE + PREFILL:
        yield partial(
            linear, machine, outputs, inputs, block, min(tokens, 40) if machine.dry else tokens, zeros, goal
        )


def linear(
    machine: Machine, outputs: int, inputs: int, block: int, tokens: int, zeros: float, goal: float
) -> Case:
    copies = machine.copies(int(2 * outputs * inputs * (1 - zeros)))
    generator = torch.Generator(machine.device).manual_seed(0)
    kind = {"generator": generator, "device": machine.device}
    x = torch.randn(tokens, inputs, **kind).bfloat16()
    keep = torch.rand(outputs // block, inputs // block, **kind) >= zeros
    keep[0, 0] = True
    mask = keep.repeat_interleave(block, 0).repeat_interleave(block, 1)
    w = torch.randn(outputs, inputs, **kind).bfloat16() * mask
    quick = copies_of(DeviceBlocks.from_dense(w, (block, block)), copies)
    ws = [w, *(w.clone() for _ in range(copies - 1))]
    calls: dict[str, Any] = {
        "pared": lambda i: pared.ops.linear(x, quick[i]),
        "cuBLAS bf16": lambda i: torch.nn.functional.linear(x, ws[i]),
    }
    goals = [Goal(["cuBLAS bf16"], goal)]
    eager: list[str] = []
    if not machine.dry:
        theirs = [v.to_sparse_bsr((block, block)) for v in ws]
        rivals: dict[str, Any] = {"torch BSR": lambda i: torch.nn.functional.linear(x, theirs[i])}
        for warps, tile in TRITON_FEW if tokens <= 16 else TRITON_MANY:
            rivals[f"Triton BSR, {warps} warps, {tile} tokens"] = partial(triton, x, theirs, warps, tile)
        calls |= rivals
        eager = not_capturable(calls, list(rivals))
        kernels = _cuda.kernels(0)
        if tokens > 16 and kernels.block_sparse_wgmma(0):
            for rows, name in [(0, "mma.sync"), (128, "wgmma 128"), (256, "wgmma 256")]:
                calls[name] = forced(kernels.force_block_sparse_kernel, rows, calls["pared"])
        if tokens <= 16:
            goals.append(Goal(list(rivals), 1.5))

    def check() -> None:
        want = x.double() @ ws[0].double().T
        error = (pared.ops.linear(x, quick[0]).double() - want).abs().max()
        if error > 0.01 * want.abs().max():
            raise RuntimeError(f"linear: off by {float(error)}")

    return Case(
        suite="block-sparse linear",
        name=f"{outputs} x {inputs}, {block}x{block}, {zeros:.0%} zeros, {tokens} tokens",
        calls=calls,
        copies=copies,
        goals=goals,
        operations=2.0 * tokens * outputs * inputs * (1 - zeros),
        check=check,
        eager=eager,
    )


def triton(x: torch.Tensor, ws: list[torch.Tensor], warps: int, tile: int, i: int) -> torch.Tensor:
    """The product by torch's Triton kernel with these parameters; `tile` divides the tokens."""
    from torch.sparse import _triton_ops

    y = x.new_empty(x.shape[0], ws[i].shape[0]).t()
    meta = {"SPLIT_N": x.shape[0] // tile, "GROUP_SIZE_ROW": 4, "num_warps": warps, "num_stages": 1}
    _triton_ops.bsr_dense_addmm(y, ws[i], x.t(), beta=0, out=y, meta=meta)
    return y.t()
