"""`pared.ops.Int4`: packing, arguments, damaged buffers."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from pared import ops

F = np.ones((2, 3), np.float32)
Q = np.ones((2, 3), np.int8)
S = np.ones((2, 1), np.float32)


def test_what_it_says_of_itself(rng):
    w = rng.standard_normal((37, 256)).astype(np.float32)
    packed = ops.Int4.from_dense(w, group=64)
    packed.validate()
    q, scales = packed.to_quantized()
    assert (packed.shape, packed.group, packed.nnz) == ((37, 256), 64, np.count_nonzero(q))
    back = packed.to_dense()
    assert np.array_equal(back, q * np.repeat(scales, 64, axis=1))
    assert (np.abs(back - w) <= 0.5001 * np.repeat(scales, 64, axis=1)).all()
    assert packed.nbytes == 192 + 48 * 256 * (0.5 + 4 / 64)
    assert np.array_equal(copy.deepcopy(packed).packed, packed.packed)


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0), (1, 1)])
def test_small_weights(shape):
    packed = ops.Int4.from_dense(np.ones(shape, np.float32))
    packed.validate()
    assert ops.linear(np.ones((3, shape[1]), np.float32), packed).shape == (3, shape[0])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.Int4.from_dense([[1.0]]), TypeError, "weight: expected a numpy array"),
        (lambda: ops.Int4.from_dense(F[0]), ValueError, r"weight: expected \[out, in\], got \[3\]"),
        (lambda: ops.Int4.from_dense(F, group=16), ValueError, "group: expected 32, 64 or 128, got 16"),
        (lambda: ops.Int4.from_dense(F, groups=2), ValueError, "groups: expected 1"),
        (lambda: ops.Int4.from_dense(F * np.nan), ValueError, "NaN or infinity in row"),
        (
            lambda: ops.Int4.from_dense(np.zeros((0, (1 << 20) + 1), np.float32)),
            ValueError,
            "weight: expected at most",
        ),
        (
            lambda: ops.Int4.from_quantized(Q * 8, S, group=32),
            ValueError,
            "q: expected integers from -8 to 7",
        ),
        (lambda: ops.Int4.from_quantized(Q, S * np.nan, group=32), ValueError, "scales: expected finite"),
        (lambda: ops.Int4.from_quantized(Q, S[:1], group=32), ValueError, r"scales: expected shape \[2, 1\]"),
        (lambda: ops.Int4.from_quantized(Q, S, group=0), ValueError, "group: expected 32"),
        (lambda: ops.Int4.from_quantized(F, S, group=32), TypeError, "q: expected dtype int8"),
        (
            lambda: ops.linear(F[:, :2], ops.Int4.from_dense(F)),
            ValueError,
            "x: expected a last dimension of 3",
        ),
        (
            lambda: ops.Int4(ops.Int8.from_dense(F).packed),
            ValueError,
            "expected a int4 buffer, got a int8 one",
        ),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_damaged_buffers_are_refused_and_never_read_out_of(rng):
    good = ops.Int4.from_dense(rng.standard_normal((37, 101)).astype(np.float32), group=32).packed
    room = np.zeros(good.size + 64, np.uint8)
    packed = room[-room.ctypes.data % 64 :][: good.size]
    for i in range(192):
        for value in (0xFF, int(good[i]) ^ 1, int(good[i]) ^ 0x80):
            if value == good[i]:
                continue
            packed[:] = good
            packed[i] = value
            try:
                w = ops.Int4(packed)
                ops.linear(np.ones((2, w.shape[1]), np.float32), w)
            except ValueError:
                continue
            with pytest.raises(ValueError, match="packed weight"):
                w.validate()
