"""Convolutions of 1x1 on CUDA: the linear products over pixels."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import pared
from pared._cuda_weight import Place
from pared.nn import Conv2d
from pared.ops._library import conv2d_device_op


@pytest.fixture
def place(backend, monkeypatch):
    where = Place(backend.module, 0, backend.stream)
    monkeypatch.setattr(Place, "of", classmethod(lambda cls, x: where))
    return where


def layer(format, dtype, stride=1, activation=None):
    torch.manual_seed(5)
    plain = nn.Conv2d(36, 40, 1, stride=stride).to(dtype)
    with torch.no_grad():
        plain.weight[torch.rand(40, 36, 1, 1) < 0.6] = 0
    return plain, Conv2d.from_module(plain, format=format, activation=activation)


def move(module, backend):
    """What ``module.to("cuda")`` does; the emulator's device has the CPU's memory."""
    if backend.device.type == "cuda":
        return module.to(backend.device)
    module = copy.deepcopy(module)
    module._hold(module._device_weight(backend.device))
    return module


@pytest.mark.parametrize("format", ["csr", "bsr", "int8"])
@pytest.mark.parametrize("stride", [1, 2, (2, 3)])
def test_products(backend, place, format, stride):
    dtype = torch.float32 if format == "int8" else torch.bfloat16
    plain, module = layer(format, dtype, stride, "relu")
    moved = move(module, backend)
    dense = torch.as_tensor(module.packed_weight().to_dense()).double()
    x = torch.randn(2, 36, 5, 7).to(dtype)
    want = nn.functional.conv2d(x.double(), dense, plain.bias.double(), stride)
    size = nn.functional.conv2d(x.double().abs(), dense.abs(), plain.bias.double().abs(), stride)
    # int8: half a step of each pixel's channels as well.
    step = x.abs().amax(1, keepdim=True)[:, :, :: moved.stride[0], :: moved.stride[1]] / 254
    bound = 2 * torch.finfo(torch.bfloat16 if format != "int8" else dtype).eps * size
    if format == "int8":
        bound = bound + 36 * dense.abs().max() * step + 1e-5
    for layout in (torch.channels_last, torch.contiguous_format):
        got = moved(x.contiguous(memory_format=layout).to(backend.device))
        assert got.dtype == dtype
        assert got.is_contiguous(memory_format=layout)
        assert bool(((got.cpu().double() - want.relu()).abs() <= bound).all())
        single = moved(x.contiguous(memory_format=layout).to(backend.device)[0])
        assert torch.equal(single.cpu(), got[0].cpu())


def test_a_channels_last_image_is_not_copied(backend, place, monkeypatch):
    _, module = layer("csr", torch.float32)
    moved = move(module, backend)
    x = torch.randn(2, 36, 4, 4, device=backend.device).contiguous(memory_format=torch.channels_last)
    seen = []
    weight = moved._on_device
    product = type(weight).linear
    monkeypatch.setattr(
        type(weight), "linear", lambda self, x, *rest: seen.append(x.data_ptr()) or product(self, x, *rest)
    )
    moved(x)
    assert seen == [x.data_ptr()]


@pytest.mark.parametrize(
    ("format", "dtype"), [("csr", torch.float32), ("int8", torch.float32), ("bsr", torch.half)]
)
def test_tracers_see_an_operator(backend, place, format, dtype):
    torch._dynamo.reset()  # what was compiled for other layers counts against the limit of this one
    moved = move(layer(format, dtype, (2, 1), "relu")[1], backend)
    x = torch.randn(2, 36, 5, 4).to(dtype).to(backend.device)
    for image in (x, x.contiguous(memory_format=torch.channels_last), x[0]):
        want = moved(image)
        compiled = torch.compile(nn.Sequential(moved), fullgraph=True, backend="aot_eager", dynamic=False)
        got = compiled(image)
        assert torch.equal(got, want)
        assert got.stride() == want.stride()
    exported = torch.export.export(nn.Sequential(moved), (x,))
    assert [n.target for n in exported.graph.nodes if n.op == "call_function"] == [conv2d_device_op]
    assert torch.equal(exported.module()(x), moved(x))
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    assert torch.equal(torch.export.load(file).module()(x), moved(x))


@pytest.mark.parametrize("stride", [(1, 1), (2, 3)])
def test_opcheck(backend, place, stride):
    moved = move(layer("csr", torch.float32, stride)[1], backend)
    for shape in ((2, 36, 5, 7), (1, 36, 1, 1), (0, 36, 5, 7), (36, 4, 4)):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            if len(shape) == 3 and memory_format is torch.channels_last:
                continue
            x = torch.randn(shape).to(backend.device).contiguous(memory_format=memory_format)
            args = (x, moved._device_tensors, moved.bias, 40, list(stride), moved._device_layout, "gelu")
            torch.library.opcheck(conv2d_device_op, args)


@pytest.mark.parametrize("channels", [1, 36])
def test_outputs_lie_as_the_cpus_do(backend, place, channels):
    """Also where an image is channels-last and planes at once: one channel, or one pixel."""
    torch.manual_seed(3)
    for outputs in (1, 40):
        module = Conv2d.from_module(nn.Conv2d(channels, outputs, 1), format="csr")
        moved = move(module, backend)
        for shape in ((2, channels, 5, 7), (2, channels, 1, 1), (1, channels, 1, 7), (2, channels, 5, 1)):
            for layout in (torch.contiguous_format, torch.channels_last):
                x = torch.randn(shape).contiguous(memory_format=layout)
                on = x.to(backend.device, memory_format=torch.preserve_format)
                for cut in (slice(None), slice(0, 3)):
                    got, want = moved(on[..., cut]), module(x[..., cut])
                    assert got.stride() == want.stride(), (shape, layout, cut)
                    torch.testing.assert_close(got.cpu(), want, rtol=1e-5, atol=1e-5)
                args = (on, moved._device_tensors, moved.bias, outputs, [1, 1], moved._device_layout, "")
                torch.library.opcheck(conv2d_device_op, args)


def test_8_bits_have_a_scale_a_pixel(backend, place):
    """As documented: the CPU has one for an image, so that its dark pixels lose more."""
    _, module = layer("int8", torch.float32)
    moved = move(module, backend)
    x = torch.randn(1, 36, 4, 4)
    x[..., 0, 0] *= 100
    dense = torch.as_tensor(module.packed_weight().to_dense())
    want = nn.functional.conv2d(x.double(), dense.double(), module.bias.double())
    on_device, on_cpu = (
        (y.cpu().double() - want).abs()[..., 1:, 1:].max() for y in (moved(x.to(backend.device)), module(x))
    )
    assert on_device < 0.1 * on_cpu


def test_state_dicts_load_on_the_device(backend, place):
    _, module = layer("csr", torch.float32)
    moved = move(module, backend)
    other = copy.deepcopy(module)
    with torch.no_grad():
        plain = pared.restore(nn.Sequential(other))[0]
        plain.weight.mul_(2)
    moved.load_state_dict(Conv2d.from_module(plain, format="csr").state_dict())
    x = torch.randn(1, 36, 3, 3)
    torch.testing.assert_close(moved(x.to(backend.device)).cpu(), plain(x), rtol=1e-5, atol=1e-5)


def test_other_geometries_say_what_was_expected():
    for options, text in [
        ({"kernel_size": 3}, "kernel 3x3, padding"),
        ({"kernel_size": 1, "padding": 1}, r"kernel 1x1, padding \(1, 1, 1, 1\), 1 group"),
        ({"kernel_size": 1, "groups": 2}, r"2 group\(s\)"),
    ]:
        module = Conv2d.from_module(nn.Conv2d(4, 8, **options), format="csr")
        with pytest.raises(RuntimeError, match=r"Conv2d has no csr kernel .*kernel 1x1, without.*" + text):
            module._moved(torch.device("cuda"))
        assert module._on_device is None


def test_an_image_on_another_device(backend, place):
    _, module = layer("csr", torch.float32)
    moved = move(module, backend)
    moved(torch.zeros(1, 36, 2, 2, device=backend.device))
    with pytest.raises(ValueError, match="x: expected a tensor on "):
        moved(torch.zeros(1, 36, 2, 2, device="meta"))
