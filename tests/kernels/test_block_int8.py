"""The int8 block kernels on every level, to the bit: shapes, patterns, extremes, planted faults."""

from __future__ import annotations

import numpy as np
import pytest
from block_int8_check import check_int8, quantize_rows, quantize_weight
from hypothesis import given, settings
from hypothesis import strategies as st

from pared import _core, ops

# Around 16 positions a vector, of whose last group one to three go otherwise, 64, 96 and 128 a tile; units of
# four; K blocks; quads, groups of 16; primes.
TOKENS = [0, 1, 2, 3, 4, 15, 16, 17, 18, 19, 31, 33, 34, 35, 48, 49, 63, 64, 65, 79, 80, 95, 96, 97, 112]
TOKENS += [127, 128, 129, 191, 257]
COLS = [0, 1, 2, 3, 4, 5, 7, 8, 63, 64, 65, 131, 319, 320, 321, 384, 385, 388, 511, 769, 1021]
ROWS = [0, 1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 19, 33]
BLOCKS = [(1, 4), (4, 4), (16, 4)]


def block_weight(rng, rows: int, cols: int, block: tuple[int, int], sparsity: float) -> np.ndarray:
    r, c = block
    keep = rng.random((-(-rows // r), -(-cols // c))) >= sparsity
    w = rng.standard_normal((rows, cols)).astype(np.float32)
    return w * np.kron(keep, np.ones(block, np.float32))[:rows, :cols]


def check(rng, tokens: int, rows: int, cols: int, block: tuple[int, int], sparsity: float, **kwargs) -> None:
    w = block_weight(rng, rows, cols, block, sparsity)
    x = rng.standard_normal((tokens, cols)).astype(np.float32)
    packed = ops.BSRInt8.from_dense(w, block=block)
    check_int8(ops.linear(x, packed, **kwargs), x, *quantize_weight(w), **kwargs)


@pytest.mark.parametrize("block", BLOCKS)
def test_reduction_lengths_and_sparsities(isa, rng, block):
    for cols in COLS:
        for sparsity in (0.0, 0.5, 0.9, 1.0):
            check(rng, int(rng.choice(TOKENS)), int(rng.choice(ROWS)), cols, block, sparsity)


@pytest.mark.parametrize("block", BLOCKS[:2])
def test_token_counts_and_row_counts(isa, rng, block):
    for tokens in TOKENS:
        for rows in rng.choice(ROWS, 4, replace=False):
            bias = rng.standard_normal(rows).astype(np.float32)
            check(rng, tokens, int(rows), 101, block, 0.4, bias=bias)


@pytest.mark.parametrize("block", BLOCKS[:2])
def test_more_rows_than_one_pass_of_accumulators(isa, rng, block):
    check(rng, 97, 1100, 200, block, 0.8)


@pytest.mark.parametrize("name", ["relu", "gelu", "gelu_tanh", "silu"])
def test_activations(isa, rng, name):
    w = block_weight(rng, 21, 64, (1, 4), 0.5)
    x = rng.standard_normal((19, 64)).astype(np.float32)
    bias = rng.standard_normal(21).astype(np.float32)
    y = ops.linear(x, ops.BSRInt8.from_dense(w), bias, name)
    check_int8(y, x, *quantize_weight(w), bias, name)


@settings(max_examples=40)
@given(
    tokens=st.integers(0, 140),
    rows=st.integers(0, 40),
    cols=st.integers(0, 420),
    block=st.sampled_from([*BLOCKS, (2, 3), (8, 8)]),
    sparsity=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    spread=st.sampled_from([0.0, 10.0, 60.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_shape(isa, tokens, rows, cols, block, sparsity, spread, seed):
    """Magnitudes over many orders, from one token and output to the next."""
    rng = np.random.default_rng(seed)
    w = block_weight(rng, rows, cols, block, sparsity)
    w *= np.exp2(rng.uniform(-spread, spread, (rows, 1))).astype(np.float32)
    x = rng.standard_normal((tokens, cols)) * np.exp2(rng.uniform(-spread, spread, (tokens, 1)))
    x = x.astype(np.float32)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        check_int8(ops.linear(x, ops.BSRInt8.from_dense(w, block=block)), x, *quantize_weight(w))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_activations(isa, rng, dtype):
    torch = pytest.importorskip("torch")
    w = block_weight(rng, 37, 150, (4, 4), 0.5)
    q, scales = quantize_weight(w)
    packed = ops.BSRInt8.from_dense(w)
    for tokens in (1, 16, 33, 130):
        x = torch.from_numpy(rng.standard_normal((tokens, 150))).to(getattr(torch, dtype))
        y = ops.linear(x, packed)
        assert y.dtype == x.dtype
        # Widening is exact, so is the float32 result's one rounding.
        assert torch.equal(y, ops.linear(x.float(), packed).to(x.dtype))
        check_int8(ops.linear(x.float(), packed), x, q, scales)


def test_strided_activations(isa, rng):
    w = block_weight(rng, 20, 90, (1, 4), 0.5)
    packed = ops.BSRInt8.from_dense(w)
    x = rng.standard_normal((70, 200)).astype(np.float32)
    for view in (x[:, :90], x[::3, 7:97], x[::-1, 10:100]):
        assert np.array_equal(ops.linear(view, packed), ops.linear(view.copy(), packed))


def test_ties_round_to_even(isa):
    """x * 127 / 127 is exact: halves are what is rounded."""
    x = np.array([[127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, -126.5, 63.5]], np.float32)
    packed = ops.BSRInt8.from_dense(np.eye(10, dtype=np.float32))
    q, scales = quantize_rows(x)
    assert q.tolist() == [[127, 0, 2, 2, 0, -2, -2, 126, -126, 64]]
    assert scales == 1
    y = ops.linear(x, packed)
    check_int8(y, x, *quantize_weight(np.eye(10, dtype=np.float32)))


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_a_token_that_is_not_finite_gives_nan_and_no_other_does(isa, rng, bad):
    w = block_weight(rng, 24, 80, (1, 4), 0.5)
    w[3] = 0
    x = rng.standard_normal((40, 80)).astype(np.float32)
    for at in (0, 63, 79):  # the vectorised part and the tail of a row
        y = x.copy()
        y[5, at] = bad
        out = ops.linear(y, ops.BSRInt8.from_dense(w), activation="relu")
        assert np.isnan(out[5]).all()
        assert np.isfinite(np.delete(out, 5, 0)).all()


def test_tiny_and_zero_tokens(isa, rng):
    w = block_weight(rng, 16, 40, (4, 4), 0.3)
    x = rng.standard_normal((6, 40)).astype(np.float32)
    for i, scale in enumerate([0.0, 1e-45, 2.0**-101, 2.0**-100, 2.0**-99, 2.0**120]):
        x[i] *= np.float32(scale) / np.abs(x[i]).max()
    bias = rng.standard_normal(16).astype(np.float32)
    y = ops.linear(x, ops.BSRInt8.from_dense(w), bias)
    check_int8(y, x, *quantize_weight(w), bias)
    assert np.array_equal(y[:3], np.tile(bias, (3, 1)))


@pytest.mark.parametrize("rows", [1, 4])
def test_the_largest_sums_are_exact(isa, rng, rows):
    """Every byte at its extreme: 127 and -127 of the activations (255 and 1), -128 and 127 of the weight."""
    cols = 65793
    signs = np.where(rng.random(cols) < 0.5, -1, 1)
    for q in (
        np.full(cols, 127),
        np.full(cols, -128),
        np.where(signs > 0, 127, -128),
        np.where(signs > 0, -128, 127),
    ):
        q = np.tile(q.astype(np.int8), (rows, 1))
        packed = ops.BSRInt8.from_quantized(q, np.ones(rows, np.float32), block=(rows, 4))
        x = np.stack([np.ones(cols), -np.ones(cols), signs]).astype(np.float32)
        check_int8(ops.linear(x, packed), x, q, np.ones(rows, np.float32))


def test_pairs_that_saturate_16_bits_are_exact(isa):
    """What vpmaddubsw would get wrong: 255 * 127 + 255 * 127, and its negative."""
    for a in (127, -128):
        for b in (127, -128):
            q = np.array([[a, a, b, b]], np.int8)
            packed = ops.BSRInt8.from_quantized(q, np.ones(1, np.float32))
            x = np.array([[127, 127, 127, 127], [127, 127, -127, -127]], np.float32)
            assert ops.linear(x, packed).tolist() == [[254 * (a + b)], [254 * (a - b)]]


@pytest.mark.parametrize("block", BLOCKS[:2])
def test_planted_faults_are_caught(isa, rng, block):
    """A sum that is off by one, rows of a quad in another order, bytes of a word in another order."""
    w = block_weight(rng, 16, 120, block, 0.4)
    q, scales = quantize_weight(w)
    x = rng.standard_normal((40, 120)).astype(np.float32)
    y = ops.linear(x, ops.BSRInt8.from_dense(w, block=block))
    check_int8(y, x, q, scales)
    off = q.copy()
    row, column = np.argwhere(off > 0)[0]
    off[row, column] -= 1
    with pytest.raises(AssertionError):
        check_int8(y, x, off, scales)
    with pytest.raises(AssertionError):
        check_int8(y[:, [1, 0, *range(2, 16)]], x, q, scales)
    swapped = x.reshape(40, 30, 4)[:, :, [1, 0, 2, 3]].reshape(40, 120)
    with pytest.raises(AssertionError):
        check_int8(ops.linear(swapped, ops.BSRInt8.from_dense(w, block=block)), x, q, scales)


def test_the_packed_kinds_run_their_kernels(isa):
    x = np.ones((3, 20), np.float32)
    for block, op in (((1, 4), "csr_panel_s8"), ((4, 4), "quad_panel_s8"), ((16, 4), "quad_panel_s8")):
        packed = ops.BSRInt8.from_dense(np.eye(8, 20, dtype=np.float32), block=block)
        _core.take_dispatched()
        ops.linear(x, packed)
        ran = _core.take_dispatched()
        assert any(k.startswith(op) for k in ran)
        assert any(k.startswith("quantize_u8") for k in ran)
    ops.linear(x, packed)
