"""Int8 Conv2d, dense and with zeros in blocks, on every distinct convolution of ResNet-50 at 224x224.

Float32 images in and out, quantised on the way: by their own largest magnitude ("pared"), or with a given
scale, as all the peers have it ("pared static"). Peers: ``nn.functional.conv2d`` in float32 in both memory
layouts (the goal counts against the faster), torch's quantised convolution on each of its engines with and
without the conversion of its input and output, ONNX Runtime's QLinearConv between its own conversions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import pared
from bench.bench_conv import DENSE, Layer, resnet50
from bench.bench_gemm_int8 import MAY_SATURATE, close
from bench.roofline import conv_int8_limit, measure
from pared._peers import ENGINES, STEP, installed, onnx_conv, torch_conv

THREADS = pytest.mark.parametrize("threads", [1, 2], indirect=True, ids="{}t".format)
FULL = pytest.mark.full
PATTERNS = [
    pytest.param(None, 0.0, id="dense"),
    *(
        pytest.param(block, s, id=f"{block[0]}x{block[1]}-{s:.0%}", marks=[] if s == 0.8 else FULL)
        for block in ((1, 4), (4, 4))
        for s in (0.5, 0.8, 0.9)
    ),
]


def block_pruned(layer: Layer, block: tuple[int, int] | None, sparsity: float) -> torch.Tensor:
    """A Gaussian weight with its weakest blocks of filters by channels at a tap zeroed."""
    generator = torch.Generator().manual_seed(0)
    f, c, k = layer.filters, layer.channels, layer.kernel
    w = torch.randn(f, c, k, k, generator=generator) * (c * k * k) ** -0.5
    if block is None:
        return w
    rows, columns = block
    padded = functional.pad(w, (0, 0, 0, 0, 0, -c % columns))
    strength = padded.reshape(f // rows, rows, -1, columns, k, k).norm(dim=(1, 3))
    threshold = strength.flatten().kthvalue(max(1, round(strength.numel() * sparsity))).values
    mask = (strength > threshold).repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    return w * mask[:, :c]


@THREADS
@pytest.mark.parametrize(("block", "sparsity"), PATTERNS)
@pytest.mark.parametrize("layer", resnet50(), ids=str)
def test_int8(
    versus: Any, layer: Layer, block: tuple[int, int] | None, sparsity: float, threads: int
) -> None:
    w, bias = block_pruned(layer, block, sparsity), torch.randn(layer.filters)
    # What STEP holds: one number beyond it is an error of the fixed scale, not of a kernel.
    x = torch.randn(1, layer.channels, layer.size, layer.size).clamp(-4.4, 4.4)
    last = torch.channels_last
    x_last, w_last = x.contiguous(memory_format=last), w.contiguous(memory_format=last)
    pad, stride = layer.kernel // 2, layer.stride
    dense = pared.ops.Int8.from_dense(w)
    packed = dense if block is None else pared.ops.BSRInt8.from_dense(w, block=block)
    calls: dict[str, Callable[[], Any]] = {
        "contiguous": lambda: functional.conv2d(x, w, bias, stride, pad),
        "channels_last": lambda: functional.conv2d(x_last, w_last, bias, stride, pad),
        "pared": lambda: pared.ops.conv2d(x, packed, bias, stride, pad),
        "pared channels_last": lambda: pared.ops.conv2d(x_last, packed, bias, stride, pad),
    }
    expected = calls["contiguous"]()
    step = float(expected.abs().max()) / 127
    if block is None:
        static = pared.ops.Int8.from_dense(w, activation_scale=STEP)
        calls["pared static channels_last"] = lambda: pared.ops.conv2d(x_last, static, bias, stride, pad)
    else:
        calls["pared dense int8"] = lambda: pared.ops.conv2d(x, dense, bias, stride, pad)
    plain = nn.Conv2d(layer.channels, layer.filters, layer.kernel, stride, pad).requires_grad_(False)
    plain.load_state_dict({"weight": w, "bias": bias})
    for engine in ENGINES:
        whole, bare = torch_conv(engine, plain, x_last, step)
        calls[f"torch int8, {engine}"], calls[f"torch int8, {engine} (bare)"] = whole, bare
    if installed("onnx", "onnxruntime"):
        calls["ONNX Runtime int8"] = onnx_conv(plain, x, step, threads)
    for name, call in calls.items():
        if "bare" not in name and not name.endswith(("fbgemm", "x86", *MAY_SATURATE)):  # those may saturate
            close(torch.as_tensor(call()), expected, 0.06)
    pattern = "dense" if block is None else f"{block[0]}x{block[1]}"
    versus(
        calls,
        suite=f"conv2d {pattern} int8, ResNet-50",
        case=str(layer),
        cell=f"{sparsity * 100:.0f} %",
        rivals=DENSE,
        work=2.0 * layer.out**2 * packed.nnz,
        limit_s=conv_int8_limit(
            measure(threads),
            layer.out**2 * packed.nnz,
            layer.channels,
            layer.size**2,
            layer.filters,
            layer.out**2,
        ),
        facts={**layer._asdict(), "sparsity": sparsity, "dtype": "int8"},
        budget=0.15,
    )
