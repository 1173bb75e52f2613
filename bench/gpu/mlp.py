"""Whole MLPs of the shapes of ViT-H and Llama-8B in bfloat16, against the same in cuBLAS."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn
from torch.nn import functional

import pared
from bench.gpu.measure import Case, Goal, Machine


class Mlp(nn.Module):
    """A ViT's: up, GELU, down."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down(functional.gelu(self.up(x)))
        return y


class Gated(nn.Module):
    """A Llama's: SiLU of the gate times up, down; no biases."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down(functional.silu(self.gate(x)) * self.up(x))
        return y


VIT, LLAMA = ("ViT-H", Mlp, 1280, 5120), ("Llama-8B", Gated, 4096, 14336)
# Model, tokens, format, pattern, share of zeros, goal: what its slowest layer is asked for, less what lies
# between the layers.
CASES = [
    (VIT, 257 * 32, "bsr", "128x128", 0.8, 2.5),
    (VIT, 257 * 32, "int8", "unstructured", 0.0, 1.5),
    (LLAMA, 1, "bitmap", "unstructured", 0.8, 2.5),
    (LLAMA, 16, "bsr", "64x64", 0.8, 2.5),
    (LLAMA, 4096, "bsr", "128x128", 0.8, 2.5),
    (LLAMA, 4096, "int8", "unstructured", 0.0, 1.5),
]


def cases(machine: Machine) -> Iterator[Callable[[], Case]]:
    for (name, make, width, hidden), tokens, format, pattern, zeros, goal in (
        CASES[1:4] if machine.dry else CASES
    ):
        if machine.dry:
            width, hidden, tokens = 128, 256, min(tokens, 24)
        yield partial(
            mlp,
            machine,
            name,
            lambda w=width, h=hidden, m=make: m(w, h),
            width,
            tokens,
            format,
            pattern,
            zeros,
            goal,
        )


def mlp(
    machine: Machine,
    name: str,
    make: Callable[[], nn.Module],
    width: int,
    tokens: int,
    format: str,
    pattern: str,
    zeros: float,
    goal: float,
) -> Case:
    torch.manual_seed(0)
    count = sum(p.numel() for p in make().parameters())
    copies = machine.copies(int(2 * count * (1 - zeros)))
    plain = make().bfloat16().eval().to(machine.device)
    if zeros:
        pared.prune(plain, zeros, pattern=pattern, scope="layer")
    with torch.device("meta"):
        mine = make().eval()  # its layers are all replaced
    for layer, module in plain.named_children():
        setattr(mine, layer, machine.place(pared.nn.Linear.from_module(module.to("cpu"), format=format)))
        module.to(machine.device)
    dense, quick = ([m, *(copy.deepcopy(m) for _ in range(copies - 1))] for m in (plain, mine))
    x = torch.randn(tokens, width, device=machine.device).bfloat16()

    @torch.no_grad()
    def run(models: list[nn.Module], i: int) -> torch.Tensor:
        y: torch.Tensor = models[i](x)
        return y

    def check() -> None:
        want = run(dense, 0).double()
        if (run(quick, 0).double() - want).abs().max() > 0.05 * want.abs().max():
            raise RuntimeError("mlp: wrong")

    return Case(
        suite="mlp",
        name=f"{name}, {tokens} tokens, {format}, {zeros:.0%} zeros in {pattern}",
        calls={"pared": lambda i: run(quick, i), "cuBLAS bf16": lambda i: run(dense, i)},
        copies=copies,
        goals=[Goal(["cuBLAS bf16"], goal)],
        operations=2.0 * tokens * count * (1 - zeros),
        check=check,
    )
