"""8-bit Linear layers, quantization included, against cuBLAS in bfloat16 and torch's int8 product."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

import pared
from bench.gpu.measure import Case, Goal, Machine, copies_of, forced
from pared import _cuda

# Outputs, inputs, tokens; the last two have few tokens and a long reduction.
SHAPES = [
    (4096, 4096, 2048),
    (14336, 4096, 2048),
    (4096, 14336, 8192),
    (8192, 8192, 8192),
    (4096, 16384, 64),
    (8192, 28672, 64),
]


def cases(machine: Machine) -> Iterator[Callable[[], Case]]:
    shapes = [(96, 64, 5), (64, 128, 40)] if machine.dry else SHAPES
    for outputs, inputs, tokens in shapes:
        yield partial(linear, machine, outputs, inputs, tokens)


def linear(machine: Machine, outputs: int, inputs: int, tokens: int) -> Case:
    copies = machine.copies(outputs * inputs)
    generator = torch.Generator(machine.device).manual_seed(0)
    kind = {"generator": generator, "device": machine.device}
    x = torch.randn(tokens, inputs, **kind).bfloat16()
    w = torch.randn(outputs, inputs, **kind).bfloat16()
    packed = pared.ops.Int8.from_dense(w.cpu())
    quick = copies_of(packed.to(machine.device), copies)
    ws = [w, *(w.clone() for _ in range(copies - 1))]
    few = tokens < 2048
    calls: dict[str, Any] = {
        "pared": lambda i: pared.ops.linear(x, quick[i]),
        "cuBLAS bf16": lambda i: torch.nn.functional.linear(x, ws[i]),
    }
    goals = [] if few else [Goal(["cuBLAS bf16"], 1.7)]
    if not machine.dry:
        q = [w.q for w in quick]
        xq = torch.randint(-127, 128, (max(32, tokens), inputs), dtype=torch.int8, device=machine.device)
        if not few:
            force = _cuda.kernels(0).force_int8_tile
            calls |= {f"tile {r} x {c}": forced(force, t, calls["pared"]) for t, r, c in tiles()}
        calls["torch._int_mm"] = lambda i: torch._int_mm(xq, q[i].t())  # without quantization and scales
        goals += [Goal(["torch._int_mm"], 1.6 if few else 0.95)]

    def check() -> None:
        some = slice(None, None, -(-tokens // 128))  # all of them would take the CPU seconds
        want = pared.ops.linear(x[some].cpu().contiguous(), packed)
        if not torch.equal(pared.ops.linear(x, quick[0])[some].cpu(), want):
            raise RuntimeError("linear: not the bits of the CPU")

    return Case(
        suite="int8 linear",
        name=f"{outputs} x {inputs}, {tokens} tokens",
        calls=calls,
        copies=copies,
        goals=goals,
        nbytes=outputs * inputs + 2 * tokens * (inputs + outputs),
        operations=2.0 * tokens * outputs * inputs,
        check=check,
    )


def tiles() -> list[tuple[int, int, int]]:
    """The kernels that the choice is between with many tokens: index, tokens and outputs of a tile."""
    kernels = _cuda.kernels(0)
    large = [3, *([4, 5, 6] if kernels.int8_wgmma(0) else [])]
    return [(t, *kernels.INT8_TILES[t]) for t in large]
