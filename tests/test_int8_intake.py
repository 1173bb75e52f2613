"""Weights that others quantized become `pared.ops.Int8` with nothing rounded a second time."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from int8_check import check_int8, linear_int8
from torch import nn

import pared
from pared import _core, ops
from pared.nn import Conv1d, Conv2d, Linear

ENGINES = [e for e in ("onednn", "x86", "fbgemm") if e in torch.backends.quantized.supported_engines]


def dynamic(plain: nn.Linear, per_channel: bool) -> Any:
    """What torch.ao's dynamic quantization makes of it."""
    from torch.ao import quantization as q

    weight = q.per_channel_dynamic_qconfig if per_channel else q.default_dynamic_qconfig
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return q.quantize_dynamic(
            nn.Sequential(copy.deepcopy(plain)), {nn.Linear: weight}, dtype=torch.qint8
        )[0]


@pytest.fixture
def plain() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(101, 37).eval()


@pytest.mark.parametrize("per_channel", [False, True])
def test_a_dynamic_layer_of_torch(plain: nn.Linear, per_channel: bool) -> None:
    theirs = dynamic(plain, per_channel)
    ours = ops.Int8.from_torch(theirs)
    w = theirs.weight()
    q, scales = ours.to_quantized()
    assert torch.equal(torch.from_numpy(q), w.int_repr())
    assert torch.equal(torch.as_tensor(ours.to_dense()), w.dequantize())
    x = torch.randn(9, 101)
    bias = theirs.bias().detach()
    y = ops.linear(x, ours, bias)
    check_int8(y.numpy(), linear_int8(x.numpy(), q, scales, bias.numpy()))
    # Both round the inputs: to steps of max|x| / 127 a token here, and of (max - min) / 127 of the whole
    # tensor there (7 bits: torch's reduce_range), with a zero point between.
    step = (x.amax() - x.amin()) / 127 + x.abs().amax(1, keepdim=True) / 127
    with torch.no_grad():
        bound = 0.51 * step * w.dequantize().abs().sum(1) + 1e-5
        assert ((y - theirs(x)).abs() <= bound).all()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_static_layer_of_torch(plain: nn.Linear, engine: str) -> None:
    """Given the same input bytes, outputs equal up to the rounding to torch's 8-bit outputs."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = engine
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = torch.ao.nn.quantized.Linear(101, 37)
            scales = plain.weight.detach().abs().amax(1) / 127
            w = torch.quantize_per_channel(
                plain.weight.detach(), scales.double(), torch.zeros(37, dtype=torch.long), 0, torch.qint8
            )
            theirs.set_weight_bias(w, plain.bias.detach())
            theirs.scale, theirs.zero_point = 0.02, 128
            x = torch.quantize_per_tensor(torch.rand(9, 101) * 2 - 1, 1 / 64, 60, torch.quint8)
            want = theirs(x).dequantize()
    finally:
        torch.backends.quantized.engine = before
    packed = ops.Int8.from_torch(theirs, activation_scale=1 / 64, activation_zero=60)
    y = ops.linear(x.dequantize(), packed, plain.bias.detach())
    assert want.abs().max() < 0.02 * 127  # not saturated
    # fbgemm rounds the bias to its accumulator's grid too.
    bias_step = float(scales.max()) / 64
    assert ((y - want).abs() <= 0.5 * 0.02 + bias_step + 1e-5).all()


@pytest.fixture
def engine(request: pytest.FixtureRequest) -> Any:
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = request.param
    yield request.param
    torch.backends.quantized.engine = before


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("engine", ENGINES, indirect=True)
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_static_convolution_of_torch(engine: str, relu: bool, groups: int) -> None:
    """Given the same input bytes, outputs equal up to the rounding to torch's 8-bit outputs: half a step."""
    torch.manual_seed(0)
    plain = nn.Conv2d(24, 18, 3, stride=2, padding=1, groups=groups)
    kind = torch.ao.nn.intrinsic.quantized.ConvReLU2d if relu else torch.ao.nn.quantized.Conv2d
    theirs = kind(24, 18, 3, stride=2, padding=1, groups=groups)
    w = plain.weight.detach()
    scales = w.abs().amax((1, 2, 3)) / 127
    qw = torch.quantize_per_channel(w, scales.double(), torch.zeros(18, dtype=torch.long), 0, torch.qint8)
    theirs.set_weight_bias(qw, plain.bias.detach())
    step, zero = 0.03, 0 if relu else 128
    theirs.scale, theirs.zero_point = step, zero
    # Half of uint8's range: fbgemm's products of pairs saturate in 16 bits above it.
    x = torch.quantize_per_tensor(torch.rand(2, 24, 9, 11) - 0.45, 1 / 127, 57, torch.quint8)
    want = theirs(x).dequantize()
    ours = ops.Int8.from_torch(theirs, activation_scale=1 / 127, activation_zero=57)
    assert ours.groups == groups
    assert np.array_equal(ours.to_quantized()[0], qw.int_repr().numpy())
    layer = Conv2d.from_quantized(theirs, activation_scale=1 / 127, activation_zero=57)
    y = layer(x.dequantize())
    assert layer.activation == ("relu" if relu else None)
    assert torch.equal(
        y, ops.conv2d(x.dequantize(), ours, plain.bias.detach(), 2, 1, 1, groups, layer.activation)
    )
    assert want.abs().max() < step * 127  # not saturated
    # fbgemm rounds the bias to its accumulator's grid too.
    slack = step * 0.5 + float(scales.max()) / 127 + 1e-5
    assert ((y - want).abs() <= slack).all()
    # Nearer than that there is nothing: the requantisation is the difference.
    assert torch.equal(
        torch.clamp(torch.round(y / step) + zero, 0, 255).sub(zero).mul(step).sub(want).abs() <= slack,
        torch.ones_like(want, dtype=torch.bool),
    )
    off = ops.Int8.from_torch(theirs, activation_scale=1 / 127, activation_zero=56)
    wrong = ops.conv2d(x.dequantize(), off, plain.bias.detach(), 2, 1, 1, groups, layer.activation)
    assert not ((wrong - want).abs() <= slack).all()  # the zero point of the padding and of every input


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("engine", ENGINES, indirect=True)
@pytest.mark.parametrize("relu", [False, True])
def test_a_static_convolution_over_sequences(engine: str, relu: bool) -> None:
    torch.manual_seed(0)
    kind = torch.ao.nn.intrinsic.quantized.ConvReLU1d if relu else torch.ao.nn.quantized.Conv1d
    theirs = kind(24, 18, 3, stride=2, padding=1)
    w, bias = torch.randn(18, 24, 3) / 8, torch.randn(18)
    qw = torch.quantize_per_tensor(w, float(w.abs().max()) / 127, 0, torch.qint8)
    theirs.set_weight_bias(qw, bias)
    theirs.scale, theirs.zero_point = 0.04, 0 if relu else 128
    x = torch.quantize_per_tensor(torch.rand(2, 24, 21) - 0.45, 1 / 127, 57, torch.quint8)
    layer = Conv1d.from_quantized(theirs, activation_scale=1 / 127, activation_zero=57)
    assert layer.activation == ("relu" if relu else None)
    assert np.array_equal(layer.packed_weight().to_quantized()[0][:, :, 0], qw.int_repr().numpy())
    plain = layer.to_module()
    assert isinstance(plain, nn.Conv1d)
    torch.testing.assert_close(plain.weight.detach(), qw.dequantize())
    want = theirs(x).dequantize()
    assert want.abs().max() < 0.04 * 127  # not saturated
    slack = 0.02 + float(qw.q_scale()) / 127 + 1e-5  # fbgemm rounds the bias to its accumulator's grid too
    assert ((layer(x.dequantize()) - want).abs() <= slack).all()


