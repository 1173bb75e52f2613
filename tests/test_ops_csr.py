"""The packed CSR format: round trips, interchange, limits, and that no corruption passes unnoticed."""

from __future__ import annotations

import copy
import pickle
import warnings

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_check import HEADER, aligned_copy, checksum, header

from pared import _core
from pared.ops import BSR, CSR

SIZES = [0, 1, 2, 15, 16, 17, 79, 80, 81, 97, 127, 128, 129, 239, 240, 241, 255, 256, 257, 512]


def random_weight(rng, rows: int, cols: int, sparsity: float, dtype=np.float32) -> np.ndarray:
    w = rng.standard_normal((rows, cols))
    w[rng.random((rows, cols)) < sparsity] = 0
    return w.astype(dtype)


# ---- round trips


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 0.97, 1.0])
@pytest.mark.parametrize("cols", SIZES)
@pytest.mark.parametrize("rows", [0, 1, 16, 37])
def test_round_trip(rng, rows, cols, sparsity):
    w = random_weight(rng, rows, cols, sparsity)
    c = CSR.from_dense(w)
    c.validate()
    assert c.shape == (rows, cols)
    assert c.nnz == np.count_nonzero(w)
    assert c.dtype == "float32"
    assert c.nbytes == c.packed.nbytes
    assert c.sparsity == pytest.approx(1 - c.nnz / w.size if w.size else 0.0)
    assert np.array_equal(c.to_dense(), w)
    p, j, v = c.to_csr_arrays()
    assert np.array_equal(scipy.sparse.csr_array((v, j, p), shape=w.shape).toarray(), w)


