"""The bitmap kernels on every level: every number of tokens, shapes around vectors, blocks and passes."""

from __future__ import annotations

import numpy as np
import pytest
from linear_check import check_linear
from packed_check import aligned_copy, bitmap_bfloat16, header, to_bfloat16

from pared import _core, ops

# 16 outputs a vector, 4 vectors a step, 512 a K block, 32 groups of outputs a pass; and primes.
TOKENS = [*range(18), 31, 32, 33, 47]
COLS = [0, 1, 2, 3, 4, 5, 7, 8, 13, 511, 512, 513, 515, 516, 517, 1023, 1024, 1025]
ROWS = [0, 1, 2, 7, 15, 16, 17, 31, 32, 33]
SPARSITIES = [0.0, 0.3, 0.5, 0.8, 0.95, 1.0]


def random_weight(rng, rows: int, cols: int, sparsity: float) -> np.ndarray:
    w = rng.standard_normal((rows, cols)).astype(np.float32)
    w[rng.random(w.shape) < sparsity] = 0
    return w


def test_token_counts_and_row_counts(isa, rng):
    for tokens in TOKENS:
        for rows in ROWS:
            w = random_weight(rng, rows, 61, float(rng.choice(SPARSITIES)))
            x = rng.standard_normal((tokens, 61)).astype(np.float32)
            bias = rng.standard_normal(rows).astype(np.float32)
            check_linear(ops.linear(x, ops.Bitmap.from_dense(w), bias), x, w, bias)


def test_reduction_lengths_and_sparsities(isa, rng):
    for cols in COLS:
        for sparsity in SPARSITIES:
            w = random_weight(rng, int(rng.choice(ROWS)), cols, sparsity)
            x = rng.standard_normal((int(rng.choice(TOKENS)), cols)).astype(np.float32)
            check_linear(ops.linear(x, ops.Bitmap.from_dense(w)), x, w)


def bfloat16(w: np.ndarray) -> ops.Bitmap:
    return ops.Bitmap(bitmap_bfloat16(w, ops.Bitmap.from_dense(w).packed))


def test_bfloat16_weights_give_the_bits_of_float32(isa, rng):
    """Stored as they are, in pairs of inputs, and widened in registers: the same products and sums."""
    for tokens in TOKENS:
        cols, sparsity = int(rng.choice(COLS)), float(rng.choice(SPARSITIES))
        w = random_weight(rng, int(rng.choice([*ROWS, 513])), cols, sparsity)
        w = to_bfloat16(w * np.exp2(rng.integers(-100, 50, w.shape)).astype(np.float32))
        x = rng.standard_normal((tokens, cols)).astype(np.float32)
        narrow = bfloat16(w)
        narrow.validate()
        assert np.array_equal(ops.linear(x, narrow), ops.linear(x, ops.Bitmap.from_dense(w)))
        check_linear(ops.linear(x, narrow), x, w)


def test_every_mask_of_bfloat16(isa, rng):
    """All 65536 patterns of each half of a vector, with values of their own."""
    for other in (0, 0xFFFF, 0x5A3C):
        masks = rng.permutation(1 << 16)
        both = np.stack([masks | other << 16, masks << 16 | other]).reshape(-1)
        bits = (both[:, None] >> np.arange(32)) & 1
        values = (np.arange(1, 33) * bits).astype(np.float32)
        for block in np.split(values.reshape(-1, 16, 2), 64):
            w = np.ascontiguousarray(block.transpose(1, 0, 2).reshape(16, -1))
            x = rng.integers(-8, 9, (2, w.shape[1])).astype(np.float32)
            assert np.array_equal(ops.linear(x, bfloat16(w)), x @ w.T)


@pytest.mark.parametrize("rows", [511, 512, 513, 1040])
def test_more_rows_than_one_pass(isa, rng, rows):
    w = random_weight(rng, rows, 530, 0.7)
    for tokens in (1, 3, 18):
        x = rng.standard_normal((tokens, 530)).astype(np.float32)
        check_linear(ops.linear(x, ops.Bitmap.from_dense(w)), x, w)


