"""Linear layers of few tokens: bitmaps, rows of non-zeros, dense 8 bits, against cuBLAS in bfloat16."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

import pared
from bench.gpu.measure import Case, Goal, Machine, copies_of
from pared._cuda_decode import DecodeWeight, Format
from pared._cuda_sparse import DeviceCSR

SHAPES = [(8192, 8192), (28672, 8192)]
# Share of zeros -> goal with 1 and with 16 tokens.
BITMAP = {0.5: (1.5, 1.3), 0.7: (2.2, 1.8), 0.8: (2.9, 2.3), 0.9: (4.2, 3.0)}
PREFILL = 2048


def cases(machine: Machine) -> Iterator[Callable[[], Case]]:
    for outputs, inputs in [(96, 64)] if machine.dry else SHAPES:
        for zeros, (one, sixteen) in list(BITMAP.items())[: 1 if machine.dry else None]:
            yield partial(linear, machine, "bitmap", outputs, inputs, zeros, 1, one)
            yield partial(linear, machine, "bitmap", outputs, inputs, zeros, 16, sixteen)
        # With one token the fewest instructions win from some share of zeros on: what `accelerate` finds out.
        for zeros in (0.9,) if machine.dry else (0.7, 0.8, 0.9):
            yield partial(linear, machine, "csr", outputs, inputs, zeros, 1, BITMAP[zeros][0])
        yield partial(linear, machine, "bitmap8", outputs, inputs, 0.5, 1, 2.6)
        for tokens in (1, 16):
            yield partial(linear, machine, "int8wo", outputs, inputs, 0.0, tokens, 1.75)
        yield partial(
            linear, machine, "bitmap", outputs, inputs, 0.5, 40 if machine.dry else PREFILL, 1 / 1.25
        )


def linear(
    machine: Machine, format: str, outputs: int, inputs: int, zeros: float, tokens: int, goal: float
) -> Case:
    copies = machine.copies(outputs * inputs // 2)
    generator = torch.Generator(machine.device).manual_seed(0)
    kind = {"generator": generator, "device": machine.device}
    x = torch.randn(tokens, inputs, **kind).bfloat16()
    w = torch.randn(outputs, inputs, **kind).bfloat16()
    w[torch.rand(outputs, inputs, **kind) < zeros] = 0
    if format == "bitmap":
        first = pared.ops.Bitmap.from_device(w)
    elif format == "csr":
        first = DeviceCSR.from_dense(w)
    else:
        make = {"bitmap8": pared.ops.Bitmap8, "int8wo": pared.ops.Int8WeightOnly}[format]
        first = make.from_dense(w.cpu()).to(machine.device)
    quick = copies_of(first, copies)
    calls = {"pared": lambda i: pared.ops.linear(x, quick[i])}
    if isinstance(first, DecodeWeight) and format == "bitmap" and (zeros > 0.5 or machine.dry):
        other: Format = (
            "pairs16" if first.format == "bitmap16" else "bitmap16"
        )  # what faster_format did not take
        others = copies_of(DecodeWeight.from_dense(w, format=other), copies)
        calls[other] = lambda i: pared.ops.linear(x, others[i])
    if isinstance(first, DeviceCSR):
        wide = copies_of(DeviceCSR.from_dense(w, near=False), copies)
        calls["wide columns"] = lambda i: pared.ops.linear(x, wide[i])
    ws = [w, *(w.clone() for _ in range(copies - 1))]
    rivals: dict[str, Callable[[int], object]] = {
        "cuBLAS bf16": lambda i: torch.nn.functional.linear(x, ws[i])
    }
    if tokens == 1:
        rivals["torch.mv"] = lambda i: torch.mv(ws[i], x[0])

    def check() -> None:
        want = x.double() @ w.double().T
        error = (pared.ops.linear(x, quick[0]).double() - want).abs().max()
        # The output's rounding, and that of 8-bit weights.
        if error > (0.01 if format in ("bitmap", "csr") else 0.05) * want.abs().max():
            raise RuntimeError(f"linear: off by {float(error)}")

    return Case(
        suite=f"decode {format}",
        name=f"{outputs} x {inputs}, {zeros:.0%} zeros, {tokens} tokens",
        calls={**calls, **rivals},
        copies=copies,
        goals=[Goal(list(rivals), goal)],
        nbytes=quick[0].nbytes + 2 * tokens * (inputs + outputs),
        check=check,
    )
