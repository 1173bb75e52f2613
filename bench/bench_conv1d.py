"""Conv1d, as pared.accelerate runs it, against torch's: the layers of speech models and of a residual network
over time series.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import pared

THREADS = pytest.mark.parametrize("threads", [1, 2], indirect=True, ids="{}t".format)
KERNELS = [
    pytest.param("dense", 0.0, id="dense"),
    pytest.param("int8", 0.0, id="int8"),
    *(pytest.param("csr", s, id=f"csr-{s:.0%}") for s in (0.5, 0.8, 0.9)),
]


class Layer(NamedTuple):
    """A convolution over a sequence."""

    channels: int
    filters: int
    kernel: int
    stride: int
    dilation: int
    groups: int
    length: int

    def __str__(self) -> str:
        options = [("/", self.stride), (" dilated ", self.dilation), (" in groups ", self.groups)]
        text = "".join(f"{name}{value}" for name, value in options if value > 1)
        return f"{self.channels}-{self.filters} {self.kernel}{text} at {self.length}"


LAYERS = [
    Layer(80, 384, 3, 1, 1, 1, 3000),  # Whisper tiny, 30 seconds
    Layer(384, 384, 3, 2, 1, 1, 3000),
    Layer(512, 512, 3, 2, 1, 1, 1599),  # wav2vec 2.0, features of two seconds
    Layer(512, 512, 2, 2, 1, 1, 199),
    Layer(768, 768, 128, 1, 1, 16, 49),  # its positions
    Layer(256, 256, 3, 1, 4, 1, 512),  # a temporal convolutional network
    Layer(64, 64, 1, 1, 1, 1, 1000),
]


@THREADS
@pytest.mark.parametrize(("format", "sparsity"), KERNELS)
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_conv1d(versus: Any, layer: Layer, format: str, sparsity: float, threads: int) -> None:
    torch.manual_seed(0)
    padding = layer.dilation * (layer.kernel // 2)
    options: dict[str, Any] = {"dilation": layer.dilation, "groups": layer.groups}
    conv = nn.Conv1d(layer.channels, layer.filters, layer.kernel, layer.stride, padding, **options).eval()
    conv.requires_grad_(False)
    if sparsity:
        pared.prune(conv, sparsity)
    fast = pared.nn.Conv1d.from_module(conv, format=format)
    x = torch.randn(1, layer.channels, layer.length)
    expected = conv(x)
    allowed = (0.03 if format == "int8" else 1e-4) * float(expected.abs().max())
    torch.testing.assert_close(fast(x), expected, rtol=0.0, atol=allowed)
    versus(
        {"torch": lambda: conv(x), "pared": lambda: fast(x)},
        suite=f"Conv1d {format}",
        case=str(layer),
        cell=f"{sparsity * 100:.0f} %",
        rivals=("torch",),
        work=2.0 * expected[0, 0].numel() * int(torch.count_nonzero(conv.weight)),
        facts={**layer._asdict(), "format": format, "sparsity": sparsity},
        budget=0.15,
    )
