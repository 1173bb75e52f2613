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
    with pytest.raises(TypeError, match="q: expected dtype int8"):
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
        _core.bsr8_unpack(ops.CSR.from_dense(w).packed)


def test_a_weight_of_the_other_operation_is_refused():
    conv = ops.BSRInt8.from_dense(np.ones((4, 3, 2, 2), np.float32)).packed
    with pytest.raises(
        ValueError, match=r"w: expected a linear weight \[out, in\], got shape \[4, 3, 2, 2\]"
    ):
        _core.linear(np.ones((2, 12), np.float32), conv, None, None, np.ones((2, 4), np.float32))
    linear = ops.BSRInt8.from_dense(np.ones((4, 12), np.float32)).packed
    x, y = np.ones((1, 12, 1, 1), np.float32), np.ones((1, 4, 1, 1), np.float32)
    with pytest.raises(ValueError, match="packed: expected a convolution weight, got a linear one"):
        _core.conv2d(x, linear, None, 1, 0, 1, 1, None, None, y)


STATIC = [
    {"activation_scale": 0.03},
    {"activation_scale": 0.05, "activation_zero": -128},
    {"activation_scale": 0.02, "activation_zero": 137, "activation_dtype": "uint8"},
]


@pytest.mark.parametrize("block", [(1, 4), (4, 4)])
@pytest.mark.parametrize("static", STATIC, ids=str)
def test_static_activations(isa, rng, block, static):
    """Exact sums of the integers, scaled and biased in float32: the bits of csrc/kernels/int8_types.h."""
    for rows, cols, tokens in ((1, 1, 1), (17, 30, 5), (64, 259, 130)):
        w = blocks(rng, rows, cols, *block, 0.5)
        bias = rng.standard_normal(rows).astype(np.float32)
        x = rng.standard_normal((tokens, cols)).astype(np.float32)  # some beyond the grid
        packed = ops.BSRInt8.from_dense(w, block=block, **static)
        assert packed.activations == ops.Int8.from_dense(w, **static).activations
        scale, zero, low, high = packed.activations
        q, scales = quantize_weight(w)
        u = np.clip(np.rint(x * (np.float32(1) / np.float32(scale))) + zero, low, high).astype(np.int64)
        sums = ((u - zero) @ q.T.astype(np.int64)).astype(np.float32)
        want = sums * (scales * np.float32(scale)) + bias
        x = np.vstack([x, np.full((1, cols), np.nan, np.float32)])
        y = ops.linear(x, packed, bias)
        assert np.array_equal(y[:-1], want)
        assert np.isnan(y[-1]).all()
    assert ops.BSRInt8.from_dense(w, block=block).activations is None


@pytest.mark.parametrize("block", [(1, 4), (4, 4)])
@pytest.mark.parametrize("static", STATIC, ids=str)
def test_static_activations_of_convolutions(isa, rng, block, static):
    w = np.zeros((10, 6, 3, 3), np.float32)
    w[:, :4] = rng.standard_normal((10, 4, 3, 3)).astype(np.float32)
    bias = rng.standard_normal(10).astype(np.float32)
    x = rng.standard_normal((2, 12, 9, 7)).astype(np.float32)
    packed = ops.BSRInt8.from_dense(w, block=block, groups=2, **static)
    dense = ops.Int8.from_dense(w, groups=2, **static)
    for stride, padding in ((1, 0), (2, 1)):
        y, want = (ops.conv2d(x, p, bias, stride=stride, padding=padding, groups=2) for p in (packed, dense))
        np.testing.assert_allclose(y, want, rtol=1e-6, atol=1e-6)  # sums are exact, float32 roundings differ


def test_a_planted_fault_in_the_zero_point_is_caught(rng):
    w, x = blocks(rng, 16, 32, 1, 4, 0.5), rng.standard_normal((5, 32)).astype(np.float32)
    one = ops.BSRInt8.from_dense(w, activation_scale=0.03, activation_zero=5)
    other = ops.BSRInt8.from_dense(w, activation_scale=0.03, activation_zero=6)
    assert not np.array_equal(ops.linear(3 * x, one), ops.linear(3 * x, other))


