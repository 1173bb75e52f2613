"""Packed weights and layers on a CUDA device, through the public functions."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import pared
from pared._cuda_weight import Place
from pared.nn import Conv2d, Linear
from pared.ops._device import DeviceWeight
from pared.ops._library import linear_device_op


@pytest.fixture
def place(backend, monkeypatch):
    """Every call takes the backend's kernels, wherever its tensors are."""
    where = Place(backend.module, 0, backend.stream)
    monkeypatch.setattr(Place, "of", classmethod(lambda cls, x: where))
    return where


def layer(format, dtype=torch.float32, activation=None):
    torch.manual_seed(7)
    plain = nn.Linear(70, 33).to(dtype)
    with torch.no_grad():
        plain.weight[torch.rand(33, 70) < 0.6] = 0
    return Linear.from_module(plain, format=format, activation=activation)


def move(module, backend):
    """What ``module.to("cuda")`` does; the emulator's device has the CPU's memory."""
    if backend.device.type == "cuda":
        return module.to(backend.device)
    module._hold(module.packed_weight().to(backend.device))
    return module


def test_int8_gives_the_bits_of_the_cpu(backend, place):
    module = layer("int8")
    x = torch.randn(2, 5, 70)
    want = module(x)
    moved = move(copy.deepcopy(module), backend)
    got = moved(x.to(backend.device))
    assert got.device == backend.device
    assert torch.equal(got.cpu(), want)
    assert torch.equal(moved(x.transpose(0, 1).to(backend.device)).cpu(), module(x.transpose(0, 1)))
    w = module.packed_weight()
    bias = module.bias.to(backend.device)
    assert torch.equal(pared.ops.linear(x.to(backend.device), w.to(backend.device), bias).cpu(), want)


