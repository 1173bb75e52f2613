"""Int8 Linear against float32 and every int8 engine at hand, on the shapes of BERT-base and MiniLM.

Dynamic activations, quantization included: float32 in, float32 out. Peers, each with its weight prepared
once: ``nn.Linear`` (MKL on x86), torch's dynamically quantized linear on each of its engines, ONNX Runtime in
float32 and int8 where it is installed. ``torch._int_mm`` is the bare product, without quantization, scales
and bias.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional

import pared
from bench.bench_linear import SHAPES, THREADS
from bench.roofline import int8_limit, measure
from pared._timing import rotate

TOKENS = [16, 128, 384]
ENGINES = [e for e in ("onednn", "x86", "fbgemm") if e in torch.backends.quantized.supported_engines]
COLD = [(768, 768), (3072, 768), (768, 3072), (4096, 4096)]


def torch_dynamic(engine: str, w: torch.Tensor, bias: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Torch's dynamically quantized linear, one scale a tensor, as its own converter sets it up."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = engine
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plain = torch.nn.Linear(w.shape[1], w.shape[0])
            plain.load_state_dict({"weight": w, "bias": bias})
            quantized = torch.ao.quantization.quantize_dynamic(
                torch.nn.Sequential(plain), {torch.nn.Linear}, dtype=torch.qint8
            )
    finally:
        torch.backends.quantized.engine = before
    return quantized  # type: ignore[no-any-return]


def onnx_session(w: torch.Tensor, bias: torch.Tensor, threads: int, int8: bool) -> Any:
    """ONNX Runtime on the same layer; its int8 is dynamic too, with one scale an output."""
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    out, inputs = w.shape
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["p"]), helper.make_node("Add", ["p", "b"], ["y"])],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["tokens", inputs])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["tokens", out])],
        [
            numpy_helper.from_array(w.T.contiguous().numpy(), "w"),
            numpy_helper.from_array(bias.numpy(), "b"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    if int8:
        import tempfile

        from onnxruntime.quantization import QuantType, quantize_dynamic

        with tempfile.TemporaryDirectory() as folder:
            onnx.save(model, f"{folder}/a.onnx")
            quantize_dynamic(
                f"{folder}/a.onnx", f"{folder}/b.onnx", per_channel=True, weight_type=QuantType.QInt8
            )
            model = onnx.load(f"{folder}/b.onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])


def close(got: torch.Tensor, expected: torch.Tensor, share: float) -> None:
    """Within `share` of the largest output: 8 bits are 8 bits."""
    error = float((got - expected).abs().max() / expected.abs().max())
    assert error < share, f"differs by {error:.3f} of the largest output"


@THREADS
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("out", "inputs"), SHAPES)
def test_int8_dynamic(versus: Any, out: int, inputs: int, tokens: int, threads: int) -> None:
    w, bias, x = torch.randn(out, inputs) * inputs**-0.5, torch.randn(out), torch.randn(tokens, inputs)
    packed = pared.ops.Int8.from_dense(w)
    calls: dict[str, Callable[[], Any]] = {
        "nn.Linear": lambda: functional.linear(x, w, bias),
        "pared": lambda: pared.ops.linear(x, packed, bias),
    }
    expected = calls["nn.Linear"]()
    close(calls["pared"](), expected, 0.03)
    for engine in ENGINES:
        module = torch_dynamic(engine, w, bias)
        close(module(x), expected, 0.06)
        calls[f"torch int8 dynamic, {engine}"] = lambda module=module: module(x)
    qx, qw = (torch.randint(-127, 128, t.shape, dtype=torch.int8) for t in (x, w.T.contiguous()))
    calls["torch._int_mm (bare)"] = lambda: torch._int_mm(qx, qw)
    if importlib.util.find_spec("onnxruntime") and importlib.util.find_spec("onnx"):
        feed = {"x": x.numpy()}
        for int8 in (False, True):
            session = onnx_session(w, bias, threads, int8)
            close(torch.from_numpy(session.run(None, feed)[0]), expected, 0.06)
            name = f"ONNX Runtime {'int8' if int8 else 'float32'}"
            calls[name] = lambda session=session: session.run(None, feed)
    versus(
        calls,
        suite="linear Int8, dynamic",
        case=f"{out}x{inputs}, {tokens} tokens",
        cell=">= 128 tokens" if tokens >= 128 else f"{tokens} tokens",
        rivals=("nn.Linear",),
        work=2.0 * tokens * out * inputs,
        limit_s=int8_limit(measure(threads), out, inputs, tokens),
        facts={"out": out, "in": inputs, "tokens": tokens, "dtype": "int8"},
    )


@THREADS
@pytest.mark.parametrize("tokens", [1, pytest.param(4, marks=pytest.mark.full), 8])
@pytest.mark.parametrize(("out", "inputs"), COLD)
def test_int8_few_tokens_cold(versus: Any, out: int, inputs: int, tokens: int, threads: int) -> None:
    """Few tokens with the weights in memory: reading them is the cost."""
    w, bias, x = torch.randn(out, inputs) * inputs**-0.5, torch.randn(out), torch.randn(tokens, inputs)
    packed = pared.ops.Int8.from_dense(w)
    engine = ENGINES[0]

    def float32(_: int) -> Callable[[], object]:
        copy = w.clone()
        return lambda: functional.linear(x, copy, bias)

    def torch_int8(_: int) -> Callable[[], object]:
        module = torch_dynamic(engine, w, bias)
        return lambda: module(x)

    def ours(_: int) -> Callable[[], object]:
        copy = pared.ops.Int8.from_dense(w)
        return lambda: pared.ops.linear(x, copy, bias)

    versus(
        {
            "nn.Linear": rotate(float32, w.nbytes),
            f"torch int8 dynamic, {engine}": rotate(torch_int8, w.numel()),
            "pared": rotate(ours, packed.nbytes),
        },
        suite="linear Int8, dynamic, few tokens",
        case=f"{out}x{inputs}",
        cell=f"{tokens} token{'s' if tokens > 1 else ''}",
        rivals=("nn.Linear",),
        work=2.0 * tokens * out * inputs,
        moved=float(packed.nbytes),
        cold=True,
        facts={"out": out, "in": inputs, "tokens": tokens, "dtype": "int8"},
    )
