"""2:4 weights through torch's cuSPARSELt: what is refused, -0.0, padding, and the choice, with a stand-in for
the library; the library itself where there is a GPU that has it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import pared
from pared import _cuda_two_four
from pared._cuda_two_four import DeviceTwoFour, follows_two_four, unavailable
from pared._target import Cuda


def two_four(outputs, inputs, dtype=torch.float16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(outputs, inputs // 4, 4, generator=generator)
    order = torch.rand(outputs, inputs // 4, 4, generator=generator).argsort(-1)
    return w.masked_fill(order < 2, 0.0).reshape(outputs, inputs).to(dtype)


@pytest.fixture
def library(monkeypatch):
    """A cuSPARSELt that looks at bits, as the real one does, and keeps the first two of four."""
    asked = []

    def compress(w):
        assert w.is_contiguous()
        groups = w.view(w.shape[0], -1, 4)
        bits = groups.view(torch.int16) != 0
        kept = bits & (bits.cumsum(-1) <= 2)
        return (groups * kept).reshape(w.shape)

    def product(compressed, x_t, bias=None, transpose_result=False, alg_id=0):
        assert transpose_result
        assert x_t.shape[1] % 8 == 0
        assert x_t.t().is_contiguous()
        asked.append(alg_id)
        y = x_t.t() @ compressed.t()
        return y if bias is None else y + bias

    monkeypatch.setattr(torch, "_cslt_compress", compress)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", product)
    monkeypatch.setattr(torch, "_cslt_sparse_mm_search", lambda *a, **k: 7)
    before = _cuda_two_four.unavailable

    def on_cpu(weight):
        reason = before(weight)
        return None if reason and "on a CUDA device" in reason else reason

    monkeypatch.setattr(_cuda_two_four, "unavailable", on_cpu)
    return asked


def test_what_follows_two_four():
    w = two_four(32, 64)
    assert follows_two_four(w)
    assert follows_two_four(torch.zeros(4, 8))
    assert follows_two_four(torch.where(w == 0, -0.0, w))
    more = w.clone()
    more[3, 8:11] = 1
    assert not follows_two_four(more)
    assert not follows_two_four(w.t())  # along the inputs alone
    shifted = torch.zeros(1, 8)
    shifted[0, 2:6] = 1
    assert follows_two_four(shifted)
    shifted[0, 1:5] = 1
    assert not follows_two_four(shifted)
    assert not follows_two_four(torch.zeros(4, 6))


def test_what_is_refused():
    for weight, text in [
        (two_four(32, 64).float(), "expected dtype float16 or bfloat16, got torch.float32"),
        (two_four(32, 64)[:30], "multiples of 16, got [30, 64]"),
        (torch.ones(32, 64).half(), "at most two non-zeros in every four inputs"),
        (torch.ones(64).half(), "a linear weight"),
        (two_four(32, 64), "expected a weight on a CUDA device, got one on cpu"),
    ]:
        assert text in str(unavailable(weight))
        with pytest.raises(ValueError, match=r"^weight: "):
            DeviceTwoFour.from_dense(weight)


def test_negative_zeros_do_not_push_values_out(library):
    dense = torch.tensor([-0.0, 2.0, -0.0, 3.0]).repeat(16, 8).half()
    w = DeviceTwoFour.from_dense(dense)
    assert torch.equal(w.compressed, dense + 0.0)
    # What happens without: the stand-in keeps the two zeros.
    assert not torch.equal(torch._cslt_compress(dense), dense + 0.0)


@pytest.mark.parametrize("tokens", [0, 1, 8, 13])
def test_any_number_of_tokens(library, tokens):
    dense = two_four(32, 64)
    w = DeviceTwoFour.from_dense(dense).tuned(tokens)
    x, bias = torch.randn(tokens, 2, 64).half(), torch.randn(32)
    got = w.linear(x, bias, "relu")
    assert got.shape == (tokens, 2, 32)
    want = torch.relu(nn.functional.linear(x.double(), dense.double(), bias.double()))
    torch.testing.assert_close(got.double(), want, rtol=1e-2, atol=1e-2)
    assert set(library) <= {7}


def test_views_of_rows(library):
    dense = two_four(32, 64)
    x = torch.randn(8, 80).half()
    got = DeviceTwoFour.from_dense(dense).linear(x[:, 3:67])
    torch.testing.assert_close(got, nn.functional.linear(x[:, 3:67], dense), rtol=1e-2, atol=1e-2)


class Clock:
    """Seconds by what a call asks of the library."""

    def __init__(self, asked, seconds):
        self.asked, self.seconds = asked, seconds

    def prepare(self, call, copies, graph):
        self.asked.clear()
        call(0)
        took = self.seconds if self.asked else 1.0
        return lambda: took


class Device(Cuda):
    def properties(self):
        return {"name": "Fake GPU", "capability": [9, 0], "l2": 1 << 16}


@pytest.fixture
def accelerate(library, emulated, monkeypatch):
    """`pared.accelerate` for a device with the stand-in, where a 2:4 product takes these seconds."""
    monkeypatch.setattr("pared._cuda._emulated", emulated)
    monkeypatch.setattr("pared._target.unavailable", _cuda_two_four.unavailable)

    def run(model, x, seconds, **options):
        target = Device(torch.device("cpu"), 1 << 20, Clock(library, seconds))
        monkeypatch.setattr("pared._accelerate.target_of", lambda model: target)
        return pared.accelerate(model, x, formats=["2:4", "csr"], cache=False, **options)

    return run


def layers(weight):
    model = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0]), nn.ReLU()).to(weight.dtype)
    model[0].weight = nn.Parameter(weight)
    return model


@pytest.mark.parametrize(("seconds", "taken"), [(0.5, True), (0.97, False), (0.99, False), (1.5, False)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_taken_only_where_it_is_measured_to_win(accelerate, library, seconds, taken, dtype):
    model, x = layers(two_four(32, 64, dtype)), torch.randn(16, 64).to(dtype)
    fast = accelerate(model, x, seconds)
    row = pared.report(fast).layers[0]
    assert row.kernel == ("2:4" if taken else "torch")
    if taken:
        assert fast[0]._on_device.algorithm == 7, "not tuned for the tokens of the calls"
        assert f"{1 / seconds:.2f}x faster than dense" in row.reason
    else:
        assert f"{1 / seconds:.2f}x, less than 1.05x" in row.reason
    want = model(x)
    torch.testing.assert_close(fast(x), want, rtol=4 * torch.finfo(dtype).eps, atol=1e-2)


def test_why_it_is_not_even_timed(accelerate):
    three_of_ten = torch.zeros(32, 60).index_fill(1, torch.arange(0, 60, 10), 1.0)
    three_of_ten[:, 1::10] = three_of_ten[:, 2::10] = 1
    row = pared.report(accelerate(layers(three_of_ten.half()), torch.ones(8, 60).half(), 0.1)).layers[0]
    assert "multiples of 16" in {c.kernel: c.note for c in row.candidates}["2:4"]
    four = torch.nn.functional.pad(three_of_ten, (0, 4)).half()
    row = pared.report(accelerate(layers(four), torch.ones(8, 64).half(), 0.1)).layers[0]
    assert "at most two non-zeros in every four" in {c.kernel: c.note for c in row.candidates}["2:4"]
    # CSR is not for so many non-zeros: nothing is left.
    row = pared.report(accelerate(layers(two_four(32, 40)), torch.ones(8, 40).half(), 0.1)).layers[0]
    assert row.kernel == "torch"
    assert "no kernel suits this layer (expected sizes that are multiples of 16, got [32, 40])" in row.reason


def test_from_the_device_to_a_file_and_to_the_cpu(accelerate, tmp_path):
    model, x = layers(two_four(32, 64)), torch.randn(16, 64).half()
    fast = accelerate(model, x, 0.5)
    pared.save(fast, tmp_path / "model.pared")
    again = pared.load(tmp_path / "model.pared", model)
    assert again[0].format == "2:4"
    assert again[0]._on_device is None
    torch.testing.assert_close(again(x), model(x), rtol=1e-2, atol=1e-2)
    assert torch.equal(pared.restore(fast)[0].weight, model[0].weight)
    with pytest.raises(ValueError, match="dtype: expected a linear weight in float16 or bfloat16"):
        pared.ops.TwoFour.from_dense(two_four(32, 64).float()).to("cpu")


def test_bad_input(library):
    w = DeviceTwoFour.from_dense(two_four(32, 64))
    for args, error, text in [
        ((torch.ones(2, 64),), TypeError, "x: expected dtype float16"),
        ((torch.ones(2, 60).half(),), ValueError, r"x: expected shape \[..., 64\]"),
        ((torch.ones(2, 64).half(), torch.ones(3)), ValueError, r"bias: expected contiguous \[32\]"),
        ((torch.ones(2, 64).half(), None, "tanh"), ValueError, "activation: expected one of relu"),
    ]:
        with pytest.raises(error, match=text):
            w.linear(*args)


def test_on_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU, with a CUDA build of torch")
    for dtype in (torch.float16, torch.bfloat16):
        dense = two_four(256, 512, dtype)
        on = torch.where(dense == 0, -0.0, dense).cuda()
        reason = unavailable(on)
        if reason is not None:
            pytest.skip(reason)
        for tokens in (1, 64, 130):
            x, bias = torch.randn(tokens, 512).to(dtype), torch.randn(256)
            w = DeviceTwoFour.from_dense(on).tuned(tokens)
            got = w.linear(x.cuda(), bias.cuda()).cpu().double()
            want = nn.functional.linear(x.double(), dense.double(), bias.double())
            size = nn.functional.linear(x.double().abs(), dense.double().abs(), bias.double().abs())
            assert bool(((got - want).abs() <= 2 * torch.finfo(dtype).eps * size).all())
        model = layers(on)
        fast = pared.accelerate(model, torch.randn(1024, 512).to(on), formats=["2:4"], cache=False)
        assert pared.report(fast).layers[0].speedup >= 0.98 or not isinstance(fast[0], pared.nn.Linear)
