"""The quad kernel (blocks of four rows, dense weights) on every level: shapes, densities, planted faults."""

from __future__ import annotations

import numpy as np
import pytest
from linear_check import check_linear

from pared import _core, ops

# Around 16 positions a vector, of whose last group one to three, or eight, are computed otherwise, and 96 a
# tile; K blocks of 96; 4 rows a quad, 16 a group; and primes.
TOKENS = [0, 1, 2, 3, 4, 8, 9, 15, 16, 17, 18, 19, 20, 24, 25, 31, 33, 34, 35, 36, 40, 41, 48, 49, 51, 64]
TOKENS += [79, 80, 95, 96, 97, 112, 128, 191, 193]
COLS = [0, 1, 3, 4, 5, 16, 95, 96, 97, 131, 191, 192, 193]
ROWS = [0, 1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 19, 33]


def block_weight(rng, rows: int, cols: int, sparsity: float) -> np.ndarray:
    w = rng.standard_normal((rows, cols)).astype(np.float32)
    keep = rng.random((-(-rows // 4), cols)) >= sparsity
    return w * np.repeat(keep, 4, axis=0)[:rows]


def test_reduction_lengths_and_sparsities(isa, rng):
    for cols in COLS:
        for sparsity in (0.0, 0.5, 0.9, 1.0):
            for tokens in rng.choice(TOKENS, 3):
                w = block_weight(rng, int(rng.choice(ROWS)), cols, sparsity)
                x = rng.standard_normal((tokens, cols)).astype(np.float32)
                check_linear(ops.linear(x, ops.BSR.from_dense(w)), x, w)


def test_token_counts_and_row_counts(isa, rng):
    for tokens in TOKENS:
        for rows in ROWS:
            w = rng.standard_normal((rows, 101)).astype(np.float32)
            x = rng.standard_normal((tokens, 101)).astype(np.float32)
            bias = rng.standard_normal(rows).astype(np.float32)
            check_linear(ops.linear(x, ops.Dense.from_dense(w), bias), x, w, bias)


@pytest.mark.parametrize("sparsity", [0.0, 0.6])
def test_outputs_do_not_depend_on_the_number_of_tokens(isa, rng, sparsity):
    """To the bit, whichever way the last positions go; with several K blocks, and quads of unequal length."""
    w = block_weight(rng, 27, 450, sparsity)
    x = rng.standard_normal((64, 450)).astype(np.float32)
    for packed in (ops.Dense.from_dense(w), ops.BSR.from_dense(w)):
        want = ops.linear(x, packed)
        for tokens in range(1, 64):
            assert np.array_equal(ops.linear(x[:tokens], packed), want[:tokens]), tokens


def test_partly_filled_quads_lose_nothing(isa, rng):
    w = rng.standard_normal((30, 200)).astype(np.float32)
    w[rng.random(w.shape) < 0.8] = 0
    x = rng.standard_normal((97, 200)).astype(np.float32)
    packed = ops.BSR.from_dense(w)
    assert packed.nnz == np.count_nonzero(w)
    check_linear(ops.linear(x, packed), x, w)


def test_more_rows_than_one_pass_of_accumulators(isa, rng):
    w = block_weight(rng, 1100, 200, 0.7)
    x = rng.standard_normal((97, 200)).astype(np.float32)
    check_linear(ops.linear(x, ops.BSR.from_dense(w)), x, w)


def test_a_row_swapped_within_its_quad_is_caught(isa, rng):
    """The fault that only this kernel can have: sums of a quad's rows in another order."""
    w = block_weight(rng, 16, 120, 0.5)
    x = rng.standard_normal((40, 120)).astype(np.float32)
    y = ops.linear(x, ops.BSR.from_dense(w))
    check_linear(y, x, w)
    with pytest.raises(AssertionError):
        check_linear(y[:, [1, 0, *range(2, 16)]], x, w)


def test_the_packed_kinds_run_their_kernels(isa):
    w = np.eye(8, 20, dtype=np.float32)
    x = np.ones((3, 20), np.float32)
    for packed, op in (
        (ops.BSR.from_dense(w), "quad_panel_f32"),
        (ops.Dense.from_dense(w), "quad_panel_f32"),
        (ops.BSR.from_dense(w, block=(1, 4)), "csr_panel_f32"),
    ):
        _core.take_dispatched()
        ops.linear(x, packed)
        assert any(k.startswith(op) for k in _core.take_dispatched())
    ops.linear(x, packed)
