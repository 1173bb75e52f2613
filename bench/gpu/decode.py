"""Linear layers of few tokens: bitmaps and 8-bit non-zeros, against cuBLAS in bfloat16."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

import pared
from bench.gpu.measure import Case, Goal, Machine

SHAPES = [(8192, 8192), (28672, 8192)]
# Share of zeros -> goal with 1 and with 16 tokens.
BITMAP = {0.5: (1.5, 1.3), 0.7: (2.2, 1.8), 0.8: (2.9, 2.3), 0.9: (4.2, 3.0)}
PREFILL = 2048


def cases(machine: Machine) -> Iterator[Case]:
    for outputs, inputs in [(96, 64)] if machine.dry else SHAPES:
        for zeros, (one, sixteen) in BITMAP.items():
            yield linear(machine, "bitmap", outputs, inputs, zeros, 1, one)
            yield linear(machine, "bitmap", outputs, inputs, zeros, 16, sixteen)
        yield linear(machine, "bitmap8", outputs, inputs, 0.5, 1, 2.6)
        yield linear(machine, "bitmap", outputs, inputs, 0.5, 40 if machine.dry else PREFILL, 1 / 1.25)


def linear(
    machine: Machine, format: str, outputs: int, inputs: int, zeros: float, tokens: int, goal: float
) -> Case:
    copies = machine.copies(outputs * inputs // 2)
    generator = torch.Generator(machine.device).manual_seed(0)
    kind = {"generator": generator, "device": machine.device}
    x = torch.randn(tokens, inputs, **kind).bfloat16()
    ws = []
    for _ in range(copies):
        w = torch.randn(outputs, inputs, **kind).bfloat16()
        w[torch.rand(outputs, inputs, **kind) < zeros] = 0
        ws.append(w)
    make = {"bitmap": pared.ops.Bitmap, "bitmap8": pared.ops.Bitmap8}[format].from_dense
    packed = [make(w.cpu()) for w in ws]
    quick: list[Any] = list(packed) if machine.dry else [w.to(machine.device) for w in packed]

    def check() -> None:
        dense = torch.as_tensor(packed[0].to_dense()).to(machine.device)
        want = x.double() @ dense.double().T
        error = (pared.ops.linear(x, quick[0]).double() - want).abs().max()
        # bfloat16's rounding of the output; 8-bit weights meet their own dense form, but on the CPU the input
        # is rounded to 8 bits as well.
        if error > (0.05 if machine.dry else 0.01) * want.abs().max():
            raise RuntimeError(f"linear: off by {float(error)}")

    return Case(
        suite=f"decode {format}",
        name=f"{outputs} x {inputs}, {zeros:.0%} zeros, {tokens} tokens",
        calls={
            "pared": lambda i: pared.ops.linear(x, quick[i]),
            "cuBLAS bf16": lambda i: torch.nn.functional.linear(x, ws[i]),
        },
        copies=copies,
        goals=[Goal(["cuBLAS bf16"], goal)],
        nbytes=quick[0].nbytes + 2 * tokens * (inputs + outputs),
        check=check,
    )
