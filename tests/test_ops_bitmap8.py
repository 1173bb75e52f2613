"""`pared.ops.Bitmap8`: round trips, the dense format's outputs, and that no corruption passes unnoticed."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from int8_check import quantize_weight
from packed_check import aligned_copy, checksum, header

from pared import _core, nn, ops
from pared.ops import Bitmap8


def random_weight(rng, rows: int, cols: int, sparsity: float) -> np.ndarray:
    w = rng.standard_normal((rows, cols)).astype(np.float32)
    w[rng.random((rows, cols)) < sparsity] = 0
    return w


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("cols", [0, 1, 4, 5, 16, 17, 511, 512, 513, 1030])
@pytest.mark.parametrize("rows", [0, 1, 16, 37, 530])
def test_round_trip(rng, rows, cols, sparsity):
    w = random_weight(rng, rows, cols, sparsity)
    b = Bitmap8.from_dense(w)
    b.validate()
    q, scales = quantize_weight(w)
    assert b.shape == (rows, cols)
    assert b.nnz == np.count_nonzero(q)
    assert np.array_equal(b.to_quantized()[0], q)
    assert np.array_equal(b.to_quantized()[1], scales)
    assert np.array_equal(b.to_dense(), q.astype(np.float32) * scales[:, None])


@settings(max_examples=60)
@given(
    tokens=st.integers(0, 40),
    rows=st.integers(0, 70),
    cols=st.integers(0, 600),
    sparsity=st.sampled_from([0.0, 0.5, 0.9, 0.99, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    level=st.sampled_from(_core.supported_isas()),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_outputs_of_the_dense_format(tokens, rows, cols, sparsity, dtype, level, seed):
    rng = np.random.default_rng(seed)
    q = rng.integers(-128, 128, (rows, cols)).astype(np.int8)
    q[rng.random(q.shape) < sparsity] = 0
    scales = rng.random(rows).astype(np.float32)
    sparse, dense = Bitmap8.from_quantized(q, scales), ops.Int8.from_quantized(q, scales)
    sparse.validate()
    assert np.array_equal(sparse.to_quantized()[0], q)
    x = torch.from_numpy(rng.standard_normal((tokens, cols)).astype(np.float32)).to(dtype)
    before = _core.set_isa(level)
    try:
        assert torch.equal(ops.linear(x, sparse), ops.linear(x, dense))
    finally:
        _core.set_isa(before)


def test_size_is_a_byte_a_non_zero_and_a_bit_an_element(rng):
    for sparsity in (0.5, 0.8, 0.9):
        for shape in ((768, 768), (3072, 768), (384, 384)):
            b = Bitmap8.from_dense(random_weight(rng, *shape, sparsity))
            assert b.nbytes <= b.nnz + shape[0] * shape[1] / 8 + 11 * shape[0] + 1024


def test_module(rng):
    plain = torch.nn.Linear(70, 30)
    with torch.no_grad():
        plain.weight.mul_(torch.rand(30, 70) < 0.3)
    module = nn.Linear.from_module(plain, format="bitmap8")
    dense = nn.Linear.from_module(plain, format="int8")
    x = torch.randn(2, 3, 70)
    assert torch.equal(module(x), dense(x))
    assert "format=bitmap8" in repr(module)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), module(x))


def test_what_it_says_of_itself(rng):
    w = random_weight(rng, 37, 101, 0.5)
    b = Bitmap8.from_dense(w, activation_scale=0.1, activation_zero=-3)
    assert b.activation == (pytest.approx(0.1), 125)
    assert "Bitmap8(shape=(37, 101)" in repr(b)
    for twin in (copy.deepcopy(b), pickle.loads(pickle.dumps(b))):
        twin.validate()
        assert np.array_equal(twin.packed, b.packed)


def test_bad_arguments():
    w = np.ones((4, 4), np.float32)
    w[2, 1] = np.nan
    with pytest.raises(ValueError, match="weight: expected finite values, got NaN or infinity in row 2"):
        Bitmap8.from_dense(w)
    with pytest.raises(ValueError, match="expected at most 65793"):
        Bitmap8.from_dense(np.ones((1, 65794), np.float32))
    with pytest.raises(ValueError, match="expected a bitmap8 buffer, got a int8 one"):
        Bitmap8(ops.Int8.from_dense(np.ones((4, 4), np.float32)).packed)


# ---- corruption


@pytest.fixture
def packed(rng) -> np.ndarray:
    return aligned_copy(Bitmap8.from_dense(random_weight(rng, 40, 600, 0.8)).packed)


def check(packed: np.ndarray) -> None:
    Bitmap8(packed).validate()


def test_planted_faults_behind_a_valid_checksum(packed):
    h = header(packed)
    tail = packed[128:144].view(np.uint64)  # scales and compensation
    starts = packed[int(h["starts_at"]) :].view(np.uint32)
    masks = packed[int(h["counts_at"]) :].view(np.uint64)
    values = packed[int(h["values_at"]) :].view(np.int8)
    scales = packed[int(tail[0]) : int(tail[0]) + 192].view(np.float32)
    compensation = packed[int(tail[1]) : int(tail[1]) + 192].view(np.int32)
    # 3 groups of 152 vectors (600 inputs and padding): K blocks of 128 and 24, the third group with 8 rows.
    third, padding = 2 * 128 + 5, 3 * 128 + 22
    top = np.uint64(1 << 63)
    faults = [
        (starts, 1, starts[1] + 1, "expected start"),
        (starts, 6, starts[6] - 1, "non-zeros, got"),
        (masks, 0, masks[0] ^ np.uint64(1), "expected start|non-zeros|exceed|compensation|invalid"),
        (masks, third, masks[third] | top, "beyond"),
        (masks, padding, masks[padding] | np.uint64(1), "beyond"),
        (values, 5, 0, "invalid value"),
        (values, 5, values[5] ^ 2, "expected compensation"),
        (scales, 3, np.nan, "invalid scale"),
        (scales, 3, -1.0, "invalid scale"),
        (scales, 47, 1.0, "invalid scale"),
        (compensation, 8, compensation[8] + 1, "expected compensation"),
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
