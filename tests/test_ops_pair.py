"""`pared.ops.BitmapCSR`: one weight in two packings, chosen by the number of tokens."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from linear_check import check_linear

import pared
from pared import _accelerate as acc
from pared import _core, nn, ops
from pared.ops import CSR, Bitmap, BitmapCSR


def random_weight(rng, rows: int, cols: int, sparsity: float) -> np.ndarray:
    w = rng.standard_normal((rows, cols)).astype(np.float32)
    w[rng.random((rows, cols)) < sparsity] = 0
    return w


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0), (1, 1), (37, 600), (530, 70)])
def test_round_trip(rng, shape, sparsity):
    w = random_weight(rng, *shape, sparsity)
    p = BitmapCSR.from_dense(w)
    p.validate()
    assert p.shape == shape
    assert p.nnz == np.count_nonzero(w)
    assert np.array_equal(p.to_dense(), w)
    t = BitmapCSR(torch.from_numpy(p.packed))
    assert torch.equal(t.to_dense(), torch.from_numpy(w))
    copy.deepcopy(p).validate()


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.8, 0.9, 0.99])
def test_the_packing_follows_the_tokens(isa, rng, sparsity):
    w = random_weight(rng, 40, 300, sparsity)
    pair, few, many = BitmapCSR.from_dense(w), Bitmap.from_dense(w), CSR.from_dense(w)
    limit = pair.few_tokens
    assert 2 <= limit <= 64
    for tokens in {0, 1, limit - 1, limit, limit + 1, 100}:
        x = rng.standard_normal((tokens, 300)).astype(np.float32)
        y = ops.linear(x, pair)
        check_linear(y, x, w)
        assert np.array_equal(y, ops.linear(x, few if tokens <= limit else many))


def test_more_zeros_leave_fewer_tokens_to_the_bitmap(rng):
    limits = [BitmapCSR.from_dense(random_weight(rng, 64, 64, s)).few_tokens for s in (0.2, 0.5, 0.8, 0.95)]
    assert limits == sorted(limits, reverse=True)
    assert len(set(limits)) == 4


def test_a_weight_beyond_the_cache_leaves_more_tokens_to_the_bitmap(rng):
    small, large = random_weight(rng, 256, 256, 0.8), random_weight(rng, 1500, 800, 0.8)
    assert BitmapCSR.from_dense(large).few_tokens > 2 * BitmapCSR.from_dense(small).few_tokens


def test_module(rng):
    plain = torch.nn.Linear(70, 30)
    with torch.no_grad():
        plain.weight.mul_(torch.rand(30, 70) < 0.3)
    module = nn.Linear.from_module(plain, format="bitmap+csr")
    for tokens in (1, 80):
        x = torch.randn(tokens, 70)
        torch.testing.assert_close(module(x), plain(x).detach(), atol=1e-5, rtol=1e-5)
        assert torch.equal(torch.compile(module, fullgraph=True, backend="aot_eager")(x), module(x))
    assert torch.equal(module.to_module().weight, plain.weight)


def test_accelerate_tries_it_where_calls_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[list[str]] = []

    def time_layer(c: Any, variants: Any) -> float:
        tried.append(list(variants))
        return 1.0

    monkeypatch.setattr(acc.timing, "time_layer", time_layer)
    model = torch.nn.Sequential(torch.nn.Linear(32, 32))
    with torch.no_grad():
        model[0].weight.mul_(torch.rand(32, 32) < 0.1)
    one, some, many = torch.randn(1, 32), torch.randn(8, 32), torch.randn(64, 32)
    for inputs in (one, many, [one, some], [one, many]):
        pared.accelerate(model, inputs, progress=False)
    assert [("bitmap+csr" in t, "bitmap" in t, "csr" in t) for t in tried] == [
        (False, True, True),
        (False, False, True),
        (False, True, True),
        (True, True, True),
    ]


def test_save_and_load(tmp_path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(32, 16))
    with torch.no_grad():
        model[0].weight.mul_(torch.rand(16, 32) < 0.2)
    x = torch.randn(3, 32)
    for name in ("bitmap", "bitmap+csr"):
        fast = pared.accelerate(model, x, min_speedup=0, progress=False, formats=[name])
        assert fast[0].format == name
        path = tmp_path / "model.pared"
        pared.save(fast, path)
        assert torch.equal(pared.load(path, torch.nn.Sequential(torch.nn.Linear(32, 16)))(x), fast(x))


# ---- bad input


def test_bad_arguments():
    w = np.ones((4, 4), np.float32)
    with pytest.raises(ValueError, match="groups: expected 1 for a linear weight, got 2"):
        BitmapCSR.from_dense(w, groups=2)
    with pytest.raises(ValueError, match="weight: expected shape"):
        BitmapCSR.from_dense(w[0])
    with pytest.raises(ValueError, match="packed weight: expected a pair"):
        _core.pair_few_tokens(CSR.from_dense(w).packed)
    w[1, 2] = np.inf
    with pytest.raises(ValueError, match="weight: expected finite values, got NaN or infinity in row 1"):
        BitmapCSR.from_dense(w)
