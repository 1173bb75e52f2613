"""The operators behind torch.compile, torch.export and other tracers."""

from __future__ import annotations

import pytest
import torch
from _models import sparse_conv, sparse_linear
from torch import nn
from torch.library import opcheck

from pared import ops
from pared.nn import Conv2d, Linear
from pared.ops._formats import FORMATS
from pared.ops._library import aligned, conv2d_op, layer_norm_op, linear_op


@pytest.fixture
def module() -> Linear:
    return Linear.from_module(sparse_linear(16, 24), activation="relu")


@pytest.mark.parametrize("shape", [(16,), (3, 16), (2, 5, 16), (0, 16)])
@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(module: Linear, shape: tuple[int, ...], bias: bool) -> None:
    args = (torch.randn(shape), module.packed, module.bias if bias else None, 24, "gelu")
    assert set(opcheck(linear_op, args).values()) == {"SUCCESS"}


def test_opcheck_of_strided_and_16_bit_inputs(module: Linear) -> None:
    for x in (
        torch.randn(5, 3, 16).transpose(0, 1),
        torch.randn(3, 32)[:, ::2],
        torch.randn(3, 16).bfloat16(),
    ):
        assert set(opcheck(linear_op, (x, module.packed, module.bias, 24, "")).values()) == {"SUCCESS"}


def test_the_operator_equals_the_module(module: Linear) -> None:
    x = torch.randn(3, 16)
    assert torch.equal(linear_op(x, module.packed, module.bias, 24, "relu"), module(x))


def test_the_operator_aligns_a_shifted_weight(module: Linear) -> None:
    n = module.packed.numel()
    shifted = torch.empty(n + 64, dtype=torch.uint8)[1 : n + 1].copy_(module.packed)
    x = torch.randn(3, 16)
    assert torch.equal(linear_op(x, shifted, module.bias, 24, "relu"), module(x))


def test_the_operator_refuses(module: Linear) -> None:
    x = torch.randn(3, 16)
    with pytest.raises(ValueError, match="packed: expected a packed weight of format csr"):
        linear_op(x, torch.zeros(256, dtype=torch.uint8), None, 24, "")
    with pytest.raises(ValueError, match="packed: expected a packed weight"):
        linear_op(x, torch.zeros(3, dtype=torch.uint8), None, 24, "")
    with pytest.raises(ValueError, match="out: expected shape"):
        linear_op(x, module.packed, None, 25, "")
    with pytest.raises(ValueError, match="activation: expected one of"):
        linear_op(x, module.packed, None, 24, "softmax")
    with pytest.raises(RuntimeError, match="pared::linear: expected an input that needs no gradient"):
        linear_op(x.requires_grad_(), module.packed, None, 24, "")


@pytest.mark.parametrize("name", FORMATS)
def test_objects_refuse_a_tensor_between_two_boundaries(name: str) -> None:
    weight = FORMATS[name].weight
    good = torch.as_tensor(weight.from_dense(torch.randn(20, 64)).packed)
    view = torch.zeros(good.numel() + 1, dtype=torch.uint8)[1:]
    view.copy_(good)
    with pytest.raises(ValueError, match="expected 64-byte aligned memory, got an address 1 bytes past"):
        weight(view)
    weight(aligned(view))


def test_the_operator_checks_a_weight_that_was_written_to(module: Linear) -> None:
    x, packed = torch.randn(3, 16), module.packed.clone()
    y = linear_op(x, packed, None, 24, "")
    assert torch.equal(linear_op(x, packed, None, 24, ""), y)
    packed[-100] ^= 1
    with pytest.raises(ValueError, match="packed weight: expected checksum"):
        linear_op(x, packed, None, 24, "")
    packed[-100] ^= 1
    assert torch.equal(linear_op(x, packed, None, 24, ""), y)
    # Another tensor in the same memory is another weight.
    damaged = packed.clone()
    damaged[-100] ^= 1
    pointer, values = packed.data_ptr(), damaged.numpy().copy()
    other = torch.from_numpy(packed.numpy())
    assert other.data_ptr() == pointer
    packed.numpy()[:] = values
    with pytest.raises(ValueError, match="packed weight: expected checksum"):
        linear_op(x, other, None, 24, "")


