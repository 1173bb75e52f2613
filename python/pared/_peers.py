"""The other engines that pared is compared with: whole models, or a layer as a model of its own.

Used by ``pared bench --peers`` and by the benchmarks of the repository. Nothing here is needed to run pared:
an engine whose package is not there is left out, and `missing` names the package.
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
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.ao.nn.quantized.modules.linear import LinearPackedParams

ENGINES = [e for e in ("onednn", "x86", "fbgemm") if e in torch.backends.quantized.supported_engines]
PACKAGES = ("onnx", "onnxruntime", "openvino", "torchao")
BARE = "torch._int_mm (bare)"  # the product alone: beside the others, not one of them
Call = Callable[[], Any]
Inputs = Sequence[torch.Tensor]


def installed(*packages: str) -> bool:
    """Whether a peer's packages are there."""
    return all(importlib.util.find_spec(package) is not None for package in packages)


def missing() -> list[str]:
    """The packages whose engines are left out."""
    return [package for package in PACKAGES if not installed(package)]


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
        converted: nn.Module = torch.ao.quantization.quantize_dynamic(  # type: ignore[no-untyped-call]
            copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8
        )
    return converted


def _another(model: nn.Module) -> nn.Module:
    """Another one with packed weights of its own; deepcopy alone would unpack them, which takes longer."""
    memo: dict[int, Any] = {}
    for m in model.modules():
        if isinstance(m, LinearPackedParams):
            memo[id(m)] = mine = copy.copy(m)
            mine.set_weight_bias(*m._weight_bias())
    return copy.deepcopy(model, memo)


def torchao_int8(model: nn.Module) -> nn.Module:
    """A copy with torchao's int8 weights and activations in every Linear layer."""
    with quiet(), torch.inference_mode(False), torch.no_grad():
        quantization = importlib.import_module("torchao.quantization")
        converted = copy.deepcopy(model)
        quantization.quantize_(converted, quantization.Int8DynamicActivationInt8WeightConfig())
    return converted


def onnx_bytes(model: nn.Module, inputs: Inputs) -> bytes:
    """The model as ONNX."""
    file = io.BytesIO()
    names = [f"x{i}" for i in range(len(inputs))]
    with quiet(), torch.inference_mode(False), torch.no_grad():
        torch.onnx.export(
            model,
            tuple(t.clone() for t in inputs),
            file,  # type: ignore[arg-type]  # this exporter takes files, its annotation is the other one's
            input_names=names,
            opset_version=17,
            dynamo=False,
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


def onnx_runtime(model: bytes, inputs: Inputs, threads: int) -> Call:
    """ONNX Runtime on the CPU."""
    onnxruntime = importlib.import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Its threads may spin within a call, but not on into the next rival's turn, where they take the cores
    # that torch and pared run on (16 tokens, two threads: the second one gained next to nothing).
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model, options, ["CPUExecutionProvider"])
    feed = {f"x{i}": t.numpy() for i, t in enumerate(inputs)}
    return lambda: session.run(None, feed)[0]


def to_openvino(model: nn.Module, inputs: Inputs) -> Any:
    """The model as OpenVINO's converter makes it."""
    ov = importlib.import_module("openvino")
    with quiet(), torch.inference_mode(False), torch.no_grad():
        return ov.convert_model(model, example_input=tuple(t.clone() for t in inputs))


def openvino(model: Any, inputs: Inputs, threads: int) -> Call:
    """OpenVINO on the CPU, float32; `model` from `to_openvino`."""
    ov = importlib.import_module("openvino")
    options = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": 1}
    request = ov.Core().compile_model(model, "CPU", options).create_infer_request()
    feed = [t.numpy() for t in inputs]

    def call() -> Any:
        request.infer(feed, share_inputs=True, share_outputs=True)
        return request.get_output_tensor(0).data

    return call


@dataclass(frozen=True)
class Peer:
    """An engine that was told what to compute.

    Attributes
    ----------
    make : a callable with a copy of the weights of its own.
    nbytes : of one copy.
    """

    make: Callable[[], Call]
    nbytes: int


class Converted:
    """A model as each engine's converter makes it: once, when it is first asked for. Every call that is made
    from that has a copy of the weights.

    Parameters
    ----------
    model : float32, in eval mode.
    onnx : gives it as ONNX.
    """

    def __init__(self, model: nn.Module, onnx: Callable[[], bytes]) -> None:
        self._model = model
        self._onnx = onnx
        self._made: dict[Any, Any] = {}

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def peers(self, inputs: Inputs, threads: int, int8: bool = True) -> dict[str, Peer]:
        """Every peer that is there, by name; without `int8` the float32 ones."""
        weights = sum(p.numel() for p in self._model.parameters())
        calls: dict[str, Callable[[], Call]] = {}
        if installed("onnx", "onnxruntime"):
            calls["ONNX Runtime float32"] = lambda: onnx_runtime(self._plain(), inputs, threads)
            if int8:
                calls["ONNX Runtime int8"] = lambda: onnx_runtime(self._small(), inputs, threads)
        if installed("openvino"):
            calls["OpenVINO float32"] = lambda: openvino(self._ir(inputs), inputs, threads)
        if int8:
            if installed("torchao"):
                calls["torchao int8"] = partial(self._torchao, inputs)
            for engine in ENGINES:
                calls[f"torch int8 dynamic, {engine}"] = partial(self._dynamic, engine, inputs)
        return {
            name: Peer(make, 4 * weights if name.endswith("float32") else weights)
            for name, make in calls.items()
        }

    def _plain(self) -> bytes:
        return cast(bytes, self._once("onnx", self._onnx))

    def _small(self) -> bytes:
        return cast(bytes, self._once("onnx int8", lambda: _to_int8(self._plain())))

    def _ir(self, inputs: Inputs) -> Any:
        shapes = tuple(t.shape for t in inputs)
        return self._once(("openvino", shapes), lambda: to_openvino(self._model, inputs))

    def _torchao(self, inputs: Inputs) -> Call:
        with torch.inference_mode(False), torch.no_grad():
            mine = copy.deepcopy(self._once("torchao", lambda: torchao_int8(self._model)))
            plain = [t.clone() for t in inputs]

        def call() -> Any:
            with torch.inference_mode(False), torch.no_grad():
                return mine(*plain)

        return call

    def _dynamic(self, engine: str, inputs: Inputs) -> Call:
        with torch_engine(engine):
            mine = _another(self._once(engine, lambda: torch_dynamic(engine, self._model)))
        return lambda: mine(*inputs)