def test_a_convolution_with_scales_by_hand() -> None:
    """As an ONNX QLinearConv has them: x, w scales, input zero point; padding is the zero point's value."""
    generator = torch.Generator().manual_seed(3)
    q = torch.randint(-128, 128, (11, 5, 3, 3), dtype=torch.int8, generator=generator)
    scales, x = torch.rand(11, generator=generator) * 0.1, torch.rand(2, 5, 8, 9, generator=generator) * 4 - 1
    packed = ops.Int8.from_quantized(
        q, scales, activation_scale=0.017, activation_zero=59, activation_dtype="uint8"
    )
    u = torch.clamp(torch.round(x * (1 / torch.tensor(0.017))) + 59, 0, 255) - 59
    sums = torch.nn.functional.conv2d(u.double(), q.double(), padding=1).float()
    want = (sums * torch.tensor(0.017)) * scales[:, None, None]
    assert torch.equal(ops.conv2d(x, packed, padding=1), want)


def test_convolutions_of_torchao() -> None:
    q = torch.randint(-128, 128, (6, 4, 3, 3), dtype=torch.int8)
    w = torchao_like(q, torch.rand(6, 1, 1, 1))
    packed = ops.Int8.from_torch(w, groups=2)
    assert np.array_equal(packed.to_quantized()[0], q.numpy())
    assert packed.groups == 2


