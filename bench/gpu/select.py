"""Selection: the k-th of abs(w) and its mask, against one read of the data and torch's ways to find it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

import pared
from bench.gpu.measure import Case, Goal, Machine

# A goal against the read floor is a ratio below 1: 1.2 times the floor.
FLOOR = Goal(["read (sum)", "read (max)"], 1 / 1.2)


def weights(machine: Machine, n: int, dtype: torch.dtype, pruned: float) -> list[torch.Tensor]:
    out = []
    for i in range(machine.copies(n * dtype.itemsize)):
        generator = torch.Generator(machine.device).manual_seed(i)
        w = torch.randn(n, generator=generator, device=machine.device).to(dtype)
        if pruned:
            w[torch.rand(n, generator=generator, device=machine.device) < pruned] = 0
        out.append(w)
    return out


def cases(machine: Machine) -> Iterator[Callable[[], Case]]:
    n = 1 << (12 if machine.dry else 27)
    for dtype, pruned in ((torch.float32, 0.0), (torch.bfloat16, 0.0), (torch.float32, 0.5)):
        yield partial(threshold, machine, n, dtype, pruned)
        yield partial(mask, machine, n, dtype, pruned)


def label(w: torch.Tensor, pruned: float, k: int) -> str:
    zeros = f", {pruned:.0%} zeros" if pruned else ""
    return f"{str(w.dtype).removeprefix('torch.')}, n = {w.numel()}, k = {k}{zeros}"


def threshold(machine: Machine, n: int, dtype: torch.dtype, pruned: float) -> Case:
    ws = weights(machine, n, dtype, pruned)
    w = ws[0]
    k = n // 4 if pruned else n // 2
    # One read at the speed of memory: torch's reductions of 32-bit words, the better of two.
    words = [w.view(torch.float32) for w in ws]
    out = torch.empty((), device=w.device)

    def check() -> None:
        got = pared.ops.select_threshold(w, k, nan="lowest")
        want = torch.sort(w.float().abs()).values[n - k]
        if float(got.value) != float(want):
            raise RuntimeError(f"select_threshold: expected {float(want)}, got {float(got.value)}")

    calls: dict[str, Any] = {
        "pared": lambda i: pared.ops.select_threshold(ws[i], k, nan="lowest"),
        "read (sum)": lambda i: torch.sum(words[i], dim=0, out=out),
        "read (max)": lambda i: torch.amax(words[i], dim=0, out=out),
    }
    goals = [FLOOR]
    if not pruned:
        calls |= {
            "torch.topk": lambda i: torch.topk(ws[i].abs(), k, sorted=False),
            "torch.sort": lambda i: torch.sort(ws[i].abs()),
            "torch.kthvalue": lambda i: torch.kthvalue(ws[i].abs(), n - k + 1),
        }
        goals += [Goal(["torch.topk"], 10.0), Goal(["torch.sort"], 15.0), Goal(["torch.kthvalue"], 100.0)]
    return Case(
        suite="select_threshold",
        name=label(w, pruned, k),
        calls=calls,
        copies=len(ws),
        goals=goals,
        nbytes=n * w.element_size(),
        check=check,
        eager=("torch.topk", "torch.sort", "torch.kthvalue"),
    )


def mask(machine: Machine, n: int, dtype: torch.dtype, pruned: float) -> Case:
    ws = weights(machine, n, dtype, pruned)
    w = ws[0]
    k = n // 4 if pruned else n // 2
    masks = [torch.empty(w.shape, dtype=torch.bool, device=w.device) for w in ws]

    def by_threshold(i: int) -> None:
        a = ws[i].abs()
        torch.ge(a, torch.topk(a, k, sorted=False).values.min(), out=masks[i])

    def check() -> None:
        got = pared.ops.topk_mask(w, k, nan="lowest", out=masks[0])
        if int(got.sum()) != k or w[got].abs().min() < w[~got].abs().max():
            raise RuntimeError("topk_mask: not the k largest")

    return Case(
        suite="topk_mask",
        name=label(w, pruned, k),
        calls={
            "pared": lambda i: pared.ops.topk_mask(ws[i], k, nan="lowest", out=masks[i]),
            "torch.topk and compare": by_threshold,
        },
        copies=len(ws),
        # Two reads, one of them to find the threshold, and a byte an element.
        nbytes=n * (2 * w.element_size() + 1),
        check=check,
        eager=("torch.topk and compare",),
    )
