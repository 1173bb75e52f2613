"""The packed bitmap format: round trips, limits, threads, and that no corruption passes unnoticed."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_check import check_linear
from packed_check import HEADER, aligned_copy, bitmap_bfloat16, checksum, header, to_bfloat16

from pared import _core, nn, ops
from pared.ops import Bitmap


def random_weight(rng, rows: int, cols: int, sparsity: float, dtype=np.float32) -> np.ndarray:
    w = rng.standard_normal((rows, cols))
    w[rng.random((rows, cols)) < sparsity] = 0
    return w.astype(dtype)


# ---- round trips


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("cols", [0, 1, 3, 4, 5, 511, 512, 513, 1030])
@pytest.mark.parametrize("rows", [0, 1, 16, 37, 530])
def test_round_trip(rng, rows, cols, sparsity):
    w = random_weight(rng, rows, cols, sparsity)
    b = Bitmap.from_dense(w)
    b.validate()
    assert b.shape == (rows, cols)
    assert b.nnz == np.count_nonzero(w)
    assert b.sparsity == pytest.approx(1 - b.nnz / w.size if w.size else 0.0)
    assert np.array_equal(b.to_dense(), w)


@settings(max_examples=60)
@given(
    rows=st.integers(0, 70),
    cols=st.integers(0, 600),
    density=st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0]),
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
    transposed=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_round_trip_of_any_matrix(rows, cols, density, dtype, transposed, seed):
    rng = np.random.default_rng(seed)
    w = torch.from_numpy(random_weight(rng, rows, cols, 1 - density)).to(getattr(torch, dtype))
    w = w.T if transposed else w
    b = Bitmap.from_dense(w)
    b.validate()
    assert b.dtype == dtype
    assert torch.equal(Bitmap(torch.from_numpy(b.packed)).to_dense(), w)


@settings(max_examples=80)
@given(
    tokens=st.integers(0, 40),
    rows=st.integers(0, 60),
    cols=st.integers(0, 600),
    sparsity=st.sampled_from([0.0, 0.5, 0.8, 0.95, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    has_bias=st.booleans(),
    activation=st.sampled_from([None, "relu", "gelu", "gelu_tanh", "silu"]),
    level=st.sampled_from(_core.supported_isas()),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_product(tokens, rows, cols, sparsity, dtype, has_bias, activation, level, seed):
    rng = np.random.default_rng(seed)
    w = random_weight(rng, rows, cols, sparsity)
    x = torch.from_numpy(rng.standard_normal((tokens, cols)).astype(np.float32)).to(dtype)
    bias = torch.from_numpy(rng.standard_normal(rows).astype(np.float32)) if has_bias else None
    before = _core.set_isa(level)
    try:
        y = ops.linear(x, Bitmap.from_dense(w), bias, activation)
    finally:
        _core.set_isa(before)
    assert y.dtype == dtype
    check_linear(y, x, w, bias, activation, str(dtype).removeprefix("torch."))


@pytest.mark.parametrize(("dtype", "value"), [("float32", 4), ("float16", 4), ("bfloat16", 2)])
def test_size_is_the_values_and_a_bit_an_element(rng, dtype, value):
    for sparsity in (0.5, 0.8, 0.9, 0.95):
        for shape in ((768, 768), (3072, 768), (384, 384)):
            w = torch.from_numpy(random_weight(rng, *shape, sparsity)).to(getattr(torch, dtype))
            b = Bitmap.from_dense(w)
            assert b.nbytes <= value * b.nnz + shape[0] * shape[1] / 8 + shape[0] + 1024


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [Bitmap, ops.BitmapCSR])
def test_weights_of_16_bits_give_the_bits_of_float32(isa, rng, dtype, kind):
    for tokens in (1, 2, 5, 16, 19):
        for rows, cols in ((16, 512), (37, 515), (530, 130), (3, 1)):
            w = torch.from_numpy(random_weight(rng, rows, cols, 0.7)).to(dtype)
            w[0, 0], w[-1, -1] = torch.finfo(dtype).tiny, -torch.finfo(dtype).max
            x = torch.from_numpy(rng.standard_normal((tokens, cols)).astype(np.float32)).to(dtype)
            narrow, wide = kind.from_dense(w), kind.from_dense(w.float())
            assert narrow.dtype == str(dtype).removeprefix("torch.")
            assert torch.equal(ops.linear(x, narrow), ops.linear(x, wide))


def test_packed_bfloat16_is_what_a_second_implementation_writes(rng):
    for rows, cols in ((0, 5), (1, 1), (16, 8), (37, 515), (530, 1030), (513, 256)):
        w = to_bfloat16(random_weight(rng, rows, cols, 0.6))
        wide = Bitmap.from_dense(w).packed
        packed = Bitmap.from_dense(torch.from_numpy(w).bfloat16()).packed
        assert np.array_equal(packed, bitmap_bfloat16(w, wide))


def test_same_weight_same_bytes(rng):
    w = random_weight(rng, 67, 690, 0.8)
    buffers = [Bitmap.from_dense(w).packed.tobytes() for _ in range(3)]
    assert buffers[0] == buffers[1] == buffers[2]


def test_values_that_are_not_stored():
    w = np.array([[1.0, -0.0, 0.0, 1e-40, -1e-45, np.finfo(np.float32).tiny, -2.0]], np.float32)
    b = Bitmap.from_dense(w)
    b.validate()
    assert b.nnz == 3
    expected = np.array([[1.0, 0, 0, 0, 0, np.finfo(np.float32).tiny, -2.0]], np.float32)
    assert np.array_equal(b.to_dense(), expected)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_weights_are_refused(rng, bad):
    w = random_weight(rng, 20, 130, 0.9)
    w[13, 99] = bad
    with pytest.raises(ValueError, match=r"weight: expected finite values, got NaN or infinity in row 13"):
        Bitmap.from_dense(w)


# ---- threads, views


def test_module(rng):
    plain = torch.nn.Linear(70, 30)
    with torch.no_grad():
        plain.weight.mul_(torch.rand(30, 70) < 0.3)
    module = nn.Linear.from_module(plain, format="bitmap", activation="relu")
    x = torch.randn(2, 3, 70)
    torch.testing.assert_close(module(x), plain(x).detach().relu(), atol=1e-5, rtol=1e-5)
    assert "format=bitmap" in repr(module)
    assert torch.equal(module.to_module().weight, plain.weight)
    twin = nn.Linear.from_module(torch.nn.Linear(70, 30), format="bitmap", activation="relu")
    twin.load_state_dict(module.state_dict())
    assert torch.equal(twin(x), module(x))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), module(x))


# ---- bad input


def test_bad_arguments():
    w = np.ones((4, 4), np.float32)
    cases = [
        (TypeError, r"weight: expected a numpy array or a torch tensor, got list", [[1.0]]),
        (TypeError, r"weight: expected dtype .*, got float64", w.astype(np.float64)),
        (ValueError, r"weight: expected shape \[\*, \*\]|weight: expected shape", w[0]),
        (ValueError, r"weight: expected shape", w[None]),
    ]
    for error, message, argument in cases:
        with pytest.raises(error, match=message):
            Bitmap.from_dense(argument)
    with pytest.raises(ValueError, match="groups: expected 1 for a linear weight, got 2"):
        Bitmap.from_dense(w, groups=2)
    with pytest.raises(ValueError, match="expected a bitmap buffer, got a csr one"):
        Bitmap(ops.CSR.from_dense(w).packed)
    packed, x = Bitmap.from_dense(w), np.ones((2, 4), np.float32)
    with pytest.raises(ValueError, match="x: expected a last dimension of 4"):
        ops.linear(x[:, :3], packed)
    with pytest.raises(ValueError, match="bias: expected shape"):
        ops.linear(x, packed, np.ones(3, np.float32))
    with pytest.raises(ValueError, match=r"w: expected .*kernel, got|w: expected a convolution"):
        ops.conv2d(np.ones((1, 4, 3, 3), np.float32), packed)


# ---- corruption


@pytest.fixture
def packed(rng) -> np.ndarray:
    return aligned_copy(Bitmap.from_dense(random_weight(rng, 40, 600, 0.8)).packed)


def check(packed: np.ndarray) -> None:
    Bitmap(packed).validate()


def test_planted_faults_behind_a_valid_checksum(packed):
    """Someone who recomputes the checksum still does not get a wrong structure past validate()."""
    h = header(packed)
    starts = packed[int(h["starts_at"]) :].view(np.uint32)
    masks = packed[int(h["counts_at"]) :].view(np.uint16)
    values = packed[int(h["values_at"]) :].view(np.float32)
    # 3 groups of 600 vectors: K blocks of 512 and 88, the third group with 8 rows.
    third = 2 * 512 + 5
    faults = [
        (starts, 1, starts[1] + 1, "expected start"),
        (starts, 6, starts[6] - 1, "non-zeros, got"),
        (masks, 0, masks[0] ^ 1, "expected start|non-zeros|exceed|invalid value"),
        (masks, third, masks[third] | 0x8000, "beyond"),
        (values, 5, 0.0, "invalid value"),
        (values, 5, np.nan, "invalid value"),
        (values, 5, np.inf, "invalid value"),
        (values, 5, 1e-40, "invalid value"),
    ]
    for section, at, value, message in faults:
        old = section[at].copy()
        section[at] = value
        h["checksum"] = checksum(packed)
        with pytest.raises(ValueError, match=message):
            check(packed)
        section[at] = old
    h["checksum"] = checksum(packed)
    check(packed)


def test_truncated_grown_and_misaligned_buffers(packed):
    for size in (0, 1, 63, HEADER.itemsize, packed.size - 64, packed.size - 1):
        with pytest.raises(ValueError, match="packed weight: expected"):
            check(packed[:size])
    with pytest.raises(ValueError, match=r"packed weight: expected .* bytes, got"):
        check(aligned_copy(packed, extra=64))


def test_copies_and_pickles_stay_aligned(rng):
    w = random_weight(rng, 20, 70, 0.7)
    for b in (Bitmap.from_dense(w), Bitmap(torch.from_numpy(Bitmap.from_dense(w).packed))):
        for twin in (copy.deepcopy(b), copy.copy(b), pickle.loads(pickle.dumps(b))):
            twin.validate()
            assert np.array_equal(np.asarray(twin.to_dense()), w)
