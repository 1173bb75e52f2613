"""Linear layers of one input on a CUDA device: one launch for one token, a call a layer for anything else."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import pared
from pared._cuda_weight import Place
from pared._size import memory_bytes
from pared._target import LayerCall
from pared.nn import Linear

FORMATS = {
    "csr": torch.float32,
    "int8": torch.float32,
    "bitmap": torch.float16,
    "bitmap8": torch.bfloat16,
    "int8wo": torch.bfloat16,
}
every_format = pytest.mark.parametrize("format", FORMATS)
SIZES = (128, 64, 37)  # bitmaps: multiples of 64 but for the last


@pytest.fixture(autouse=True)
def place(backend, monkeypatch):
    where = Place(backend.module, 0, backend.stream)
    monkeypatch.setattr(Place, "of", classmethod(lambda cls, x: where))
    return where


def layers(format, sizes=SIZES, inputs=100, activation=None, zeros=0.6):
    torch.manual_seed(5)
    made = []
    for i, n in enumerate(sizes):
        plain = nn.Linear(inputs, n, bias=i != 1).to(FORMATS[format])
        with torch.no_grad():
            plain.weight[torch.rand(n, inputs) < zeros] = 0
        made.append(Linear.from_module(plain, format=format, activation=activation))
    return made


def move(modules, backend):
    for m in modules:
        if backend.device.type == "cuda":
            m.to(backend.device)
        else:
            m._hold(m.packed_weight().to(backend.device))
    return modules


def ones(x, modules):
    """The outputs of the layers, each by itself."""
    return [m._on_device.linear(x, m.bias, m.activation) for m in modules]


def close(got, want):
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        # Sums of another order, rounded to the output's dtype.
        eps = max(torch.finfo(b.dtype).eps, 2.0**-18)
        torch.testing.assert_close(a, b, rtol=2 * eps, atol=2 * eps)


def launches(backend, call):
    """The kernels that a call launches, where they can be counted."""
    if backend.device.type == "cuda":
        return call(), None
    backend.module.take_launched()
    y = call()
    return y, backend.module.take_launched()


@every_format
@pytest.mark.parametrize("first", ["share", "move"])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_one_launch_for_one_token(backend, format, first, activation):
    these = layers(format, activation=activation)
    if first == "share":  # as a file that was loaded and then moved
        these[0].share_with(*these[1:])
    move(these, backend)
    alone = copy.deepcopy(these)
    alone[0].share_with()
    if first == "move":
        these[0].share_with(*these[1:])
    assert these[0]._joint is not None
    x = torch.randn(1, 100).to(FORMATS[format]).to(backend.device)
    want, apart = launches(backend, lambda: [m(x) for m in alone])
    got, together = launches(backend, lambda: [m(x) for m in these])
    close(got, want)
    close(ones(x, these), want)  # parts of the joint weight, by themselves
    if apart is not None:
        assert sum(apart.values()) == 3 * sum(together.values())
    assert not vars(x)
    for tokens in (2, 40, 100):  # more than one token, and the dense way
        x = torch.randn(tokens, 100).to(FORMATS[format]).to(backend.device)
        got, want = [m(x) for m in these], ones(x, these)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        assert all(a.is_contiguous() for a in got)


@every_format
def test_one_copy_of_the_weights(backend, format):
    these = move(layers(format), backend)
    each, model = sum(m._on_device.nbytes for m in these), nn.ModuleList(these)
    before = memory_bytes(model)
    these[0].share_with(*these[1:])
    assert memory_bytes(model) <= before + 256
    joint = these[0]._joint.weight
    assert joint.nbytes <= each + 256
    pointers = {t.untyped_storage().data_ptr() for t in joint.parts()[1]}
    for m in these:
        largest = max(m._on_device.parts()[1], key=lambda t: t.numel() * t.element_size())
        assert largest.untyped_storage().data_ptr() in pointers
    with torch.no_grad():
        these[0](torch.randn(1, 100).to(FORMATS[format]).to(backend.device))


@every_format
def test_what_changes_is_seen(backend, format):
    these = move(layers(format), backend)
    these[0].share_with(*these[1:])
    dtype = FORMATS[format]
    x = torch.randn(1, 100).to(dtype).to(backend.device)
    these[0](x)
    with torch.no_grad():
        these[0].bias.add_(1.0)
    close([m(x) for m in these], ones(x, these))  # the others were computed with what had not changed
    x.mul_(2)
    close([m(x) for m in these], ones(x, these))
    these[0](x)
    x.add_(1)
    close([these[2](x), these[1](x)], ones(x, (these[2], these[1])))
    # Another weight for one of them: joined again, or not at all.
    other = layers(format, zeros=0.3)[1]
    these[1].load_state_dict({**other.state_dict(), "packed": other.packed})
    move([these[1]], backend)
    want = move([copy.deepcopy(other)], backend)[0]
    got = [m(x) for m in these]
    close(got[1:2], ones(x, [want]))
    close(got, ones(x, these))
    these[0].share_with()
    assert these[0]._joint is None
    close([m(x) for m in these], ones(x, these))


def test_copies_and_pickles(backend):
    these = move(layers("bitmap"), backend)
    these[0].share_with(*these[1:])
    x = torch.randn(1, 100).half().to(backend.device)
    want = [m(x) for m in these]
    for copied in (copy.deepcopy(these), pickle.loads(pickle.dumps(these))):
        if backend.device.type == "cpu":  # the emulator's device is not one that a pickle goes back to
            move(copied, backend)
        assert copied[0]._joint is not None
        assert copied[0]._joint.holds(copied)
        assert all(torch.equal(a, b) for a, b in zip([m(x) for m in copied], want, strict=True))


def test_a_copy_of_one_layer_leaves_the_others_together(backend):
    these = move(layers("bitmap"), backend)
    these[0].share_with(*these[1:])
    x = torch.randn(1, 100).half().to(backend.device)
    for m in (these[0], these[2]):
        call = LayerCall(m, x, []).copy()  # as it is timed with weights beyond the cache
        assert these[0]._joint.holds(these)
        close([call()], ones(x, [m]))
        assert not vars(x)


@pytest.mark.parametrize(
    "why", ["activation", "format", "blocks of 64", "range of the input", "one on the CPU"]
)
def test_what_does_not_go_together_is_computed_alone(backend, why):
    format = "int8" if why == "range of the input" else "bitmap"
    these = layers(format, sizes=(100, 64, 64) if why == "blocks of 64" else SIZES)
    dtype = FORMATS[format]
    if why == "activation":
        these[1] = Linear(these[1].packed_weight(), None, "relu")
    if why == "format":  # both are bitmaps in a file; on the device one stores pairs
        these[1] = layers("bitmap", zeros=0.95)[1]
    if why == "range of the input":
        q, scales = these[1].packed_weight().to_quantized()
        these[1] = Linear(pared.ops.Int8.from_parts(q, scales, "float32", (0.05, 128, 1, 255)), None)
    these[0].share_with(*these[1:])
    move(these[:2] if why == "one on the CPU" else these, backend)
    assert these[0]._joint is None
    x = torch.randn(1, 100).to(dtype).to(backend.device)
    moved = [m for m in these if m._on_device is not None]
    assert len(moved) == (2 if why == "one on the CPU" else 3)
    got = [m(x) for m in moved]
    assert all(torch.equal(a, b) for a, b in zip(got, ones(x, moved), strict=True))


def test_inference_tensors_and_gradients(backend):
    these = move(layers("csr"), backend)
    these[0].share_with(*these[1:])
    with torch.inference_mode():
        x = torch.randn(1, 100).to(backend.device)
        got = [m(x) for m in these]
        assert not vars(x)
    close(got, ones(x.clone(), these))
    with pytest.raises(RuntimeError, match="gradient"):
        these[0](torch.randn(1, 100, device=backend.device, requires_grad=True))


def test_another_stream_does_not_take_what_was_computed(backend, monkeypatch):
    these = move(layers("csr"), backend)
    these[0].share_with(*these[1:])
    x = torch.randn(1, 100, device=backend.device)
    these[0](x)
    left = next(iter(x.__dict__["_pared_shared"].values()))[-1]
    place = pared._cuda.place_of(x)
    monkeypatch.setattr("pared._cuda.place_of", lambda x: place._replace(stream=place.stream + 1))
    got = these[1](x)
    assert got.data_ptr() != left.data_ptr()
    close([got], ones(x, [these[1]]))
