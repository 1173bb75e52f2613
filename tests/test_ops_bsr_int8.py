"""int8 block weights: round trips, intake of quantised weights, sizes, errors, corrupt buffers."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
from block_int8_check import check_int8, quantize_weight
from hypothesis import given
from hypothesis import strategies as st

from pared import _core, ops


def blocks(rng, rows: int, cols: int, r: int, c: int, sparsity: float) -> np.ndarray:
    w = rng.standard_normal((rows, cols)).astype(np.float32)
    keep = rng.random((-(-rows // r), -(-cols // c))) >= sparsity
    return w * np.kron(keep, np.ones((r, c)))[:rows, :cols].astype(np.float32)


@given(
    rows=st.integers(0, 40),
    cols=st.integers(0, 420),
    block=st.sampled_from([None, (1, 4), (4, 4), (16, 4), (3, 2), (8, 5)]),
    sparsity=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_round_trip(rows, cols, block, sparsity, seed):
    w = blocks(np.random.default_rng(seed), rows, cols, *(block or (4, 4)), sparsity)
    packed = ops.BSRInt8.from_dense(w, block=block)
    packed.validate()
    q, scales = quantize_weight(w)
    values, got_scales = packed.to_quantized()
    assert np.array_equal(values, q)
    assert np.array_equal(got_scales, scales)
    assert packed.nnz == np.count_nonzero(q)
    assert packed.shape == w.shape
    assert np.array_equal(packed.to_dense(), q.astype(np.float32) * scales[:, None])
    assert (np.abs(packed.to_dense() - w) <= scales[:, None] * 0.5001).all()
    again = ops.BSRInt8.from_quantized(values, got_scales, block=block)
    assert np.array_equal(again.packed, packed.packed)


def test_every_int8_value_is_taken(rng):
    q = rng.integers(-128, 128, (19, 70)).astype(np.int8)
    scales = rng.random(19).astype(np.float32)
    packed = ops.BSRInt8.from_quantized(q, scales)
    packed.validate()
    values, got = packed.to_quantized()
    assert np.array_equal(values, q)
    assert np.array_equal(got, scales)
    x = rng.standard_normal((5, 70)).astype(np.float32)
    check_int8(ops.linear(x, packed), x, q, scales)


def test_the_kernel_is_chosen_by_the_zeros(rng):
    assert ops.BSRInt8.from_dense(blocks(rng, 64, 64, 4, 4, 0.5)).block_rows == 4
    assert ops.BSRInt8.from_dense(blocks(rng, 64, 64, 1, 4, 0.5)).block_rows == 1
    assert ops.BSRInt8.from_dense(blocks(rng, 64, 64, 1, 4, 0.0)).block_rows == 4
    assert ops.BSRInt8.from_dense(np.zeros((4, 4), np.float32)).block_rows in (1, 4)


def test_sizes(rng):
    for r, bytes_a_weight in ((1, 1.6), (4, 1.25)):
        w = blocks(rng, 768, 768, r, 4, 0.8)
        packed = ops.BSRInt8.from_dense(w, block=(r, 4))
        assert packed.nbytes <= bytes_a_weight * np.count_nonzero(w) + 8 * 768 + 20_000


@pytest.mark.parametrize(("channels", "groups"), [(6, 1), (6, 2), (4, 4), (3, 1)])
def test_convolution_weights(rng, channels, groups):
    w = rng.standard_normal((12, channels, 3, 2)).astype(np.float32)
    w[rng.random(w.shape) < 0.5] = 0
    for block in ((1, 4), (4, 4)):
        packed = ops.BSRInt8.from_dense(w, block=block, groups=groups)
        packed.validate()
        q, scales = quantize_weight(w)
        values, got = packed.to_quantized()
        assert np.array_equal(values, q)
        assert np.array_equal(got, scales)
        assert packed.shape == w.shape
        assert packed.groups == groups


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_torch_weights(rng, dtype):
    torch = pytest.importorskip("torch")
    w = torch.from_numpy(blocks(rng, 24, 40, 4, 4, 0.5)).to(getattr(torch, dtype))
    packed = ops.BSRInt8.from_dense(w)
    assert packed.dtype == dtype
    assert np.array_equal(packed.to_quantized()[0], quantize_weight(w.float().numpy())[0])
    kept = ops.BSRInt8(torch.from_numpy(packed.packed))
    assert kept.to_dense().dtype == w.dtype
    assert (kept.to_dense() == 0).equal(torch.from_numpy(packed.to_quantized()[0] == 0))


def test_copies_and_pickles(rng):
    packed = ops.BSRInt8.from_dense(blocks(rng, 9, 20, 1, 4, 0.5))
    for other in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        other.validate()
        assert np.array_equal(other.packed, packed.packed)


def test_errors(rng):
    w = np.eye(4, dtype=np.float32)
    for block in [(0, 1), (4,), "4x1", (4.0, 1)]:
        with pytest.raises(ValueError, match="block: expected two positive integers"):
            ops.BSRInt8.from_dense(w, block=block)
    for bad in (np.nan, np.inf, -np.inf):
        broken = w.copy()
        broken[2, 1] = bad
        with pytest.raises(ValueError, match=r"weight: expected finite values, got .* in row 2"):
            ops.BSRInt8.from_dense(broken)
    with pytest.raises(ValueError, match="weight: expected at most 65793 elements a row"):
        ops.BSRInt8.from_dense(np.zeros((1, 65794), np.float32))
    with pytest.raises(TypeError, match="weight: expected a numpy array or a torch tensor"):
        ops.BSRInt8.from_dense([[1.0]])
    with pytest.raises(TypeError, match="weight: expected dtype int8"):
        ops.BSRInt8.from_quantized(w, np.ones(4, np.float32))
    with pytest.raises(TypeError, match="weight: expected dtype"):
        ops.BSRInt8.from_dense(w.astype(np.int8))
    q = np.eye(4, dtype=np.int8)
    with pytest.raises(ValueError, match=r"scales: expected shape \[4\]"):
        ops.BSRInt8.from_quantized(q, np.ones(3, np.float32))
    for bad in (np.nan, np.inf, -1.0):
        with pytest.raises(ValueError, match=r"scales: expected finite positive values, got .* in row 1"):
            ops.BSRInt8.from_quantized(q, np.array([1, bad, 1, 1], np.float32))
    with pytest.raises(ValueError, match="entry_rows: expected 0"):
        _core.bsr8_pack(w, None, 1, 3)
    with pytest.raises(ValueError, match="packed weight: expected a bsr8 buffer, got a csr one"):
        ops.BSRInt8(ops.CSR.from_dense(w).packed)
    with pytest.raises(ValueError, match=r"packed weight: expected int8 blocks \(bsr8\), got kind 1"):
        _core.linear_bsr8(w, ops.CSR.from_dense(w).packed, None, w.copy())


def test_a_weight_of_the_other_operation_is_refused():
    conv = ops.BSRInt8.from_dense(np.ones((4, 3, 2, 2), np.float32)).packed
    with pytest.raises(ValueError, match="packed: expected a linear weight, got a convolution's"):
        _core.linear_bsr8(np.ones((2, 12), np.float32), conv, None, np.ones((2, 4), np.float32))
    linear = ops.BSRInt8.from_dense(np.ones((4, 12), np.float32)).packed
    x, y = np.ones((1, 12, 1, 1), np.float32), np.ones((1, 4, 1, 1), np.float32)
    with pytest.raises(ValueError, match="packed: expected a convolution weight, got a linear one"):
        _core.conv2d_bsr8(x, linear, None, y, (1, 1), (0, 0, 0, 0), (1, 1))


@pytest.mark.parametrize("block", [(1, 4), (4, 4)])
def test_every_flipped_byte_is_caught(rng, block):
    packed = ops.BSRInt8.from_dense(blocks(rng, 9, 20, *block, 0.5), block=block)
    for i in range(packed.packed.size):
        packed.packed[i] ^= 0x41
        with pytest.raises(ValueError, match="packed weight"):
            packed.validate()
        packed.packed[i] ^= 0x41
    packed.validate()


def test_modules_and_operators(rng):
    torch = pytest.importorskip("torch")
    from torch.library import opcheck

    from pared.nn import Linear
    from pared.ops._library import linear_op

    plain = torch.nn.Linear(40, 24)
    module = Linear.from_module(plain, format="bsr8", activation="relu")
    x = torch.randn(3, 40)
    y = module(x)
    check_int8(
        y.numpy(),
        x.numpy(),
        *quantize_weight(plain.weight.detach().numpy()),
        plain.bias.detach().numpy(),
        "relu",
    )
    assert set(opcheck(linear_op, (x, module.packed, module.bias, 24, "relu")).values()) == {"SUCCESS"}
    assert torch.equal(linear_op(x, module.packed, module.bias, 24, "relu"), y)
    other = Linear.from_module(torch.nn.Linear(40, 24), format="bsr8", activation="relu")
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), y)
    assert module.to_module().weight.shape == (24, 40)