def test_every_mask(isa, rng):
    """All 65536 patterns of a vector, each with values of its own."""
    masks = rng.permutation(1 << 16)
    bits = (masks[:, None] >> np.arange(16)) & 1
    values = (np.arange(1, 17) * bits).astype(np.float32)
    for block in np.split(values, 64):
        w = np.ascontiguousarray(block.T)  # [16, 1024]: a column is one vector
        x = rng.integers(-8, 9, (2, 1024)).astype(np.float32)
        assert np.array_equal(ops.linear(x, ops.Bitmap.from_dense(w)), x @ w.T)


def test_empty_and_full_rows_and_columns(isa, rng):
    w = random_weight(rng, 50, 600, 0.9)
    w[::3] = 0
    w[7] = w[48] = 1.5
    w[:, 80:160] = 0
    w[16:32] = 0  # an empty group
    w[:, 512:] = 0  # an empty K block
    w[:, 511] = 2.0
    bias = rng.standard_normal(50).astype(np.float32)
    for tokens in (1, 6, 17):
        x = rng.standard_normal((tokens, 600)).astype(np.float32)
        check_linear(ops.linear(x, ops.Bitmap.from_dense(w), bias), x, w, bias)


@pytest.mark.parametrize("cols", [0, 1, 80, 700])
def test_an_empty_weight_gives_the_bias(isa, rng, cols):
    packed = ops.Bitmap.from_dense(np.zeros((21, cols), np.float32))
    x = rng.standard_normal((19, cols)).astype(np.float32)
    bias = rng.standard_normal(21).astype(np.float32)
    assert np.array_equal(ops.linear(x, packed, bias), np.tile(bias, (19, 1)))
    assert np.array_equal(ops.linear(x, packed), np.zeros((19, 21)))