@settings(max_examples=60)
@given(
    rows=st.integers(0, 70),
    cols=st.integers(0, 300),
    density=st.sampled_from([0.0, 0.01, 0.05, 0.1, 0.3, 0.7, 1.0]),
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_round_trip_of_any_matrix(rows, cols, density, dtype, seed):
    rng = np.random.default_rng(seed)
    w = torch.from_numpy(random_weight(rng, rows, cols, 1 - density)).to(getattr(torch, dtype))
    c = CSR.from_dense(w)
    c.validate()
    assert c.dtype == dtype
    again = CSR(torch.from_numpy(c.packed)).to_dense()
    assert again.dtype == w.dtype
    assert torch.equal(again, w)


def test_size_is_at_most_six_and_a_half_bytes_a_non_zero(rng):
    for sparsity in (0.5, 0.7, 0.8, 0.9, 0.95):
        for shape in ((768, 768), (3072, 768), (384, 384)):
            c = CSR.from_dense(random_weight(rng, *shape, sparsity))
            assert c.nbytes <= 6.5 * c.nnz, (sparsity, shape)
    assert (c := CSR.from_dense(random_weight(rng, 3072, 768, 0.98))).nbytes <= 6.5 * c.nnz


def test_full_rows_in_blocks_of_256_are_counted(rng):
    """A run counts to 255: weights this sparse have K blocks of 256 units, unless a row fills one."""
    w = random_weight(rng, 100, 513, 0.97)
    w[70, 256:511] = 1
    w[70, 511] = 0
    for value, depth in ((0, 256), (1, 240)):
        w[70, 511] = value
        c = CSR.from_dense(w)
        assert header(c.packed)["block_k"] == depth
        assert np.array_equal(c.to_dense(), w)
        assert np.array_equal(CSR.from_scipy(scipy.sparse.csr_array(w)).packed, c.packed)


def test_same_weight_same_bytes(rng):
    """Packing is deterministic and leaves no uninitialised byte: files and caches may compare buffers."""
    w = random_weight(rng, 67, 190, 0.8)
    buffers = [CSR.from_dense(w).packed.tobytes() for _ in range(3)]
    assert buffers[0] == buffers[1] == buffers[2]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_strided_weights(rng, dtype):
    w = random_weight(rng, 60, 222, 0.7, dtype)
    for view in (w.T, w[::2], w[:, 1::3], w[::-1, ::-1], np.asfortranarray(w), w[5:5], w[:, :1]):
        assert np.array_equal(CSR.from_dense(view).to_dense(), view)
    t = torch.from_numpy(w)
    assert np.array_equal(CSR.from_dense(t.T).to_dense(), w.T)
    assert np.array_equal(CSR.from_dense(t[:, None, 0].expand(-1, 20)).to_dense(), np.repeat(w[:, :1], 20, 1))


def test_values_that_are_not_stored(rng):
    """-0.0 and denormals are zeros to the kernels: a denormal operand stalls them and moves nothing."""
    w = np.array([[1.0, -0.0, 0.0, 1e-40, -1e-45, np.finfo(np.float32).tiny, -2.0]], np.float32)
    c = CSR.from_dense(w)
    c.validate()
    assert c.nnz == 3
    expected = np.array([[1.0, 0, 0, 0, 0, np.finfo(np.float32).tiny, -2.0]], np.float32)
    assert np.array_equal(c.to_dense(), expected)
    # float16's denormals are normal numbers in float32 and stay.
    half = np.array([[6e-8, -3e-5, 0.0, -0.0, 65504.0]], np.float16)
    assert np.array_equal(CSR.from_dense(half).to_dense(), half)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_non_finite_weights_are_refused(rng, bad, dtype):
    w = torch.from_numpy(random_weight(rng, 20, 130, 0.9)).to(getattr(torch, dtype))
    w[13, 99] = bad
    with pytest.raises(ValueError, match=r"weight: expected finite values, got NaN or infinity in row 13"):
        CSR.from_dense(w)
    if dtype == "float32":
        with pytest.raises(ValueError, match=r"weight: expected finite values, .* row 13"):
            CSR.from_scipy(scipy.sparse.csr_array(w.numpy()))


# ---- interchange


@pytest.mark.parametrize("kind", ["csr_array", "csc_array", "coo_array", "csr_matrix", "dok_array"])
@pytest.mark.parametrize("index", [np.int32, np.int64])
def test_scipy(rng, kind, index):
    w = random_weight(rng, 41, 173, 0.85)
    m = getattr(scipy.sparse, kind)(w)
    if hasattr(m, "indptr"):
        m.indptr, m.indices = m.indptr.astype(index), m.indices.astype(index)
    c = CSR.from_scipy(m)
    c.validate()
    back = c.to_scipy()
    assert isinstance(back, scipy.sparse.csr_array)
    assert np.array_equal(back.toarray(), w)
    assert back.has_sorted_indices


def test_scipy_with_duplicates_disorder_and_stored_zeros():
    m = scipy.sparse.csr_array(
        (np.array([1.0, 2.0, 4.0, 0.0], np.float32), np.array([3, 1, 3, 0]), np.array([0, 4, 4])),
        shape=(2, 5),
    )
    before = m.data.copy(), m.indices.copy()
    c = CSR.from_scipy(m)
    assert np.array_equal(c.to_dense(), [[0, 2, 0, 5, 0], [0] * 5])
    assert c.nnz == 2
    assert np.array_equal(m.data, before[0])  # the caller's matrix is as it was
    assert np.array_equal(m.indices, before[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_torch_sparse(rng, dtype):
    w = torch.from_numpy(random_weight(rng, 41, 173, 0.85)).to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its sparse layout a prototype
        sparse = w.to_sparse_csr()
    c = CSR.from_torch(sparse)
    c.validate()
    assert torch.equal(CSR(torch.from_numpy(c.packed)).to_dense(), w)


def test_scipy_matrices_of_another_dtype_are_refused_by_name(rng):
    w = random_weight(rng, 16, 16, 0.5)
    for pack, matrix in ((CSR, scipy.sparse.csr_array(w)), (BSR, scipy.sparse.bsr_array(w))):
        for dtype in (np.float64, np.int32):
            with pytest.raises(TypeError, match=r"matrix: expected dtype float32 or float16, got .*\.astype"):
                pack.from_scipy(matrix.astype(dtype))


def test_one_packing_whatever_the_source(rng):
    w = random_weight(rng, 41, 173, 0.85)
    expected = CSR.from_dense(w).packed
    assert np.array_equal(CSR.from_scipy(scipy.sparse.csr_array(w)).packed, expected)
    assert np.array_equal(CSR.from_dense(torch.from_numpy(w).requires_grad_()).packed, expected)


def test_packed_tensor_and_array_are_the_same_weight(rng):
    w = random_weight(rng, 33, 100, 0.6)
    c = CSR.from_dense(w)
    t = CSR(torch.from_numpy(c.packed))
    assert isinstance(t.to_dense(), torch.Tensor)
    assert isinstance(c.to_dense(), np.ndarray)
    assert np.array_equal(t.to_dense().numpy(), w)
    assert "shape=(33, 100)" in repr(t)


# ---- bad input


def test_bad_arguments():
    w = np.ones((4, 4), np.float32)
    meta, dense = torch.ones(2, 2, device="meta"), torch.ones(2, 2)
    pack = CSR.from_dense
    cases = [
        (TypeError, r"weight: expected a numpy array or a torch tensor, got list", pack, [[1.0]]),
        (TypeError, r"weight: expected dtype .*, got float64", pack, w.astype(np.float64)),
        (TypeError, r"weight: expected dtype .*, got int32", pack, w.astype(np.int32)),
        (TypeError, r"weight: expected a dtype of .* got >f4", pack, w.astype(">f4")),
        (TypeError, r"weight: expected a CPU tensor, got one on meta", pack, meta),
        (ValueError, r"weight: expected \[out, in\] .*, got \[4\]", pack, w[0]),
        (ValueError, r"weight: expected \[out, in\] .*, got \[1, 4, 4\]", pack, w[None]),
        (TypeError, r"tensor: expected .* torch.sparse_csr", CSR.from_torch, dense),
        (TypeError, r"tensor: expected .* torch.sparse_csr", CSR.from_torch, w),
        (TypeError, r"packed: expected dtype uint8, got float32", CSR, w.reshape(-1)),
        (ValueError, r"packed weight: expected at least", CSR, np.zeros(8, np.uint8)),
    ]
    for error, message, call, argument in cases:
        with pytest.raises(error, match=message):
            call(argument)


def csr_parts(rng):
    m = scipy.sparse.csr_array(random_weight(rng, 6, 9, 0.5))
    return m.indptr.astype(np.int64), m.indices.astype(np.int64), m.data


def test_bad_csr_structure(rng):
    p, c, v = csr_parts(rng)

    def pack(p=p, c=c, v=v, rows=6, cols=9):
        return _core.csr_pack_csr(p, c, v, rows, cols)

    def changed(a, at, value):
        a = a.copy()
        a[at] = value
        return a

    cases = [
        (r"crow_indices: expected to start at 0", {"p": changed(p, 0, 1)}),
        (r"crow_indices: expected a non-decreasing sequence", {"p": changed(p, 2, 10**9)}),
        (r"crow_indices: expected a non-decreasing sequence", {"p": changed(p, 3, -1)}),
        (r"crow_indices: expected the last entry to be", {"p": changed(p, 6, p[6] + 1)}),
        (r"crow_indices: expected shape \[8\]", {"rows": 7}),
        (r"col_indices: expected ascending unique columns below 9", {"c": changed(c, p[1], 9)}),
        (r"col_indices: expected ascending unique columns", {"c": changed(c, p[1], -1)}),
        (r"col_indices: expected ascending unique columns below 1", {"cols": 1}),
        (r"col_indices: expected shape|values: expected shape", {"v": v[:-1]}),
        (r"shape: expected non-negative sizes", {"rows": -1}),
    ]
    pack()
    for message, arguments in cases:
        with pytest.raises(ValueError, match=message):
            pack(**arguments)
    with pytest.raises(ValueError, match="ascending unique"):
        pack(c=changed(c, slice(p[0], p[1]), 2)) if p[1] - p[0] > 1 else pack(c=c[::-1].copy())
    with pytest.raises(TypeError, match=r"col_indices: expected dtype int64, got int32"):
        pack(c=c.astype(np.int32))
    with pytest.raises(TypeError, match=r"values: expected dtype"):
        pack(v=v.astype(np.float64))


def test_more_rows_than_the_format_holds_are_refused():
    with pytest.raises(ValueError, match=r"weight: expected sizes from 0 to 2\^48"):
        _core.csr_pack_csr(np.zeros(1, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32), 0, 1 << 60)


# ---- corruption


@pytest.fixture
def packed(rng) -> np.ndarray:
    return aligned_copy(CSR.from_dense(random_weight(rng, 40, 200, 0.8)).packed)


def test_header_layout(packed):
    h = header(packed)
    assert h["magic"] == b"PAREDPK1"
    assert (h["rows"], h["cols"]) == (40, 200)
    assert h["bytes"] == packed.size
    assert h["starts_at"] % 64 == h["counts_at"] % 64 == h["values_at"] % 64 == h["offsets_at"] % 64 == 0


def test_runs_are_sorted_by_length(packed, rng):
    """In each row group and K block every row has its place, and those that exist come shortest first."""
    w = np.asarray(CSR(packed).to_dense())
    h = header(packed)
    depth = int(h["block_k"])
    blocks, groups = -(-200 // depth), 3
    runs = packed[int(h["counts_at"]) :][: groups * blocks * 16 * 2].reshape(groups, blocks, 16, 2)
    unsorted = 0
    for g in range(groups):
        real = min(16, 40 - 16 * g)
        for b in range(blocks):
            counts, slots = runs[g, b].T.astype(int)
            part = w[16 * g : 16 * g + 16, b * depth : (b + 1) * depth]
            assert sorted(slots) == list(range(16))
            assert counts[:real].tolist() == [np.count_nonzero(part[s]) for s in slots[:real]]
            assert (np.diff(counts[:real]) >= 0).all()
            assert not counts[real:].any()
            unsorted += slots.tolist() != sorted(slots)
    assert unsorted == groups * blocks


def check(packed: np.ndarray) -> None:
    CSR(packed).validate()


def test_planted_faults_behind_a_valid_checksum(packed):
    """Someone who recomputes the checksum still does not get a wrong structure past validate()."""
    h = header(packed)
    types = {"starts": np.uint32, "counts": np.uint8, "values": np.float32, "offsets": np.uint16}
    section = {name: packed[int(h[f"{name}_at"]) :].view(dtype) for name, dtype in types.items()}
    nnz = int(h["nnz"])
    faults = [
        ("counts", 0, section["counts"][0] + 1, "invalid column offset|expected start|counts exceed"),
        ("counts", 0, section["counts"][0] - 1, "invalid column offset|expected start"),
        ("counts", 1, section["counts"][3], "expected each row once"),
        ("counts", 1, 16, "expected each row once"),
        ("starts", 1, section["starts"][1] + 1, "expected start"),
        ("values", 5, 0.0, "invalid value"),
        ("values", 5, np.nan, "invalid value"),
        ("values", 5, np.inf, "invalid value"),
        ("values", 5, 1e-40, "invalid value"),
        ("offsets", 0, section["offsets"][0] + 4, "invalid column offset"),
        ("offsets", 1, section["offsets"][0], "invalid column offset"),
        ("offsets", nnz - 1, 65535, "invalid column offset"),
    ]
    for name, at, value, message in faults:
        old = section[name][at].copy()
        section[name][at] = value
        h["checksum"] = checksum(packed)
        with pytest.raises(ValueError, match=message):
            check(packed)
        section[name][at] = old
    h["checksum"] = checksum(packed)
    check(packed)


def test_truncated_grown_and_misaligned_buffers(packed):
    for size in (0, 1, 63, HEADER.itemsize - 1, HEADER.itemsize, packed.size - 64, packed.size - 1):
        with pytest.raises(ValueError, match="packed weight: expected"):
            check(packed[:size])
    with pytest.raises(ValueError, match=r"packed weight: expected .* bytes, got"):
        check(aligned_copy(packed, extra=64))
    shifted = aligned_copy(packed, extra=8)[8:]
    shifted[:] = packed
    with pytest.raises(ValueError, match="packed weight: expected 64-byte aligned memory"):
        check(shifted)
    with pytest.raises(ValueError, match="packed: expected contiguous memory"):
        check(aligned_copy(packed, extra=packed.size)[::2])
    with pytest.raises(ValueError, match="packed: expected shape"):
        check(packed.reshape(-1, 64))


def test_copies_and_pickles_stay_aligned(rng):
    """numpy's own copies start anywhere: the kernels would refuse them."""
    weights = [random_weight(rng, 20, 70, 0.7) for _ in range(8)]
    for w in weights:
        for c in (CSR.from_dense(w), CSR(torch.from_numpy(CSR.from_dense(w).packed))):
            for twin in (copy.deepcopy(c), copy.copy(c), pickle.loads(pickle.dumps(c))):
                twin.validate()
                assert type(twin.packed) is type(c.packed)
                assert np.array_equal(np.asarray(twin.to_dense()), w)
            deep = copy.deepcopy(c)
            deep.packed[-1] = 1
            c.validate()
