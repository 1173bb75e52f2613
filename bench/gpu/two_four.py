"""2:4 Linear layers in bfloat16 through cuSPARSELt where `accelerate` takes it, against cuBLAS."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

import pared
from bench.gpu.measure import Case, Goal, Machine, copies_of

# Outputs, inputs, tokens.
SHAPES = [(8192, 8192, 2048), (8192, 8192, 8192), (14336, 4096, 4096), (4096, 14336, 4096), (4096, 4096, 16)]


def cases(machine: Machine) -> Iterator[Callable[[], Case]]:
    for outputs, inputs, tokens in [(32, 64, 8)] if machine.dry else SHAPES:
        yield partial(linear, machine, outputs, inputs, tokens)


def two_four(outputs: int, inputs: int, kind: dict[str, Any]) -> torch.Tensor:
    w = torch.randn(outputs, inputs // 4, 4, **kind)
    order = torch.rand(outputs, inputs // 4, 4, **kind).argsort(-1)
    return w.masked_fill(order < 2, 0.0).reshape(outputs, inputs).bfloat16()


def linear(machine: Machine, outputs: int, inputs: int, tokens: int) -> Case:
    copies = machine.copies(2 * outputs * inputs // 2)
    generator = torch.Generator(machine.device).manual_seed(0)
    kind = {"generator": generator, "device": machine.device}
    x = torch.randn(tokens, inputs, **kind).bfloat16()
    layer = nn.Linear(inputs, outputs, bias=False, device="meta")
    layer.weight = nn.Parameter(two_four(outputs, inputs, kind), requires_grad=False)
    ws = [layer.weight, *(layer.weight.clone() for _ in range(copies - 1))]
    mine, why = nn.Sequential(layer), "dry run"
    if not machine.dry:
        mine = pared.accelerate(mine, x, formats=["2:4"], cache=False)
        why = pared.report(mine).layers[0].reason
    found = getattr(mine[0], "_on_device", None)
    chosen = [None] * copies if found is None else copies_of(found, copies)

    def run(i: int) -> torch.Tensor:
        w = chosen[i]
        return torch.nn.functional.linear(x, ws[i]) if w is None else w.linear(x)

    def check() -> None:
        want = x.double() @ ws[0].double().T
        error = (run(0).double() - want).abs().max()
        if error > 0.01 * want.abs().max():
            raise RuntimeError(f"linear: off by {float(error)}")

    return Case(
        suite="2:4 linear",
        name=f"{outputs} x {inputs}, {tokens} tokens",
        calls={"pared": run, "cuBLAS bf16": lambda i: torch.nn.functional.linear(x, ws[i])},
        copies=copies,
        goals=[Goal(["cuBLAS bf16"], 0.98)],
        operations=2.0 * tokens * outputs * inputs,
        check=check,
        facts={"choice": why},
    )
