"""CSR float32 Conv2d against torch's dense engines, on every distinct convolution of ResNet-50 at 224x224.

Baselines: ``nn.functional.conv2d`` (oneDNN, or MKL where torch prefers it) on contiguous and on channels-last
tensors; the goal counts against the faster. pared runs on contiguous tensors; its channels-last path is timed
beside it, and not counted.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch.nn import functional

import pared
from bench.roofline import Ceilings, conv_limit, measure

THREADS = pytest.mark.parametrize("threads", [1, 2], indirect=True, ids="{}t".format)
DENSE = ("contiguous", "channels_last")


class Layer(NamedTuple):
    """A convolution of ResNet-50: square kernel and image, padding of half the kernel."""

    channels: int
    filters: int
    kernel: int
    stride: int
    size: int

    @property
    def out(self) -> int:
        return (self.size - 1) // self.stride + 1

    def __str__(self) -> str:
        stride = f"/{self.stride}" if self.stride > 1 else ""
        return f"{self.channels}-{self.filters} {self.kernel}x{self.kernel}{stride} at {self.size}"


def resnet50() -> list[Layer]:
    """The distinct convolutions, in the order in which they run."""
    layers = [Layer(3, 64, 7, 2, 224)]
    channels, size = 64, 56
    for width, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for block in range(blocks):
            step = stride if block == 0 else 1
            out = size // step
            layers += [Layer(channels, width, 1, 1, size), Layer(width, width, 3, step, size)]
            layers += [Layer(width, 4 * width, 1, 1, out)]
            if block == 0:
                layers += [Layer(channels, 4 * width, 1, step, size)]
            channels, size = 4 * width, out
    return list(dict.fromkeys(layers))


def pruned(layer: Layer, sparsity: float) -> torch.Tensor:
    """A Gaussian weight with its smallest magnitudes zeroed, as magnitude pruning leaves it."""
    generator = torch.Generator().manual_seed(0)
    shape = (layer.filters, layer.channels, layer.kernel, layer.kernel)
    fan_in = layer.channels * layer.kernel**2
    w = torch.randn(shape, generator=generator) * fan_in**-0.5
    threshold = w.abs().flatten().kthvalue(round(w.numel() * sparsity)).values
    return torch.where(w.abs() > threshold, w, 0.0)


def limit(one: Ceilings, c: Ceilings, layer: Layer, images: int, packed: pared.ops.CSR) -> float:
    """The least seconds that the ceilings allow."""
    return conv_limit(one, c, **layer._asdict(), images=images, nnz=packed.nnz, nbytes=packed.packed.nbytes)


@THREADS
@pytest.mark.parametrize("sparsity", [0.8, 0.9], ids="{:.0%}".format)
@pytest.mark.parametrize("images", [1, pytest.param(8, marks=pytest.mark.full)])
@pytest.mark.parametrize("layer", resnet50(), ids=str)
def test_csr(versus, layer: Layer, images: int, sparsity: float, threads: int) -> None:
    w, bias = pruned(layer, sparsity), torch.randn(layer.filters)
    packed = pared.ops.CSR.from_dense(w)
    x = torch.randn(images, layer.channels, layer.size, layer.size)
    last = torch.channels_last
    x_last, w_last = x.contiguous(memory_format=last), w.contiguous(memory_format=last)
    pad, stride = layer.kernel // 2, layer.stride
    calls = {
        "contiguous": lambda: functional.conv2d(x, w, bias, stride, pad),
        "channels_last": lambda: functional.conv2d(x_last, w_last, bias, stride, pad),
        "pared": lambda: pared.ops.conv2d(x, packed, bias, stride, pad),
        "pared channels_last": lambda: pared.ops.conv2d(x_last, packed, bias, stride, pad),
    }
    expected = calls["contiguous"]()
    for name in ("pared", "pared channels_last"):
        torch.testing.assert_close(calls[name](), expected, rtol=1e-4, atol=1e-4)
    versus(
        calls,
        suite="conv2d CSR float32, ResNet-50" + (f", {images} images" if images > 1 else ""),
        case=str(layer),
        cell=f"{sparsity * 100:.0f} %",
        rivals=DENSE,
        work=2.0 * images * layer.out**2 * packed.nnz,
        limit_s=limit(measure(1), measure(threads), layer, images, packed),
        facts={**layer._asdict(), "images": images, "sparsity": sparsity, "dtype": "float32"},
        budget=0.15,
    )
