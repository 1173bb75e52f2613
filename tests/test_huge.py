"""More than 2**31 elements: 9 GB of memory, some minutes. ``make test-huge`` runs it."""

from __future__ import annotations

import os

import numpy as np
import pytest

from pared import ops

pytestmark = pytest.mark.skipif(
    "PARED_TEST_HUGE" not in os.environ, reason="needs 9 GB of memory: make test-huge"
)

BEYOND = (1 << 31) + 24


def test_selection_counts_beyond_32_bits() -> None:
    x = np.zeros(BEYOND, np.float16)
    top = [5, (1 << 31) - 1, 1 << 31, BEYOND - 1]
    x[top] = [3, -4, 5, -6]
    found = ops.select_threshold(x, 3)
    assert found == (4.0, 2, 1)
    # Of the zeros, 2**31 are selected: up to the one behind the last of the lowest indices.
    mask = ops.topk_mask(x, (1 << 31) + 4)
    assert np.count_nonzero(mask) == (1 << 31) + 4
    assert mask[top].all()
    assert mask[: (1 << 31) + 2].all()
    assert not mask[(1 << 31) + 3 : BEYOND - 1].any()
    values, indices = ops.topk(x, 4)
    assert values.tolist() == [-6, 5, -4, 3]
    assert indices.tolist() == top[::-1]


def test_blocks_and_groups_beyond_32_bits() -> None:
    x = np.zeros((BEYOND // 8, 8), np.float16)
    x[-1, 4:] = 2
    x[-1, :4] = 1
    x[-2, 1] = 3
    blocks = ops.block_mask(x, 2, (1, 4))
    assert np.count_nonzero(blocks) == 8
    assert blocks[-1].all()
    del blocks
    groups = ops.nm_mask(x, 1, 4)
    assert np.count_nonzero(groups) == x.size // 4
    assert groups[-2].tolist() == [False, True, False, False, True, False, False, False]


def test_linear_inputs_and_outputs_beyond_32_bits() -> None:
    tokens = BEYOND // 512 + 1
    x = np.zeros((tokens, 512), np.float16)
    x[-1] = 1
    x[0] = 2
    w = np.zeros((4, 512), np.float32)
    w[0] = 1
    w[3, 511] = -0.5
    for format in (ops.CSR, ops.BSR, ops.Bitmap, ops.Int8):
        y = ops.linear(x, format.from_dense(w))
        assert np.allclose(y[[0, -1]], [[1024, 0, 0, -1], [512, 0, 0, -0.5]], rtol=0.01), format
        assert not y[1:-1].any(), format
    del x, y
    x = np.zeros((tokens, 4), np.float16)
    x[-1] = 1
    y = ops.linear(x, ops.CSR.from_dense(np.ascontiguousarray(w.T)))
    assert y.size > 1 << 31
    assert y[-1].sum() == 512 - 0.5
    assert not y[:-1].any()


def test_a_weight_of_many_rows() -> None:
    rows = 1 << 24
    w = np.zeros((rows, 2), np.float32)
    w[::3, 1] = 2
    packed = ops.CSR.from_dense(w)
    y = ops.linear(np.ones((1, 2), np.float32), packed)
    assert np.array_equal(y[0], w.sum(1))
    assert np.array_equal(packed.to_dense(), w)