@pytest.mark.parametrize("format", ["bitmap", "bitmap8", "int8wo"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_for_few_tokens(backend, place, format, dtype):
    module = layer(format, dtype)
    dense = module.packed_weight().to_dense().double()
    moved = move(module, backend)
    for tokens in (1, 32, 50, 70):
        x = torch.randn(tokens, 70).to(dtype)
        want = x.double() @ dense.T + module.bias.cpu().double()
        # The output's rounding, and that of to_dense's 8-bit weights to `dtype`.
        bound = 2 * torch.finfo(dtype).eps * (x.double().abs() @ dense.abs().T + 1)
        assert bool(((moved(x.to(backend.device)).cpu().double() - want).abs() <= bound).all())


def test_blocks(backend, place):
    module = block_layer("bsr")
    plain = module.to_module()
    weight = module.packed_weight()
    moved = move(module, backend)
    assert moved._on_device.block == (64, 64)
    assert weight.to(backend.device, torch.float16, (32, 64)).block == (32, 64)
    x = torch.randn(5, 128).bfloat16()
    want = plain(x).double()
    bound = torch.finfo(x.dtype).eps * (x.double().abs() @ plain.weight.double().abs().T + 1)
    assert bool(((moved(x.to(backend.device)).cpu().double() - want).abs() <= bound).all())


def block_layer(format):
    torch.manual_seed(3)
    plain = nn.Linear(128, 192).to(torch.bfloat16)
    with torch.no_grad():
        plain.weight *= (torch.rand(3, 2) < 0.6).kron(torch.ones(64, 64))
    return Linear.from_module(plain, format=format)


def test_blocks_of_8_bits(backend, place):
    module = block_layer("bsr8")
    x = torch.randn(5, 128).bfloat16()
    want = module(x)
    moved = move(module, backend)
    assert moved._on_device.block == (64, 64)
    assert torch.equal(moved(x.to(backend.device)).cpu(), want)  # the same integers, the same roundings


TRACED = [
    ("int8", torch.float32),
    ("bitmap", torch.float16),
    ("bitmap8", torch.bfloat16),
    ("int8wo", torch.half),
]


def traced_layer(format, dtype):
    return block_layer(format) if format.startswith("bsr") else layer(format, dtype, "relu")


@pytest.mark.parametrize(("format", "dtype"), [*TRACED, ("bsr", torch.bfloat16), ("bsr8", torch.bfloat16)])
def test_tracers_see_an_operator(backend, place, format, dtype):
    module = move(traced_layer(format, dtype), backend)
    columns = module.in_features
    x = torch.randn(3, columns).to(dtype).to(backend.device)
    want = module(x)
    compiled = torch.compile(nn.Sequential(module), fullgraph=True, backend="aot_eager", dynamic=False)
    assert torch.equal(compiled(x), want)
    exported = torch.export.export(nn.Sequential(module), (x,))
    assert [n.target for n in exported.graph.nodes if n.op == "call_function"] == [linear_device_op]
    assert torch.equal(exported.module()(x), want)
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    assert torch.equal(torch.export.load(file).module()(x), want)


@pytest.mark.parametrize(("format", "dtype"), [TRACED[0], TRACED[1], ("bsr", torch.bfloat16)])
def test_opcheck(backend, place, format, dtype):
    module = move(traced_layer(format, dtype), backend)
    for shape in ((3, module.in_features), (0, module.in_features), (2, 2, module.in_features)):
        x = torch.randn(shape).to(dtype).to(backend.device)
        args = (x, module._device_tensors, module.bias, module.out_features, module._device_layout, "gelu")
        torch.library.opcheck(linear_device_op, args)


def test_parts_put_together_again(backend, place):
    weight = move(layer("bitmap", torch.float16), backend)._on_device
    layout, tensors = weight.parts()
    again = DeviceWeight.from_parts(layout, tensors)
    assert again.parts()[0] == layout
    x = torch.randn(2, 70).half().to(backend.device)
    assert torch.equal(again.linear(x), weight.linear(x))
    assert weight.nbytes == sum(t.nbytes for t in tensors)
    with pytest.raises(ValueError, match="weight: expected 2 tensors, got 1"):
        DeviceWeight.from_parts(layout, tensors[:1])
    for bad in (
        "",
        "[]",
        layout.replace("DecodeWeight", "Format"),
        layout.replace("few_tokens", "few"),
        layout.replace('"decode"', '"no.such"'),
        layout.replace('"decode"', '"nothing"'),
    ):
        with pytest.raises(ValueError, match="layout: expected the description of a weight on a device"):
            DeviceWeight.from_parts(bad, tensors)


def test_the_state_dict_is_that_of_the_cpu_and_loads(backend, place):
    module, other = layer("int8"), layer("int8")
    with torch.no_grad():
        plain = nn.Linear(70, 33)
    other = Linear.from_module(plain, format="int8")
    moved = move(copy.deepcopy(module), backend)
    state = moved.state_dict()
    assert torch.equal(state["packed"], module.packed)
    assert state["packed"].device.type == "cpu"
    moved.load_state_dict(other.state_dict())
    x = torch.randn(3, 70)
    assert torch.equal(moved(x.to(backend.device)).cpu(), other(x))
    again = copy.deepcopy(moved)
    assert torch.equal(again(x.to(backend.device)).cpu(), other(x))
    restored = pared.restore(nn.Sequential(again))[0]
    assert restored.weight.device == backend.device
    again.to("cpu")
    assert again._on_device is None
    assert torch.equal(again(x), other(x))


class Twins(nn.Module):
    """Two layers of one input, and one behind them."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(70, 33), nn.Linear(70, 33), nn.Linear(33, 20)

    def forward(self, x):
        return self.c(self.a(x) + self.b(x))


@pytest.mark.parametrize(("format", "precision"), [("int8", "int8"), ("csr", "float32"), ("bsr8", "int8")])
def test_from_a_cpu_file_to_the_device_and_back(backend, place, tmp_path, format, precision):
    torch.manual_seed(7)
    plain, x = Twins().eval(), torch.randn(5, 70)
    with torch.no_grad():
        for layer in plain.children():
            layer.weight[torch.rand(layer.weight.shape) < 0.7] = 0
    on_cpu = pared.accelerate(plain, x, precision, formats=[format], min_speedup=0.0, cache=False)
    pared.save(on_cpu, tmp_path / "model.pared")
    want = on_cpu(x)
    for source in (pared.load(tmp_path / "model.pared", Twins()), copy.deepcopy(on_cpu)):
        moved = place_model(source, backend)
        assert all(m._on_device is not None for m in layers_of(moved))
        got = moved(x.to(backend.device)).cpu()
        if format == "int8":
            assert torch.equal(got, want)
        else:  # other orders of the sums; other roundings behind the integers of blocks
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        pared.save(moved, tmp_path / "again.pared")
        again = pared.load(tmp_path / "again.pared", Twins())
        assert torch.equal(again(x), want)
        assert torch.equal(moved.to("cpu")(x), want)
        assert not any(m._on_device is not None for m in layers_of(moved))


def layers_of(model):
    return [m for m in model.modules() if isinstance(m, Linear)]


def place_model(model, backend):
    if backend.device.type == "cuda":
        return model.to(backend.device)
    for m in layers_of(model):
        move(m, backend)
    return model


@pytest.mark.parametrize("link", ["hand_to", "share_with"])
def test_linked_layers_move(backend, place, link):
    """What runs in one call on the CPU is a call a layer on a device."""
    torch.manual_seed(7)
    format = "int8" if link == "hand_to" else "bsr8"
    first = Linear.from_module(nn.Linear(70, 40), format=format)
    second = Linear.from_module(nn.Linear(40 if link == "hand_to" else 70, 33), format=format)
    getattr(first, link)(second)
    x = torch.randn(4, 70)

    def run(x):
        y = first(x)
        return [second(y)] if link == "hand_to" else [y, second(x)]

    want = run(x)
    move(first, backend)
    move(second, backend)
    for got, expected in zip(run(x.to(backend.device)), want, strict=True):
        torch.testing.assert_close(got.cpu(), expected, rtol=1e-5, atol=1e-5)


def test_gradients_are_refused(backend, place):
    moved = move(layer("int8"), backend)
    x = torch.randn(3, 70, device=backend.device)
    moved(x)
    with pytest.raises(RuntimeError, match="gradient"):
        moved(x.requires_grad_())


def test_formats_without_a_kernel_stay_where_they_are():
    cuda = torch.device("cuda")
    bitmap = layer("bitmap")
    for module, text in [
        (
            layer("dense"),
            r"Linear has no dense kernel for cuda \(device: expected cpu for Dense weights",
        ),
        (bitmap, r"Linear has no bitmap kernel for cuda \(dtype: expected a linear weight in float16 or"),
        (Conv2d.from_module(nn.Conv2d(3, 4, 3)), "Conv2d has no csr kernel for cuda"),
    ]:
        with pytest.raises(RuntimeError, match="device: " + text + ".*pared.restore"):
            module._moved(cuda)
        assert module._on_device is None
    assert bitmap.packed_weight().to("cpu", torch.bfloat16).dtype == torch.bfloat16
    static = pared.ops.Bitmap8.from_dense(torch.randn(4, 8).half(), activation_scale=0.1)
    with pytest.raises(ValueError, match="does not quantize its input"):
        static.to("cuda")
    with pytest.raises(ValueError, match=r"expected a linear weight for cuda, got one of shape"):
        pared.ops.Int8.from_dense(torch.randn(4, 3, 2, 2)).to("cuda")
