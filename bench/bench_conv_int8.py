"""Int8 Conv2d, dense and with zeros in blocks, on every distinct convolution of ResNet-50 at 224x224.

Float32 images in and out, quantised on the way: by their own largest magnitude ("pared"), or with a given
scale, as all the peers have it ("pared static"). Peers: ``nn.functional.conv2d`` in float32 in both memory
layouts (the goal counts against the faster), torch's quantised convolution on each of its engines with and
without the conversion of its input and output, ONNX Runtime's QLinearConv between its own conversions.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional

import pared
from bench.bench_conv import DENSE, Layer, resnet50
from bench.bench_gemm_int8 import close
from bench.roofline import conv_int8_limit, measure
from pared._peers import ENGINES, installed, quiet, torch_engine

THREADS = pytest.mark.parametrize("threads", [1, 2], indirect=True, ids="{}t".format)
STEP = 0.035  # of images: normal numbers up to 4.4
ZERO = 128
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


def filter_scales(w: torch.Tensor) -> torch.Tensor:
    """Steps of 127 to a filter's largest weight; any where all are zero, that its bias can be counted in."""
    most = w.abs().amax((1, 2, 3))
    return torch.where(most > 0, most, most.max()) / 127


def torch_quantized(
    engine: str, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor, layer: Layer, step: float
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """``(with conversions, bare)``: torch's int8 convolution on channels-last images."""
    scales = filter_scales(w).double()
    with torch_engine(engine), quiet():
        q = torch.quantize_per_channel(w, scales, torch.zeros(len(w), dtype=torch.long), 0, torch.qint8)
        pad, stride = [layer.kernel // 2] * 2, [layer.stride] * 2
        packed = torch.ops.quantized.conv2d_prepack(q, bias, stride, pad, [1, 1], 1)
        qx = torch.quantize_per_tensor(x, STEP, ZERO, torch.quint8)

    def bare() -> Any:
        return torch.ops.quantized.conv2d(qx, packed, step, ZERO)

    def whole() -> Any:
        quantized = torch.quantize_per_tensor(x, STEP, ZERO, torch.quint8)
        return torch.ops.quantized.conv2d(quantized, packed, step, ZERO).dequantize()

    return whole, bare


def onnx_conv(
    x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor, layer: Layer, step: float, threads: int
) -> Callable[[], Any]:
    """QuantizeLinear, QLinearConv with a scale a filter, DequantizeLinear."""
    onnx, onnxruntime = importlib.import_module("onnx"), importlib.import_module("onnxruntime")
    helper, array = onnx.helper, onnx.numpy_helper.from_array
    scales = filter_scales(w)
    values = {
        "sx": torch.tensor(STEP),
        "zx": torch.tensor(ZERO, dtype=torch.uint8),
        "w": torch.round(w / scales[:, None, None, None]).to(torch.int8),
        "sw": scales,
        "zw": torch.zeros(len(w), dtype=torch.int8),
        "sy": torch.tensor(step),
        "b": torch.round(bias / (scales * STEP)).to(torch.int32),
    }
    pad = layer.kernel // 2
    convolution = helper.make_node(
        "QLinearConv",
        ["q", "sx", "zx", "w", "sw", "zw", "sy", "zx", "b"],
        ["p"],
        pads=[pad] * 4,
        strides=[layer.stride] * 2,
    )
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", "sx", "zx"], ["q"]),
            convolution,
            helper.make_node("DequantizeLinear", ["p", "sy", "zx"], ["y"]),
        ],
        "conv",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, list(x.shape))],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", "f", "h", "w"])],
        [array(v.numpy(), name) for name, v in values.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    feed = {"x": x.numpy()}
    return lambda: session.run(None, feed)[0]


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
    for engine in ENGINES:
        whole, bare = torch_quantized(engine, x_last, w, bias, layer, step)
        calls[f"torch int8, {engine}"], calls[f"torch int8, {engine} (bare)"] = whole, bare
    if installed("onnx", "onnxruntime"):
        calls["ONNX Runtime int8"] = onnx_conv(x, w, bias, layer, step, threads)
    for name, call in calls.items():
        if "bare" not in name and "fbgemm" not in name and "x86" not in name:  # those may saturate
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