def test_parts_come_back(rng):
    q = rng.integers(-128, 128, (19, 70)).astype(np.int8)
    scales = rng.random(19).astype(np.float32)
    packed = ops.BSRInt8.from_quantized(q, scales, dtype="bfloat16", **STATIC[2])
    assert packed.dtype == "bfloat16"
    assert packed.activations == (np.float32(0.02), 137, 0, 255)
    again = ops.BSRInt8.from_parts(*packed.to_quantized(), packed.dtype, packed.activations)
    assert np.array_equal(again.packed, packed.packed)
    assert np.array_equal(ops.BSRInt8.from_quantized(q, 0.5).to_quantized()[1], np.full(19, 0.5, np.float32))
    for bad in ({"activation_scale": -1.0}, {"activation_zero": 3}, {"activation_dtype": "int4"}):
        with pytest.raises(ValueError, match="activation_"):
            ops.BSRInt8.from_quantized(q, scales, **bad)
        with pytest.raises(ValueError, match="activation_"):
            ops.BSRInt8.from_dense(q.astype(np.float32), **bad)
    with pytest.raises(ValueError, match="dtype: expected float32"):
        ops.BSRInt8.from_quantized(q, scales, dtype="float64")


def foreign_blocks(torch, seed=0):
    """A model with values that pared's own quantization would not choose: linear, static, and convolution."""
    from pared.nn import Conv2d, Linear

    g = torch.Generator().manual_seed(seed)

    def weight(*shape, **kwargs):
        q = torch.randint(-128, 100, shape, dtype=torch.int8, generator=g)
        q[:, 4:8] = 0
        return ops.BSRInt8.from_quantized(q, torch.rand(shape[0], generator=g) * 0.1, **kwargs)

    return torch.nn.Sequential(
        Conv2d(weight(8, 6, 3, 3, groups=2, **STATIC[2]), torch.randn(8, generator=g), padding=1),
        torch.nn.Flatten(),
        Linear(
            weight(12, 72, dtype="bfloat16", **STATIC[0]), torch.randn(12, generator=g).bfloat16(), "relu"
        ),
        Linear(weight(5, 12), None),
    )


def test_a_file_holds_the_integers_and_gives_them_back(tmp_path):
    torch = pytest.importorskip("torch")
    import pared

    fast = foreign_blocks(torch).eval()
    x = torch.randn(4, 12, 3, 3)
    pared.save(fast, tmp_path / "f")
    plain = torch.nn.Sequential(
        torch.nn.Conv2d(12, 8, 3, padding=1, groups=2),
        torch.nn.Flatten(),
        torch.nn.Linear(72, 12, dtype=torch.bfloat16),
        torch.nn.Linear(12, 5, bias=False),
    )
    loaded = pared.load(tmp_path / "f", plain)
    with torch.no_grad():
        assert torch.equal(loaded(x), fast(x))
    for new, old in ((loaded[0], fast[0]), (loaded[2], fast[2]), (loaded[3], fast[3])):
        a, b = new.packed_weight(), old.packed_weight()
        assert a.activations == b.activations
        assert a.dtype == b.dtype
        assert all(np.array_equal(s, t) for s, t in zip(a.to_quantized(), b.to_quantized(), strict=True))
    pared.save(loaded, tmp_path / "g")
    assert (tmp_path / "g").read_bytes() == (tmp_path / "f").read_bytes()
    back = pared.restore(loaded)
    assert back[2].weight.dtype == torch.bfloat16
    assert torch.equal(back[3].weight, torch.as_tensor(fast[3].packed_weight().to_dense()))


@pytest.mark.parametrize("static", [None, STATIC[1]], ids=str)
@pytest.mark.parametrize("block", [(1, 4), (4, 4)])
def test_every_flipped_byte_is_caught(rng, block, static):
    packed = ops.BSRInt8.from_dense(blocks(rng, 9, 20, *block, 0.5), block=block, **(static or {}))
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
