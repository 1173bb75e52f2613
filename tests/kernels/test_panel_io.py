"""Packing activations into the panel and storing tiles, seen through products with identity-like weights."""

from __future__ import annotations

import numpy as np
import pytest
from linear_check import check_linear

from pared import _core, ops


def identity(n: int) -> ops.CSR:
    return ops.CSR.from_dense(np.eye(n, dtype=np.float32))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_the_identity_moves_every_element_to_its_place(isa, dtype):
    """Each element is another number: a transpose that mixes up two of them cannot pass."""
    for tokens in (1, 3, 4, 15, 16, 17, 31, 33, 65, 127, 130):
        for n in (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 81, 129, 243):
            x = np.arange(1, tokens * n + 1).reshape(tokens, n)
            x = (x % 2039 if dtype == np.float16 else x).astype(dtype)
            assert np.array_equal(ops.linear(x, identity(n)), x), (tokens, n)


def test_every_float16_survives_the_round_trip(isa):
    x = np.arange(1 << 16, dtype=np.uint16).view(np.float16).reshape(-1, 16)
    y = ops.linear(x, identity(16))
    assert np.array_equal(np.isnan(x), np.isnan(y))
    assert np.array_equal(x, y, equal_nan=True)


def test_float16_results_round_to_nearest_even(isa, rng):
    """x * w in float32, rounded once more: numpy's conversion is the second implementation."""
    scale = np.exp2(rng.uniform(-26, 17, 64)).astype(np.float32)
    scale[:4] = [
        1 + 2.0**-11,
        1 + 3 * 2.0**-11,
        2.0**-24 * 1.5,
        65520 / 65504,
    ]  # ties and the edge of infinity
    x = rng.standard_normal((4096, 64)).astype(np.float16)
    x[0] = 1.0
    x[1, :] = np.float16(65504)
    with np.errstate(over="ignore"):
        want = (x.astype(np.float32) * scale).astype(np.float16)
    y = ops.linear(x, ops.CSR.from_dense(np.diag(scale)))
    assert np.array_equal(y, want)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_strided_input(isa, rng, dtype):
    w = rng.standard_normal((21, 37)).astype(np.float32)
    w[rng.random(w.shape) < 0.6] = 0
    packed = ops.CSR.from_dense(w)
    big = rng.standard_normal((80, 90)).astype(dtype)
    for view in (big[:, :37], big[3:40:2, 20:57], big[::-1, 50:87], np.broadcast_to(big[5, :37], (19, 37))):
        y = ops.linear(view, packed)
        check_linear(y, view, w, dtype=np.dtype(dtype).name)
        assert np.array_equal(y, ops.linear(np.ascontiguousarray(view), packed))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_strided_output_and_nothing_beside_it(isa, rng, dtype):
    """The kernel writes the output's elements and no other byte around them."""
    for rows in (1, 15, 16, 17, 33):
        for tokens in (1, 4, 15, 17, 67):
            w = rng.standard_normal((rows, 20)).astype(np.float32)
            x = rng.standard_normal((tokens, 20)).astype(dtype)
            guard = np.full((tokens + 2, rows + 7), 7.25, dtype)
            out = guard[1:-1, 3 : 3 + rows]
            _core.linear(x, ops.CSR.from_dense(w).packed, None, None, out)
            check_linear(out, x, w, dtype=np.dtype(dtype).name)
            out[:] = 7.25
            assert np.all(guard == 7.25)


@pytest.mark.parametrize("activation", [None, "relu", "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_bias_and_activation(isa, rng, dtype, activation):
    w = rng.standard_normal((37, 50)).astype(np.float32)
    w[rng.random(w.shape) < 0.7] = 0
    x = rng.standard_normal((29, 50)).astype(dtype)
    bias = rng.standard_normal(37).astype(np.float32)
    packed = ops.CSR.from_dense(w)
    name = np.dtype(dtype).name
    check_linear(ops.linear(x, packed, bias, activation), x, w, bias, activation, name)
    check_linear(ops.linear(x, packed, None, activation), x, w, None, activation, name)