def test_infinities_reach_the_outputs_of_their_token_alone(isa):
    """As in a dense product: an absent weight is a zero, and 0 * inf is NaN."""
    w = np.zeros((17, 530), np.float32)
    w[3, 5], w[16, 529] = 2.0, -1.0
    for tokens in (1, 2, 5, 16, 20):
        x = np.ones((tokens, 530), np.float32)
        x[0, 7], x[tokens // 2, 529] = np.inf, np.nan
        y = ops.linear(x, ops.Bitmap.from_dense(w))
        want = np.zeros((tokens, 17), np.float32)
        want[:, 3], want[:, 16] = 2.0, -1.0
        want[[0, tokens // 2]] = np.nan
        assert np.array_equal(y, want, equal_nan=True)


def test_magnitudes_far_apart(isa, rng):
    w = random_weight(rng, 33, 540, 0.8) * np.exp2(rng.integers(-30, 30, (33, 540))).astype(np.float32)
    x = (rng.standard_normal((9, 540)) * np.exp2(rng.integers(-30, 30, (9, 540)))).astype(np.float32)
    check_linear(ops.linear(x, ops.Bitmap.from_dense(w)), x, w)


def test_exact_on_integers(isa, rng):
    for sparsity in (0.3, 0.9):
        for tokens in (1, 2, 4, 5, 8, 9, 16):
            w = rng.integers(-8, 9, (35, 700)).astype(np.float32)
            w[rng.random(w.shape) < sparsity] = 0
            x = rng.integers(-8, 9, (tokens, 700)).astype(np.float32)
            assert np.array_equal(ops.linear(x, ops.Bitmap.from_dense(w)), x @ w.T)


def test_a_token_does_not_depend_on_the_others(isa, rng):
    w = ops.Bitmap.from_dense(random_weight(rng, 40, 600, 0.8))
    for tokens in (2, 5, 8, 16):
        x = rng.standard_normal((tokens, 600)).astype(np.float32)
        y = ops.linear(x, w)
        other = rng.standard_normal(x.shape).astype(np.float32)
        other[tokens // 2] = x[tokens // 2]
        assert np.array_equal(ops.linear(other, w)[tokens // 2], y[tokens // 2])


def test_running_twice_gives_the_same_bits(isa, rng):
    w = ops.Bitmap.from_dense(random_weight(rng, 1100, 333, 0.8))
    x = rng.standard_normal((13, 333)).astype(np.float32)
    assert np.array_equal(ops.linear(x, w), ops.linear(x, w))


@pytest.mark.parametrize("activation", [None, "relu", "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_bias_activation_and_dtypes(isa, rng, dtype, activation):
    for rows in (1, 8, 15, 16, 17, 40):
        for tokens in (1, 7, 19):
            w = random_weight(rng, rows, 37, 0.5)
            x = rng.standard_normal((tokens, 37)).astype(dtype)
            bias = rng.standard_normal(rows).astype(np.float32)
            y = ops.linear(x, ops.Bitmap.from_dense(w), bias, activation)
            check_linear(y, x, w, bias, activation, np.dtype(dtype).name)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_strided_input(isa, rng, dtype):
    w = random_weight(rng, 21, 37, 0.6)
    packed = ops.Bitmap.from_dense(w)
    big = rng.standard_normal((80, 90)).astype(dtype)
    for view in (
        big[:7, :37],
        big[3:40:2, 20:57],
        big[16::-1, 50:87],
        np.broadcast_to(big[5, :37], (19, 37)),
    ):
        y = ops.linear(view, packed)
        check_linear(y, view, w, dtype=np.dtype(dtype).name)
        assert np.array_equal(y, ops.linear(np.ascontiguousarray(view), packed))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_strided_output_and_nothing_beside_it(isa, rng, dtype):
    for rows in (1, 7, 8, 9, 15, 16, 17, 33):
        for tokens in (1, 4, 17):
            w = rng.standard_normal((rows, 20)).astype(np.float32)
            x = rng.standard_normal((tokens, 20)).astype(dtype)
            guard = np.full((tokens + 2, rows + 7), 7.25, dtype)
            out = guard[1:-1, 3 : 3 + rows]
            _core.linear(x, ops.Bitmap.from_dense(w).packed, None, None, out)
            check_linear(out, x, w, dtype=np.dtype(dtype).name)
            out[:] = 7.25
            assert np.all(guard == 7.25)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_input_is_not_read_beyond_its_rows(isa, dtype):
    """What lies around the input is NaN, and no NaN gets into the result."""
    w = np.ones((16, 21), np.float32)
    room = np.full((9, 40), np.nan, dtype)
    x = room[1:8, 5:26]
    x[:] = 1
    assert np.array_equal(ops.linear(x, ops.Bitmap.from_dense(w)), np.full((7, 16), 21, dtype))


# ---- planted faults: the checks above do fail on a wrong kernel


def tampered(w: np.ndarray, change) -> ops.Bitmap:
    """The packed weight with values or masks changed behind the checksum's back."""
    packed = aligned_copy(ops.Bitmap.from_dense(w).packed)
    weight = ops.Bitmap(packed)
    h = header(packed)
    change(packed[int(h["counts_at"]) :].view(np.uint16), packed[int(h["values_at"]) :].view(np.float32))
    return weight


# Of the first sixteen the values that make the fault large: one that is nearly zero may be wrong unseen.


def swap_values(masks: np.ndarray, values: np.ndarray) -> None:
    ends = [values[:16].argmin(), values[:16].argmax()]
    values[ends] = values[ends[::-1]]


def off_by_a_thousandth(masks: np.ndarray, values: np.ndarray) -> None:
    values[np.abs(values[:16]).argmax()] *= 1.001


def swap_masks(masks: np.ndarray, values: np.ndarray) -> None:
    i = int(np.argmax(masks[1:] != masks[:-1]))
    masks[[i, i + 1]] = masks[[i + 1, i]]


@pytest.mark.parametrize("change", [swap_values, off_by_a_thousandth, swap_masks])
def test_a_wrong_packed_weight_is_noticed(isa, rng, change):
    w = random_weight(rng, 40, 300, 0.8)
    x = rng.standard_normal((5, 300)).astype(np.float32)
    check_linear(ops.linear(x, ops.Bitmap.from_dense(w)), x, w)
    with pytest.raises(AssertionError, match="outputs are wrong"):
        check_linear(ops.linear(x, tampered(w, change)), x, w)
