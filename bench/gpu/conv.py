"""1x1 convolutions on channels-last images in bfloat16, against cuDNN."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn

import pared
from bench.gpu.measure import Case, Goal, Machine

# Filters, channels, side of the image, stride: of ResNet-50, 64 images.
LAYERS = [(64, 256, 56, 1), (512, 128, 28, 1), (256, 1024, 14, 1), (512, 2048, 7, 1), (512, 256, 56, 2)]
IMAGES = 64
# Format, share of zeros, block.
KINDS = [("int8", 0.0, 1), ("bsr", 0.8, 64), ("csr", 0.95, 1)]


def cases(machine: Machine) -> Iterator[Callable[[], Case]]:
    for layer in [(64, 128, 4, 2)] if machine.dry else LAYERS:
        for kind in KINDS:
            yield partial(convolution, machine, *layer, *kind)


def convolution(
    machine: Machine,
    filters: int,
    channels: int,
    side: int,
    stride: int,
    format: str,
    zeros: float,
    block: int,
) -> Case:
    images = 1 if machine.dry else IMAGES
    torch.manual_seed(0)
    plain = nn.Conv2d(channels, filters, 1, stride=stride).bfloat16().eval()
    with torch.no_grad():
        keep = torch.rand(-(-filters // block), -(-channels // block)) >= zeros
        keep[0, 0] = True
        keep = keep.repeat_interleave(block, 0).repeat_interleave(block, 1)[:filters, :channels]
        plain.weight.mul_(keep[:, :, None, None])
    quick = machine.place(pared.nn.Conv2d.from_module(plain, format=format))
    plain = plain.to(machine.device, memory_format=torch.channels_last)
    copies = machine.copies(2 * images * channels * side * side)
    xs = [
        torch.randn(images, channels, side, side, device=machine.device)
        .bfloat16()
        .contiguous(memory_format=torch.channels_last)
        for _ in range(copies)
    ]

    @torch.no_grad()
    def dense(i: int) -> torch.Tensor:
        y: torch.Tensor = plain(xs[i])
        return y

    @torch.no_grad()
    def mine(i: int) -> torch.Tensor:
        y: torch.Tensor = quick(xs[i])
        return y

    def check() -> None:
        want = dense(0).double()
        if (mine(0).double() - want).abs().max() > 0.05 * want.abs().max():
            raise RuntimeError("conv2d: wrong")

    pixels = images * -((-side // stride) ** 2)
    return Case(
        suite=f"conv 1x1 {format}",
        name=f"{filters} x {channels}, {images} images of {side}, stride {stride}, {zeros:.0%} zeros",
        calls={"pared": mine, "cuDNN bf16": dense},
        copies=copies,
        goals=[Goal(["cuDNN bf16"], 1.0)] if format != "csr" else [],
        nbytes=2 * pixels * (channels * stride**2 + filters),
        operations=2.0 * pixels * filters * channels * float(keep.float().mean()),
        check=check,
    )