def whole_models(model: nn.Module, inputs: Inputs, threads: int, int8: bool = True) -> dict[str, Call]:
    """Every peer that is there, by name, for a whole model; without `int8` the float32 ones."""
    found = Converted(model, lambda: onnx_bytes(model, inputs)).peers(inputs, threads, int8)
    return {name: peer.make() for name, peer in found.items()}


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


def one_layer(w: torch.Tensor, bias: torch.Tensor) -> Converted:
    """The peers of ``functional.linear``."""
    return Converted(layer_of(w, bias), lambda: onnx_layer(w, bias))


def int_mm(w: torch.Tensor, x: torch.Tensor) -> Peer:
    """``torch._int_mm`` on bytes of these shapes: no quantization, no scales, no bias."""
    qx, qw = (torch.randint(-127, 128, t.shape, dtype=torch.int8) for t in (x, w.T.contiguous()))

    def make() -> Call:
        mine = qw.clone()
        return lambda: torch._int_mm(qx, mine)

    return Peer(make, qw.nbytes)


def sparse_csr(w: torch.Tensor, x: torch.Tensor) -> Peer:
    """torch.sparse on a weight with zeros: the product alone, `x` transposed before."""
    with quiet():
        csr = w.to_sparse_csr()
    xt = x.T.contiguous()

    def make() -> Call:
        mine = csr.clone()
        return lambda: mine @ xt

    return Peer(make, sum(t.nbytes for t in (csr.values(), csr.col_indices(), csr.crow_indices())))


STEP = 0.035  # of the peers' quantized images: normal numbers up to 4.4
ZERO = 128


def filter_scales(w: torch.Tensor) -> torch.Tensor:
    """Steps of 127 to a filter's largest weight; any where all are zero, that its bias can be counted in."""
    most = w.abs().amax((1, 2, 3))
    return torch.where(most > 0, most, most.max()) / 127


def torch_conv(engine: str, layer: nn.Conv2d, x: torch.Tensor, step: float) -> tuple[Call, Call]:
    """``(with conversions, bare)``: torch's int8 convolution on channels-last images, with a fixed scale of
    images and of outputs (`step`)."""
    w, bias = layer.weight.detach(), layer.bias
    scales = filter_scales(w).double()
    padding = [*cast(tuple[int, ...], layer.padding)]
    with torch_engine(engine), quiet():
        q = torch.quantize_per_channel(w, scales, torch.zeros(len(w), dtype=torch.long), 0, torch.qint8)
        packed = torch.ops.quantized.conv2d_prepack(
            q, bias, [*layer.stride], padding, [*layer.dilation], layer.groups
        )
        qx = torch.quantize_per_tensor(x, STEP, ZERO, torch.quint8)

    def bare() -> Any:
        return torch.ops.quantized.conv2d(qx, packed, step, ZERO)

    def whole() -> Any:
        quantized = torch.quantize_per_tensor(x, STEP, ZERO, torch.quint8)
        return torch.ops.quantized.conv2d(quantized, packed, step, ZERO).dequantize()

    return whole, bare


def onnx_conv(layer: nn.Conv2d, x: torch.Tensor, step: float, threads: int) -> Call:
    """ONNX Runtime: QuantizeLinear, QLinearConv with a scale a filter, DequantizeLinear."""
    onnx = importlib.import_module("onnx")
    helper, array = onnx.helper, onnx.numpy_helper.from_array
    w = layer.weight.detach()
    bias = torch.zeros(len(w)) if layer.bias is None else layer.bias.detach()
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
    convolution = helper.make_node(
        "QLinearConv",
        ["q", "sx", "zx", "w", "sw", "zw", "sy", "zx", "b"],
        ["p"],
        pads=[*cast(tuple[int, ...], layer.padding)] * 2,
        strides=[*layer.stride],
    )
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x0", "sx", "zx"], ["q"]),
            convolution,
            helper.make_node("DequantizeLinear", ["p", "sy", "zx"], ["y"]),
        ],
        "conv",
        [helper.make_tensor_value_info("x0", onnx.TensorProto.FLOAT, list(x.shape))],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", "f", "h", "w"])],
        [array(v.numpy(), name) for name, v in values.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return onnx_runtime(model.SerializeToString(), [x], threads)


def int8_convolutions(layer: nn.Conv2d, x: torch.Tensor, threads: int) -> dict[str, Call]:
    """Every int8 peer of one convolution that is there, by name; float32 images in and out."""
    with torch.no_grad():
        step = float(layer(x).abs().max()) / 127
    last = x.contiguous(memory_format=torch.channels_last)
    found = {f"torch int8, {engine}": torch_conv(engine, layer, last, step)[0] for engine in ENGINES}
    if installed("onnx", "onnxruntime"):
        found["ONNX Runtime int8"] = onnx_conv(layer, x, step, threads)
    return found
