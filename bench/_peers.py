"""The other engines that the suites compare with: whole models, or a layer as a model of its own.

Each gives a callable without arguments, or None, with one line that says why, where its package is not there.
Nothing here is needed to run a suite.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

ENGINES = [e for e in ("onednn", "x86", "fbgemm") if e in torch.backends.quantized.supported_engines]
Call = Callable[[], Any]
Inputs = Sequence[torch.Tensor]
_said: set[str] = set()


def installed(package: str) -> bool:
    """Whether a peer's package is there; says once that it is not."""
    if importlib.util.find_spec(package) is not None:
        return True
    if package not in _said:
        _said.add(package)
        print(f"\n{package} is not installed: its columns are left out")
    return False


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings and logs of other people's converters."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextmanager
def torch_engine(name: str) -> Iterator[None]:
    """Torch's engine for its quantized modules."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = name
    try:
        yield
    finally:
        torch.backends.quantized.engine = before


def torch_dynamic(engine: str, model: nn.Module) -> nn.Module:
    """A copy with torch's dynamically quantized Linear layers, as its own converter makes them."""
    with torch_engine(engine), quiet():
        converted = torch.ao.quantization.quantize_dynamic(
            copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8
        )
    return converted  # type: ignore[no-any-return]


def torchao_int8(model: nn.Module, inputs: Inputs) -> Call | None:
    """torchao's int8 weights and activations, eager, in every Linear layer."""
    if not installed("torchao"):
        return None
    with quiet(), torch.inference_mode(False), torch.no_grad():
        quantization = importlib.import_module("torchao.quantization")
        converted = copy.deepcopy(model)
        quantization.quantize_(converted, quantization.Int8DynamicActivationInt8WeightConfig())
        plain = [t.clone() for t in inputs]

    def call() -> Any:
        with torch.inference_mode(False), torch.no_grad():
            return converted(*plain)

    return call


def onnx_bytes(model: nn.Module, inputs: Inputs) -> bytes | None:
    """The model as ONNX; None without the package."""
    if not installed("onnx"):
        return None
    file = io.BytesIO()
    names = [f"x{i}" for i in range(len(inputs))]
    with quiet(), torch.inference_mode(False), torch.no_grad():
        torch.onnx.export(
            model, tuple(t.clone() for t in inputs), file, input_names=names, opset_version=17, dynamo=False
        )
    return file.getvalue()


def _to_int8(model: bytes) -> bytes:
    """ONNX Runtime's own converter: dynamic, signed weights, one scale an output."""
    quantization = importlib.import_module("onnxruntime.quantization")
    with tempfile.TemporaryDirectory() as folder:
        plain, small = Path(folder, "a.onnx"), Path(folder, "b.onnx")
        plain.write_bytes(model)
        with quiet():
            quantization.quantize_dynamic(
                str(plain), str(small), per_channel=True, weight_type=quantization.QuantType.QInt8
            )
        return small.read_bytes()


def onnx_runtime(model: bytes | None, inputs: Inputs, threads: int, int8: bool = False) -> Call | None:
    """ONNX Runtime on the CPU."""
    if model is None or not installed("onnxruntime"):
        return None
    onnxruntime = importlib.import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Its threads may spin within a call, but not on into the next rival's turn, where they take the cores
    # that torch and pared run on (16 tokens, two threads: the second one gained next to nothing).
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        _to_int8(model) if int8 else model, options, ["CPUExecutionProvider"]
    )
    feed = {f"x{i}": t.numpy() for i, t in enumerate(inputs)}
    return lambda: session.run(None, feed)[0]


def openvino(model: nn.Module, inputs: Inputs, threads: int) -> Call | None:
    """OpenVINO on the CPU, float32."""
    if not installed("openvino"):
        return None
    ov = importlib.import_module("openvino")
    with quiet(), torch.inference_mode(False), torch.no_grad():
        converted = ov.convert_model(model, example_input=tuple(t.clone() for t in inputs))
    options = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": 1}
    request = ov.Core().compile_model(converted, "CPU", options).create_infer_request()
    feed = [t.numpy() for t in inputs]

    def call() -> Any:
        request.infer(feed, share_inputs=True, share_outputs=True)
        return request.get_output_tensor(0).data

    return call


def whole_models(model: nn.Module, inputs: Inputs, threads: int, int8: bool = True) -> dict[str, Call]:
    """Every peer that is there, by name, for a model of Linear layers; without `int8` the float32 ones."""
    onnx = onnx_bytes(model, inputs)
    found: dict[str, Call | None] = {
        "ONNX Runtime float32": onnx_runtime(onnx, inputs, threads),
        "OpenVINO float32": openvino(model, inputs, threads),
    }
    if int8:
        found["ONNX Runtime int8"] = onnx_runtime(onnx, inputs, threads, int8=True)
        found["torchao int8"] = torchao_int8(model, inputs)
        for engine in ENGINES:
            converted = torch_dynamic(engine, model)
            found[f"torch int8 dynamic, {engine}"] = lambda m=converted: m(*inputs)
    return {name: call for name, call in found.items() if call is not None}


def layer_of(w: torch.Tensor, bias: torch.Tensor) -> nn.Module:
    """A model of one Linear layer."""
    plain = nn.Linear(w.shape[1], w.shape[0])
    plain.load_state_dict({"weight": w, "bias": bias})
    return nn.Sequential(plain).eval().requires_grad_(False)


def onnx_layer(w: torch.Tensor, bias: torch.Tensor) -> bytes:
    """The layer as ONNX, any number of tokens."""
    onnx = importlib.import_module("onnx")
    helper, array = onnx.helper, onnx.numpy_helper.from_array
    out, inputs = w.shape
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x0", "w"], ["p"]), helper.make_node("Add", ["p", "b"], ["y"])],
        "linear",
        [helper.make_tensor_value_info("x0", onnx.TensorProto.FLOAT, ["tokens", inputs])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["tokens", out])],
        [
            array(w.T.contiguous().numpy(), "w"),
            array(bias.numpy(), "b"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    data: bytes = model.SerializeToString()
    return data


def one_layer(
    w: torch.Tensor, bias: torch.Tensor, x: torch.Tensor, threads: int, int8: bool = True
) -> dict[str, Call]:
    """Every peer outside of torch that is there, by name, for one Linear layer; without `int8` the float32
    ones."""
    onnx = onnx_layer(w, bias) if installed("onnx") else None
    layer = layer_of(w, bias)
    found = {
        "ONNX Runtime float32": onnx_runtime(onnx, [x], threads),
        "OpenVINO float32": openvino(layer, [x], threads),
    }
    if int8:
        found["ONNX Runtime int8"] = onnx_runtime(onnx, [x], threads, int8=True)
        found["torchao int8"] = torchao_int8(layer, [x])
    return {name: call for name, call in found.items() if call is not None}
