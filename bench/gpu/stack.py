"""One step of decoding through the linear layers of a Llama-8B, in bfloat16, against torch in a CUDA graph.

32 blocks: norm, queries, keys and values, output, norm, gate and up, down; each sequence is at its first
token, whose attention is its value, so that the linear layers and what is between them are everything.
Projections of one input are one matrix, for both sides. Weights are random, pruned by magnitude.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch.nn import functional

import pared
from bench.gpu.measure import Case, Machine
from pared._cuda_sparse import DeviceCSR
from pared.ops._device import DeviceWeight

Linear = Callable[[torch.Tensor], torch.Tensor]

# Share of zeros, tokens.
CASES = [(0.8, 1), (0.8, 16), (0.5, 1), (0.9, 1)]


class Sizes:
    """Of Llama 3 8B, or in a dry run of a toy."""

    def __init__(self, dry: bool) -> None:
        self.blocks, self.width, self.hidden = (1, 64, 96) if dry else (32, 4096, 14336)
        self.values, self.repeat = self.width // 4, 4  # keys and values of four heads of queries

    def shapes(self) -> list[tuple[int, int]]:
        """Outputs and inputs of a block's matrices."""
        width, hidden = self.width, self.hidden
        return [(width + 2 * self.values, width), (width, width), (2 * hidden, width), (width, hidden)]


def step(sizes: Sizes, blocks: list[list[Linear]], x: torch.Tensor) -> torch.Tensor:
    def norm(t: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(t, (sizes.width,))

    for qkv, out, gate_up, down in blocks:
        value = qkv(norm(x))[:, -sizes.values :].view(len(x), -1, sizes.width // 32)
        x = x + out(value.repeat_interleave(sizes.repeat, 1).flatten(1))
        gate, up = gate_up(norm(x)).chunk(2, -1)
        x = x + down(functional.silu(gate) * up)
    return x


def cases(machine: Machine) -> Iterator[Callable[[], Case]]:
    for zeros, tokens in CASES[:2] if machine.dry else CASES:
        yield partial(stack, machine, zeros, tokens)


def stack(machine: Machine, zeros: float, tokens: int) -> Case:
    sizes = Sizes(machine.dry)
    generator = torch.Generator(machine.device).manual_seed(0)
    dense: list[list[Linear]] = []
    quick: list[list[Linear]] = []
    packed: list[DeviceWeight] = []
    rows = tokens == 1 and zeros >= 0.8  # what `accelerate` is to find out: where `CSR` is the faster format
    for _ in range(sizes.blocks):
        ws = []
        for outputs, inputs in sizes.shapes():
            w = torch.randn(outputs, inputs, generator=generator, device=machine.device).bfloat16()
            mask = pared.ops.topk_mask(w, round(w.numel() * (1 - zeros)))
            # The size keeps what passes through the blocks near 1.
            ws.append(w * mask * (inputs * (1 - zeros)) ** -0.5)
        mine = [DeviceCSR.from_dense(w) if rows else pared.ops.Bitmap.from_device(w) for w in ws]
        packed += mine
        dense.append([partial(functional.linear, weight=w) for w in ws])
        quick.append([w.linear for w in mine])
    x = torch.randn(tokens, sizes.width, generator=generator, device=machine.device).bfloat16()

    def check() -> None:
        got, want = (step(sizes, blocks, x).double() for blocks in (quick, dense))
        error = float((got - want).norm() / want.norm())
        if not error < 0.05:  # two roundings a layer, in another order
            raise RuntimeError(f"stack: off by {error:.3g} of the result")

    nbytes = sum(w.nbytes for w in packed)
    return Case(
        suite="decode stack",
        name=f"{sizes.blocks} blocks of Llama-8B, {zeros:.0%} zeros, {tokens} tokens",
        calls={
            "pared": lambda i: step(sizes, quick, x),
            "torch bf16": lambda i: step(sizes, dense, x),
        },
        copies=1,  # far beyond the L2
        nbytes=nbytes,
        check=check,
        facts={"weight_bytes": nbytes, "dense_bytes": sum(2 * w.shape[0] * w.shape[1] for w in packed)},
    )