def test_modules_from_quantized_ones(plain: nn.Linear) -> None:
    """Linear too, with the layer's own bias; what is no quantized layer is refused."""
    theirs = dynamic(plain, True)
    layer = Linear.from_quantized(theirs)
    x = torch.randn(3, 101)
    assert torch.equal(layer(x), ops.linear(x, ops.Int8.from_torch(theirs), plain.bias.detach()))
    with pytest.raises(TypeError, match="module: expected a quantized Linear"):
        Linear.from_quantized(plain)
    with pytest.raises(TypeError, match="module: expected a quantized Conv2d"):
        Conv2d.from_quantized(theirs)


def test_a_quantized_tensor_and_a_module_around_it(plain: nn.Linear) -> None:
    w = torch.quantize_per_tensor(plain.weight.detach(), 0.001, 0, torch.qint8)
    packed = ops.Int8.from_torch(w)
    layer = Linear(packed, plain.bias, "relu")
    x = torch.randn(4, 101)
    assert torch.equal(layer(x), torch.relu(ops.linear(x, packed, plain.bias.detach())))
    assert torch.equal(torch.as_tensor(packed.to_dense()), w.dequantize())


def torchao_like(q: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None = None) -> torch.Tensor:
    """The attributes of torchao's Int8Tensor."""
    w = torch.zeros(q.shape, dtype=torch.bfloat16)
    for name, value in {"qdata": q, "scale": scale, "zero_point": zero}.items():
        setattr(w, name, value)
    return w


def test_tensors_of_torchao() -> None:
    q = torch.randint(-128, 128, (5, 7), dtype=torch.int8)
    for scale in (torch.rand(5, 1), torch.rand(1)):
        packed = ops.Int8.from_torch(torchao_like(q, scale, torch.zeros(5, 1, dtype=torch.int8)))
        assert torch.equal(torch.from_numpy(packed.to_quantized()[0]), q)
        assert torch.equal(torch.from_numpy(packed.to_quantized()[1]), scale.reshape(-1).expand(5))
        assert packed.dtype == "bfloat16"


def test_other_weights_are_refused(plain: nn.Linear) -> None:
    w = plain.weight.detach()
    q = torch.zeros(5, 8, dtype=torch.int8)
    for source, error, message in (
        (plain, TypeError, "source: expected a quantized layer"),
        (3, TypeError, "source: expected a quantized layer or weight, got int"),
        (torch.quantize_per_tensor(w, 0.001, 3, torch.qint8), ValueError, "zero points of 0"),
        (torch.quantize_per_tensor(w, 0.001, 0, torch.quint8), ValueError, "expected qint8"),
        (torchao_like(q, torch.rand(5, 2)), ValueError, "expected int8 with one scale an output"),
        (torchao_like(q.short(), torch.rand(5)), ValueError, "expected int8 with one scale an output"),
        (torchao_like(q, torch.rand(5), torch.ones(5)), ValueError, "zero points of 0"),
    ):
        with pytest.raises(error, match=message):
            ops.Int8.from_torch(source)


def test_scales_by_hand() -> None:
    """As an ONNX model has them: weight scales, input scale and zero point."""
    q = torch.randint(-128, 128, (11, 33), dtype=torch.int8)
    scales, x = torch.rand(11) * 0.1, torch.rand(4, 33) * 4 - 1
    packed = ops.Int8.from_quantized(
        q, scales, activation_scale=0.017, activation_zero=59, activation_dtype="uint8"
    )
    u = torch.clamp(torch.round(x * (1 / torch.tensor(0.017))) + 59, 0, 255) - 59
    want = ((u.long() @ q.long().T).float() * torch.tensor(0.017)) * scales
    assert torch.equal(ops.linear(x, packed), want)


@pytest.mark.parametrize("static", [False, True])
def test_accelerate_takes_over_what_quantize_left(monkeypatch: pytest.MonkeyPatch, static: bool) -> None:
    from _models import set_times

    set_times(monkeypatch, lambda name, m: 1.0 if m is None else 0.5)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    data = [torch.randn(16, 24) for _ in range(3)]
    pared.quantize(model, data, bits=8, **({"activations": "static"} if static else {}))
    fast = pared.accelerate(
        model, data[0], "int8", max_error=1, min_speedup=0, formats=["int8"], progress=False
    )
    for i in (0, 2):
        assert fast[i].format == "int8"
        # The very weights that quantize chose: nothing was rounded again.
        assert torch.equal(torch.as_tensor(fast[i].packed_weight().to_dense()), model[i].weight)
        assert (_core.int8_activations(fast[i].packed) is not None) == static