def test_the_operator_refuses_a_bias_that_needs_a_gradient(module: Linear) -> None:
    bias = module.bias.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="needs no gradient"):
        linear_op(torch.randn(3, 16), module.packed, bias, 24, "")


def net() -> nn.Module:
    return (
        nn.Sequential(
            Linear.from_module(sparse_linear(16, 24), activation="gelu"),
            nn.LayerNorm(24),
            Linear.from_module(sparse_linear(24, 8)),
        )
        .eval()
        .requires_grad_(False)
    )


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_full_graph(dynamic: bool) -> None:
    model = net()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    with torch.no_grad():
        for n in (4, 7):
            x = torch.randn(n, 16)
            torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_compile_with_inductor() -> None:
    model = net()
    x = torch.randn(4, 16)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x))


def test_compile_where_the_model_looks_at_the_weights_dtype() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = Linear.from_module(sparse_linear(16, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x.to(self.fc.weight.dtype))

    model, x = Model(), torch.randn(4, 16)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool) -> None:
    model = net()
    x = torch.randn(4, 16)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},), strict=strict)
    assert "torch.ops.pared.linear.default" in program.graph_module.code
    with torch.no_grad():
        for n in (4, 9):
            x = torch.randn(n, 16)
            torch.testing.assert_close(program.module()(x), model(x))


def test_symbolic_trace() -> None:
    model = net()
    traced = torch.fx.symbolic_trace(model)
    x = torch.randn(4, 16)
    with torch.no_grad():
        assert torch.equal(traced(x), model(x))


def test_fake_tensors() -> None:
    module = Linear.from_module(sparse_linear(16, 24))
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        y = module(torch.empty(3, 5, 16, dtype=torch.bfloat16))
    assert (y.shape, y.dtype) == ((3, 5, 24), torch.bfloat16)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_conv_opcheck(layout: torch.memory_format) -> None:
    m = Conv2d.from_module(sparse_conv(4, 8, 3, groups=2))
    for x in (
        torch.randn(2, 4, 7, 9).to(memory_format=layout),
        torch.randn(2, 4, 7, 9).to(memory_format=layout)[:, :, ::2],
    ):
        args = (x, m.packed, m.bias, 8, (3, 3), (2, 1), (1, 1, 0, 2), (1, 2), "silu")
        assert set(opcheck(conv2d_op, args).values()) == {"SUCCESS"}
        plain = conv2d_op(*args[:-1], "")
        for residual in (torch.randn_like(plain), torch.randn(plain.shape).to(memory_format=layout)):
            added = (*args[:-1], "relu", residual)
            assert set(opcheck(conv2d_op, added).values()) == {"SUCCESS"}
            assert torch.equal(conv2d_op(*added), torch.relu(plain + residual))


def test_layer_norm_opcheck() -> None:
    w, b = torch.randn(24), torch.randn(24)
    for x in (torch.randn(2, 5, 24), torch.randn(24, 5).T, torch.randn(3, 48, dtype=torch.bfloat16)[:, ::2]):
        for residual in (None, torch.randn(x.shape).to(x.dtype)):
            args = (x, residual, w, b, 1e-5)
            assert set(opcheck(layer_norm_op, args).values()) == {"SUCCESS"}
            whole = None if residual is None else residual.contiguous()
            assert torch.equal(layer_norm_op(*args), ops.layer_norm(x.contiguous(), w, b, 1e-5, whole))


def conv_net() -> nn.Module:
    return nn.Sequential(
        Conv2d.from_module(sparse_conv(3, 8, 3, padding=1), activation="relu"),
        nn.MaxPool2d(2),
        Conv2d.from_module(sparse_conv(8, 4, 3, padding=1, padding_mode="reflect")),
    ).eval()


def test_conv_compiles_exports_and_traces() -> None:
    model = conv_net()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    x = torch.randn(2, 3, 8, 8)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},), strict=False)
    assert "torch.ops.pared.conv2d.default" in program.graph_module.code
    traced = torch.fx.symbolic_trace(model)
    for x in (torch.randn(3, 3, 8, 8), torch.randn(5, 3, 8, 8).to(memory_format=torch.channels_last)):
        for other in (compiled, program.module(), traced):
            torch.testing.assert_close(other(x), model(x))
    torch.testing.assert_close(compiled(torch.randn(3, 3, 12, 10)).shape, torch.Size([3, 4, 6, 5]))
