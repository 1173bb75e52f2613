"""BSR and dense packed weights: round trips, interchange, sizes, errors, corrupt buffers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pared import _core, ops


def blocks(rng, rows: int, cols: int, r: int, c: int, sparsity: float) -> np.ndarray:
    w = rng.standard_normal((rows, cols)).astype(np.float32)
    keep = rng.random((-(-rows // r), -(-cols // c))) >= sparsity
    return w * np.kron(keep, np.ones((r, c)))[:rows, :cols].astype(np.float32)


@given(
    rows=st.integers(0, 40),
    cols=st.integers(0, 230),
    block=st.sampled_from([(4, 1), (16, 1), (1, 4), (4, 4), (16, 4), (32, 32), (64, 64), (3, 2), (8, 5)]),
    sparsity=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_round_trip(rows, cols, block, sparsity, seed):
    w = blocks(np.random.default_rng(seed), rows, cols, *block, sparsity)
    for packed in (ops.BSR.from_dense(w, block=block), ops.Dense.from_dense(w)):
        packed.validate()
        assert np.array_equal(packed.to_dense(), w)
        assert packed.nnz == np.count_nonzero(w)
        assert packed.shape == w.shape
        p, c, v = packed.to_csr_arrays()
        rows_of = np.repeat(np.arange(rows), np.diff(p))
        again = np.zeros_like(w)
        again[rows_of, c] = v
        assert np.array_equal(again, w)


def test_sizes(rng):
    w = blocks(rng, 768, 768, 4, 1, 0.8)
    assert ops.BSR.from_dense(w).nbytes <= 4.6 * np.count_nonzero(w)
    assert ops.Dense.from_dense(rng.standard_normal((768, 768)).astype(np.float32)).nbytes <= 4.6 * 768 * 768


def test_convolution_weights_fold_groups(rng):
    w = rng.standard_normal((8, 6, 3, 3)).astype(np.float32)
    for groups in (1, 2, 4):
        packed = ops.Dense.from_dense(w, groups=groups)
        packed.validate()
        assert packed.shape == w.shape
        assert np.array_equal(packed.to_dense(), w)


@pytest.mark.filterwarnings("ignore:Sparse BSR tensor support is in beta state")
def test_scipy_and_torch_interchange(rng):
    scipy_sparse = pytest.importorskip("scipy.sparse")
    torch = pytest.importorskip("torch")
    w = blocks(rng, 32, 48, 4, 4, 0.7)
    packed = ops.BSR.from_scipy(scipy_sparse.bsr_array(w, blocksize=(4, 4)))
    assert np.array_equal(packed.to_dense(), w)
    assert np.array_equal(packed.to_scipy().toarray(), w)
    t = torch.from_numpy(w)
    assert np.array_equal(ops.BSR.from_torch(t.to_sparse_bsr((4, 4))).to_dense(), w)
    with pytest.raises(TypeError, match=r"tensor: expected a two-dimensional torch\.sparse_bsr tensor"):
        ops.BSR.from_torch(t)
    with pytest.raises(TypeError, match="matrix: expected a scipy BSR matrix"):
        ops.BSR.from_scipy(w)


@pytest.mark.filterwarnings("ignore:Sparse BSR tensor support is in beta state")
@pytest.mark.parametrize("block", [(4, 1), (16, 1), (1, 4), (16, 4), (32, 32), (64, 64), (3, 2), (2, 8)])
def test_interchange_both_ways(rng, block):
    scipy_sparse = pytest.importorskip("scipy.sparse")
    torch = pytest.importorskip("torch")
    w = blocks(rng, 2 * 192, 192, *block, 0.7)
    packed = ops.BSR.from_dense(w, block=block)
    matrix = packed.to_scipy(block)
    assert isinstance(matrix, scipy_sparse.bsr_array)
    assert matrix.blocksize == block
    assert np.array_equal(matrix.toarray(), w)
    assert np.array_equal(ops.BSR.from_scipy(matrix).packed, packed.packed)
    tensor = packed.to_torch(block)
    assert tensor.layout == torch.sparse_bsr
    assert tuple(tensor.values().shape[1:]) == block
    assert np.array_equal(tensor.to_dense().numpy(), w)
    assert np.array_equal(ops.BSR.from_torch(tensor).packed, packed.packed)
    with pytest.raises(ValueError, match=r"block: expected sizes that divide \[384, 192\], got \(5, 1\)"):
        packed.to_scipy((5, 1))


@pytest.mark.parametrize("block", [(0, 1), (4,), (4, 1, 1), "4x1", (4.0, 1), None])
def test_bad_blocks(block):
    with pytest.raises(ValueError, match="block: expected two positive integers"):
        ops.BSR.from_dense(np.eye(4, dtype=np.float32), block=block)


def test_one_kind_is_not_another():
    packed = ops.CSR.from_dense(np.eye(4, dtype=np.float32)).packed
    with pytest.raises(ValueError, match="packed weight: expected a bsr buffer, got a csr one"):
        ops.BSR(packed)
    with pytest.raises(ValueError, match="kind: expected csr, bsr or dense, got 'coo'"):
        _core.csr_pack_dense(np.eye(4, dtype=np.float32), 1, "coo", 1)
    with pytest.raises(ValueError, match="entry_rows: expected 1 or 4, got 3"):
        _core.csr_pack_dense(np.eye(4, dtype=np.float32), 1, "bsr", 3)


def test_every_flipped_byte_is_caught(rng):
    packed = ops.BSR.from_dense(blocks(rng, 9, 20, 4, 1, 0.5))
    for i in range(packed.packed.size):
        packed.packed[i] ^= 0x41
        with pytest.raises(ValueError, match="packed weight"):
            packed.validate()
        packed.packed[i] ^= 0x41
    packed.validate()
