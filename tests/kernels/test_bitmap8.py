"""The masked int8 kernels on every level: the outputs of a numpy specification, to the bit."""

from __future__ import annotations

import numpy as np
import pytest
from int8_check import check_int8, linear_int8, quantize_weight
from packed_check import aligned_copy, header

from pared import _core, ops

# 16 outputs by 4 inputs a vector, 4 vectors a step, 128 (512 inputs) a K block, 4 groups a tile, 32 a pass.
TOKENS = [*range(18), 23, 31, 32, 33, 97]
COLS = [0, 1, 2, 3, 4, 5, 15, 16, 17, 31, 511, 512, 513, 528, 1031]
ROWS = [0, 1, 15, 16, 17, 33, 63, 64, 65, 79]
SPARSITIES = [0.0, 0.3, 0.5, 0.8, 0.95, 1.0]


def random_weight(rng, rows: int, cols: int, sparsity: float) -> np.ndarray:
    w = rng.standard_normal((rows, cols)).astype(np.float32)
    w[rng.random(w.shape) < sparsity] = 0
    return w


def check(rng, tokens: int, rows: int, cols: int, sparsity: float, **static) -> None:
    w = random_weight(rng, rows, cols, sparsity)
    x = (rng.standard_normal((tokens, cols)) * np.exp2(rng.integers(-3, 4, (tokens, 1)))).astype(np.float32)
    bias = rng.standard_normal(rows).astype(np.float32) if rng.random() < 0.5 else None
    packed = ops.Bitmap8.from_dense(w, **static)
    q, scales = quantize_weight(w)
    activations = _core.int8_activations(packed.packed)
    check_int8(ops.linear(x, packed, bias), linear_int8(x, q, scales, bias, activations))


def test_token_counts_and_row_counts(isa, rng):
    for tokens in TOKENS:
        for rows in ROWS:
            check(rng, tokens, rows, 45, float(rng.choice(SPARSITIES)))


def test_reduction_lengths_and_sparsities(isa, rng):
    for cols in COLS:
        for sparsity in SPARSITIES:
            check(rng, int(rng.choice(TOKENS)), int(rng.choice(ROWS)), cols, sparsity)


def test_several_passes_and_token_blocks(isa, rng):
    for tokens in (1, 5, 20, 400):
        check(rng, tokens, 600, 530, 0.8)


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_static_activations(isa, rng, dtype):
    for tokens, rows, cols in ((1, 17, 5), (6, 64, 512), (17, 70, 777)):
        zero = int(rng.integers(-128, 128)) + (128 if dtype == "uint8" else 0)
        static = {"activation_scale": 0.021, "activation_zero": zero, "activation_dtype": dtype}
        check(rng, tokens, rows, cols, 0.7, **static)


def test_the_extremes_do_not_saturate(isa):
    q = np.zeros((17, 65793), np.int8)
    q[:, :] = -128
    q[3] = 127
    packed = ops.Bitmap8.from_quantized(q, 1.0)
    for tokens in (1, 17):
        x = np.ones((tokens, 65793), np.float32)
        dense = ops.Int8.from_quantized(q, 1.0)
        assert np.array_equal(ops.linear(x, packed), ops.linear(x, dense))
        assert ops.linear(x, packed)[0, 3] == pytest.approx(127 * 65793)


def test_every_byte_of_a_mask(isa, rng):
    """All 256 patterns at each of the eight places, values that tell the places apart."""
    masks = np.array([m << 8 * i for i in range(8) for m in range(256)], dtype=np.uint64)
    bits = (masks[:, None] >> np.arange(64, dtype=np.uint64) & np.uint64(1)).astype(np.int8)
    values = bits * np.arange(1, 65, dtype=np.int8)  # [vector][output, input in the unit]
    q = values.reshape(-1, 16, 4).transpose(1, 0, 2).reshape(16, -1)
    x = rng.integers(-127, 128, (20, q.shape[1])).astype(np.float32)
    x[:, 0] = 127
    want = x.astype(np.int64) @ q.T.astype(np.int64)
    packed = ops.Bitmap8.from_quantized(q, 1.0)
    for tokens in (1, 20):
        assert np.array_equal(ops.linear(x[:tokens], packed), want[:tokens].astype(np.float32))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_the_same_as_the_dense_format(isa, rng, dtype, activation):
    w = random_weight(rng, 90, 700, 0.6)
    bias = rng.standard_normal(90).astype(np.float32)
    sparse, dense = ops.Bitmap8.from_dense(w), ops.Int8.from_dense(w)
    for tokens in (1, 3, 16, 17, 50):
        x = rng.standard_normal((tokens, 700)).astype(dtype)
        y = ops.linear(x, sparse, bias, activation)
        assert y.dtype == dtype
        assert np.array_equal(y, ops.linear(x, dense, bias, activation))


def test_tokens_that_are_not_finite(isa, rng):
    w = random_weight(rng, 40, 600, 0.8)
    for tokens in (3, 30):
        x = rng.standard_normal((tokens, 600)).astype(np.float32)
        want = ops.linear(x, ops.Bitmap8.from_dense(w))
        x[1, 5], x[2, 599] = np.nan, np.inf
        want[1:3] = np.nan
        assert np.array_equal(ops.linear(x, ops.Bitmap8.from_dense(w)), want, equal_nan=True)


def test_strided_output_and_nothing_beside_it(isa, rng):
    for rows in (1, 15, 16, 17, 70):
        for tokens in (1, 4, 19):
            w = random_weight(rng, rows, 36, 0.5)
            x = rng.standard_normal((tokens, 36)).astype(np.float32)
            guard = np.full((tokens + 2, rows + 7), 7.25, np.float32)
            out = guard[1:-1, 3 : 3 + rows]
            packed = ops.Bitmap8.from_dense(w)
            _core.linear(x, packed.packed, None, None, out)
            assert np.array_equal(out, ops.linear(x, packed))
            out[:] = 7.25
            assert np.all(guard == 7.25)


def test_a_wrong_packed_weight_is_noticed(isa, rng):
    """Planted fault: one stored byte is another."""
    w = random_weight(rng, 40, 300, 0.8)
    x = rng.standard_normal((5, 300)).astype(np.float32)
    packed = aligned_copy(ops.Bitmap8.from_dense(w).packed)
    weight = ops.Bitmap8(packed)
    q, scales = quantize_weight(w)
    check_int8(ops.linear(x, weight), linear_int8(x, q, scales, None, None))
    packed[int(header(packed)["values_at"]) + 17] ^= 1
    with pytest.raises(AssertionError):
        check_int8(ops.linear(x, weight), linear_int8(x, q, scales, None, None))
