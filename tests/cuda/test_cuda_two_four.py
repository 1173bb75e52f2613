"""2:4 weights through torch's cuSPARSELt: what is refused, -0.0, padding, and the choice, with a stand-in for
the library; the library itself where there is a GPU that has it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pared import _cuda_two_four
from pared._cuda_two_four import DeviceTwoFour, choose, follows_two_four, unavailable


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


@pytest.mark.parametrize(("seconds", "taken"), [(0.5, True), (0.99, False), (1.5, False)])
def test_taken_only_where_it_wins(library, seconds, taken):
    found, why = choose(two_four(32, 64), 16, lambda calls: {"dense": 1.0, "2:4": seconds})
    assert (found is not None) == taken
    assert f"{1 / seconds:.2f} times as fast as dense" in why
    found, why = choose(torch.ones(32, 64).half(), 16, lambda calls: pytest.fail("nothing to measure"))
    assert found is None
    assert "at most two" in why


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
        choose(on, 1024)
