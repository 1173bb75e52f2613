"""4-bit weights on every level, against numpy: the same bits everywhere."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from int8_check import check_int8, quantize_tokens

from pared import _core, ops

TOKENS = [0, 1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 37]
OUTPUTS = [0, 1, 7, 15, 16, 17, 33, 64]
COLS = [0, 1, 3, 4, 7, 8, 9, 31, 32, 33, 63, 64, 65, 127, 128, 129, 300, 1031]


def quantize(w: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray]:
    """``(q int8 [out, in], scales float32 [out, groups])``."""
    n, k = w.shape
    groups = -(-k // group)
    padded = np.zeros((n, groups * group), np.float32)
    padded[:, :k] = w
    padded = padded.reshape(n, groups, group)
    largest = np.abs(padded).max(axis=2, initial=0)
    scales = np.where(largest < 2.0**-100, np.float32(0), largest / np.float32(7))
    q = np.rint(padded / np.where(scales == 0, np.float32(1), scales)[..., None])
    q = np.where(scales[..., None] == 0, 0, q).astype(np.int8)
    return q.reshape(n, groups * group)[:, :k], scales


def linear_int4(x, q, scales, group, bias=None) -> np.ndarray:
    u, x_scales, zero = quantize_tokens(x)
    total = np.zeros((len(x), len(q)), np.float32)
    for g in range(scales.shape[1]):
        part = slice(g * group, (g + 1) * group)
        sums = (u[:, part] - zero) @ q[:, part].astype(np.int64).T
        total = total + sums.astype(np.float32) * scales[None, :, g]
    return total * x_scales[:, None] + (np.zeros(len(q), np.float32) if bias is None else bias)


def check(rng, m: int, n: int, k: int, group: int) -> None:
    w = rng.standard_normal((n, k)).astype(np.float32)
    x = (rng.standard_normal((m, k)) * np.exp2(rng.integers(-3, 4, (m, 1)))).astype(np.float32)
    bias = rng.standard_normal(n).astype(np.float32) if rng.random() < 0.5 else None
    q, scales = quantize(w, group)
    packed = ops.Int4.from_dense(w, group=group)
    got = packed.to_quantized()
    assert np.array_equal(got[0], q)
    assert np.array_equal(got[1], scales)
    check_int8(ops.linear(x, packed, bias), linear_int4(x, q, scales, group, bias))


@pytest.mark.parametrize("group", [32, 64, 128])
def test_every_shape(isa, rng, group):
    for m in TOKENS:
        for n in OUTPUTS:
            check(rng, m, n, int(rng.choice(COLS)), group)
    for k in COLS:
        check(rng, int(rng.choice(TOKENS)), 35, k, group)


def test_several_threads(isa, rng):
    check(rng, 9, 1500, 700, 32)


@given(data=st.data(), m=st.integers(1, 9), n=st.integers(1, 35), k=st.integers(1, 140))
def test_any_integers(isa, data, m, n, k):
    """-8 to 7, and tokens of integers: nothing is rounded, every sum is exact."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    group = int(rng.choice([32, 64, 128]))
    q = rng.integers(-8, 8, (n, k)).astype(np.int8)
    scales = np.exp2(rng.integers(-3, 4, (n, -(-k // group)))).astype(np.float32)
    x = rng.integers(-127, 128, (m, k)).astype(np.float32)
    x[:, 0] = 127
    w = q * np.repeat(scales, group, axis=1)[:, :k].astype(np.float64)
    y = ops.linear(x, ops.Int4.from_quantized(q, scales, group=group))
    assert np.array_equal(y, x.astype(np.float64) @ w.T)


@pytest.mark.parametrize("tokens", [95, 97, 200])
def test_many_tokens_are_computed_as_one_alone(isa, rng, tokens):
    """Whatever tile, block of tokens or thread a token is in, its outputs are the same bits."""
    w = rng.standard_normal((83, 170)).astype(np.float32)
    x = rng.standard_normal((tokens, 170)).astype(np.float32)
    packed = ops.Int4.from_dense(w, group=32)
    y = ops.linear(x, packed)
    check_int8(y, linear_int4(x, *quantize(w, 32), 32))
    for m in (0, 5, 6, 94, tokens - 1):
        assert np.array_equal(ops.linear(x[m : m + 1], packed), y[m : m + 1])


def test_extremes_at_a_long_reduction(isa):
    for value, sign in ((-8, -1), (-8, 1), (7, 1)):
        q = np.full((17, 8192), value, np.int8)
        x = np.full((3, 8192), 127.0 * sign, np.float32)
        scales = np.ones((17, 64), np.float32)
        y = ops.linear(x, ops.Int4.from_quantized(q, scales, group=128))
        check_int8(y, linear_int4(x, q, scales, 128))


def test_tokens_that_are_not_finite_and_activations(isa, rng):
    w = rng.standard_normal((21, 75)).astype(np.float32)
    x = rng.standard_normal((6, 75)).astype(np.float32)
    x[1, 3], x[4, 74] = np.nan, np.inf
    packed = ops.Int4.from_dense(w, group=32)
    z = ops.linear(x, packed)
    assert np.isnan(z[[1, 4]]).all()
    assert np.isfinite(np.delete(z, [1, 4], axis=0)).all()
    check_int8(ops.linear(x, packed, activation="relu"), np.where(np.isnan(z), z, np.maximum(z, 0)))
    for half in (np.float16,):
        y = ops.linear(x.astype(half), packed)
        check_int8(
            y.astype(np.float32),
            linear_int4(x.astype(half), *quantize(w, 32), 32).astype(half).astype(np.float32),
        )


def test_a_wrong_packed_value_is_noticed(isa, rng):
    w = rng.standard_normal((40, 300)).astype(np.float32)
    x = rng.standard_normal((5, 300)).astype(np.float32)
    q, scales = quantize(w, 64)
    good = ops.Int4.from_dense(w, group=64).packed
    room = np.zeros(good.size + 64, np.uint8)
    packed = room[-room.ctypes.data % 64 :][: good.size]
    y = np.empty((5, 40), np.float32)
    for at in (192 + 17, 192 + 64 + 100):  # a scale, two nibbles
        packed[:] = good
        packed[at] ^= 0x11
        _core.linear(x, packed, None, None, y)
        with pytest.raises(AssertionError, match="outputs are wrong"):
            check_int8(y, linear_int4(x, q, scales, 64))
        with pytest.raises(ValueError, match="checksum"):
            ops.Int4(packed)
