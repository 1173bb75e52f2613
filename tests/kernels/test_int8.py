"""The int8 kernels on every level, against numpy: the same bits everywhere."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from int8_check import check_int8, linear_int8, quantize_weight

from pared import _core, ops

# Around tiles of 6 tokens and 64 outputs, panels of 16, units of 4, 64 inputs rounded at a time, K blocks of
# up to 768; and primes.
TOKENS = [0, 1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 31, 97]
OUTPUTS = [0, 1, 7, 15, 16, 17, 31, 33, 48, 49, 63, 64, 65, 127, 131]
COLS = [0, 1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 63, 64, 65, 511, 513, 767, 768, 769, 1031, 1537]
LIMIT = 65793


def random_bytes(rng, *shape) -> np.ndarray:
    """Of all int8 values, the extreme ones often."""
    a = rng.integers(-128, 128, shape).astype(np.int8)
    a[rng.random(shape) < 0.2] = -128
    a[rng.random(shape) < 0.2] = 127
    return a


def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a.astype(np.int64) @ b.astype(np.int64).T


def test_gemm_is_exact_at_every_shape(isa, rng):
    for m in TOKENS:
        for n in OUTPUTS:
            k = int(rng.choice(COLS))
            a, b = random_bytes(rng, m, k), random_bytes(rng, n, k)
            assert np.array_equal(ops.gemm_s8(a, b), product(a, b)), (m, n, k)
    for k in COLS:
        a, b = random_bytes(rng, 7, k), random_bytes(rng, 50, k)
        assert np.array_equal(ops.gemm_s8(a, b), product(a, b)), k


def test_gemm_over_several_token_blocks_and_threads(isa, rng):
    a, b = random_bytes(rng, 413, 700), random_bytes(rng, 150, 700)
    assert np.array_equal(ops.gemm_s8(a, b), product(a, b))


def test_gemm_takes_rows_that_lie_apart(isa, rng):
    a, b = random_bytes(rng, 20, 70)[::3, 5:40], random_bytes(rng, 33, 90)[:, 9:44]
    assert np.array_equal(ops.gemm_s8(a, b), product(a, b))


@pytest.mark.parametrize(("x", "y"), [(-128, -128), (-128, 127), (127, 127), (127, -128), (0, -128)])
def test_gemm_of_the_extremes_at_the_largest_reduction(isa, x, y):
    a, b = np.full((2, 131071), x, np.int8), np.full((17, 131071), y, np.int8)
    assert (ops.gemm_s8(a, b) == x * y * 131071).all()


@given(data=st.data(), m=st.integers(0, 9), n=st.integers(0, 35), k=st.integers(0, 40))
def test_gemm_of_anything(isa, data, m, n, k):
    seed = data.draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    a, b = random_bytes(rng, m, k), random_bytes(rng, n, k)
    assert np.array_equal(ops.gemm_s8(a, b), product(a, b))


def check(rng, m, n, k, **static) -> None:
    w = rng.standard_normal((n, k)).astype(np.float32)
    x = (rng.standard_normal((m, k)) * np.exp2(rng.integers(-3, 4, (m, 1)))).astype(np.float32)
    bias = rng.standard_normal(n).astype(np.float32) if rng.random() < 0.5 else None
    packed = ops.Int8.from_dense(w, **static)
    q, scales = quantize_weight(w)
    assert np.array_equal(packed.to_quantized()[0], q)
    assert np.array_equal(packed.to_quantized()[1], scales)
    activations = _core.int8_activations(packed.packed)
    check_int8(ops.linear(x, packed, bias), linear_int8(x, q, scales, bias, activations))


def test_linear_at_every_shape(isa, rng):
    for m in TOKENS:
        for n in OUTPUTS:
            check(rng, m, n, int(rng.choice(COLS)))
    for k in COLS:
        check(rng, int(rng.choice(TOKENS)), 37, k)


def test_linear_over_several_token_blocks_and_threads(isa, rng):
    check(rng, 500, 90, 1400)
    check(rng, 40, 700, 900)


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_static_activations(isa, rng, dtype):
    for m, n, k in ((1, 17, 5), (6, 64, 512), (13, 70, 777), (40, 3, 33)):
        zero = int(rng.integers(-128, 128)) + (128 if dtype == "uint8" else 0)
        check(rng, m, n, k, activation_scale=0.021, activation_zero=zero, activation_dtype=dtype)


def test_static_activations_saturate(isa):
    w = np.eye(3, 4, dtype=np.float32)
    packed = ops.Int8.from_dense(w, activation_scale=0.5, activation_zero=3, activation_dtype="uint8")
    x = np.array([[-1e30, -1.5, 126.0, 0], [3e38, -2.0, 126.25, 0], [0.25, 0.75, -0.25, 0]], np.float32)
    # u of the third row: round(0.5) + 3, round(1.5) + 3, round(-0.5) + 3: halves go to the even integer.
    want = np.array([[-1.5, -1.5, 126.0], [126.0, -1.5, 126.0], [0.0, 1.0, 0.0]], np.float32)
    scale = np.float32(1) / np.float32(127)
    check_int8(ops.linear(x, packed), (want / np.float32(0.5) * 127) * np.float32(0.5) * scale)


@pytest.mark.parametrize("activations", [(0.021, 100, 60, 190), (0.021, 128, 1, 255), (0.021, 7, 7, 7)])
def test_bytes_stay_inside_a_narrow_range(isa, rng, activations):
    """As a file may hold it; the package itself writes 0 to 255."""
    for k in (5, 63, 64, 65, 200):
        w = rng.standard_normal((19, k)).astype(np.float32)
        x = (rng.standard_normal((7, k)) * 3).astype(np.float32)
        y = np.empty((7, 19), np.float32)
        _core.linear(x, _core.int8_pack_dense(w, activations), None, None, y)
        check_int8(y, linear_int8(x, *quantize_weight(w), None, activations))


def test_rounding_is_to_the_nearest_even(isa):
    """127 / max is 2 exactly, so that halves are halves."""
    x = np.array([[63.5, 0.25, 0.75, 1.25, -0.25, -0.75, -1.25, 0.2500001]], np.float32)
    y = ops.linear(x, ops.Int8.from_dense(np.eye(8, dtype=np.float32)))
    q = np.array([[127, 0, 2, 2, 0, -2, -2, 1]], np.float32)
    check_int8(y, q * 127 * np.float32(0.5) * (np.float32(1) / np.float32(127)))


def test_saturating_pairs(isa):
    """255 * 127 twice is beyond 16 bits: what a saturating multiply-add would cut off."""
    for k in (2, 4, 64, LIMIT):
        x = np.ones((7, k), np.float32)
        packed = ops.Int8.from_quantized(
            np.full((18, k), 127, np.int8),
            1.0,
            activation_scale=1 / 255,
            activation_dtype="uint8",
        )
        want = linear_int8(
            x, np.full((18, k), 127, np.int8), np.ones(18), activations=_core.int8_activations(packed.packed)
        )
        check_int8(ops.linear(x, packed), want)
        assert (want == np.float32(255 * 127 * k) * np.float32(1 / 255)).all()


def test_sums_at_the_limit_of_the_reduction(isa):
    for w, zero, x in ((-128, 0, 1.0), (-128, 255, -1.0), (127, 255, -1.0)):
        q = np.full((3, LIMIT), w, np.int8)
        packed = ops.Int8.from_quantized(
            q, 1.0, activation_scale=1 / 255, activation_zero=zero, activation_dtype="uint8"
        )
        tokens = np.full((2, LIMIT), x, np.float32)
        activations = _core.int8_activations(packed.packed)
        check_int8(ops.linear(tokens, packed), linear_int8(tokens, q, np.ones(3), activations=activations))


def test_a_token_that_is_not_finite_gives_nan_and_no_other_does(isa, rng):
    w = rng.standard_normal((33, 75)).astype(np.float32)
    x = rng.standard_normal((9, 75)).astype(np.float32)
    x[2, 0], x[5, 74], x[7, 40] = np.nan, np.inf, -np.inf
    for static in ({}, {"activation_scale": 0.02}):
        packed = ops.Int8.from_dense(w, **static)
        for activation in (None, "relu", "gelu", "gelu_tanh", "silu"):
            y = ops.linear(x, packed, activation=activation)
            assert np.isnan(y[[2, 5, 7]]).all(), activation
            assert np.isfinite(np.delete(y, [2, 5, 7], axis=0)).all(), activation


def test_zeros_denormals_and_both_ends_of_the_range(isa, rng):
    w = rng.standard_normal((20, 50)).astype(np.float32)
    w[3], w[4], w[5] = 0, 1e-40, 3e38 * np.sign(w[5])
    x = rng.standard_normal((8, 50)).astype(np.float32)
    x[0], x[1], x[2], x[3] = 0, -0.0, 1e-42, 2e-31
    x[4], x[5] = x[4] * 1e37, 3e38
    x[6] *= 1e-35
    bias = rng.standard_normal(20).astype(np.float32)
    packed = ops.Int8.from_dense(w)
    q, scales = quantize_weight(w)
    y = ops.linear(x, packed, bias)
    check_int8(y, linear_int8(x, q, scales, bias))
    assert np.array_equal(y[:3], np.tile(bias, (3, 1)))
    assert np.array_equal(y[:, 3:5], np.tile(bias[3:5], (8, 1)))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_activations(isa, rng, dtype):
    torch = pytest.importorskip("torch")
    w = rng.standard_normal((37, 100)).astype(np.float32)
    packed = ops.Int8.from_dense(w)
    q, scales = quantize_weight(w)
    for m, k in ((1, 100), (9, 100)):
        x = torch.from_numpy(rng.standard_normal((m, k)).astype(np.float32)).to(getattr(torch, dtype))
        y = ops.linear(x, packed)
        assert y.dtype == x.dtype
        want = torch.from_numpy(linear_int8(x.float().numpy(), q, scales)).to(x.dtype)
        check_int8(y.float().numpy(), want.float().numpy())


def test_activations_behind_the_product(isa, rng):
    scipy_special = pytest.importorskip("scipy.special")
    w = rng.standard_normal((37, 100)).astype(np.float32) * 0.1
    x = rng.standard_normal((9, 100)).astype(np.float32)
    packed = ops.Int8.from_dense(w)
    z = ops.linear(x, packed).astype(np.float64)
    want = {
        "relu": np.maximum(z, 0),
        "silu": z / (1 + np.exp(-z)),
        "gelu": z * scipy_special.ndtr(z),
        "gelu_tanh": z * 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))),
    }
    for name, y in want.items():
        # 8 ulp, as kernels/generic/activation.h states.
        error = np.abs(ops.linear(x, packed, activation=name) - y)
        assert (error <= 8 * 2.0**-23 * np.abs(y)).all(), name


def test_strided_tokens(isa, rng):
    w = rng.standard_normal((20, 31)).astype(np.float32)
    x = rng.standard_normal((10, 64)).astype(np.float32)
    packed = ops.Int8.from_dense(w)
    assert np.array_equal(ops.linear(x[::2, 9:40], packed), ops.linear(x[::2, 9:40].copy(), packed))


def test_a_token_does_not_depend_on_the_others(isa, rng):
    packed = ops.Int8.from_dense(rng.standard_normal((40, 333)).astype(np.float32))
    x = rng.standard_normal((150, 333)).astype(np.float32)
    y = ops.linear(x, packed)
    order = rng.permutation(150)
    assert np.array_equal(ops.linear(x[order], packed), y[order])
    for t in (0, 77, 149):
        assert np.array_equal(ops.linear(x[t : t + 1], packed), y[t : t + 1])


# ---- planted faults: the checks above do fail on a wrong kernel or weight


def copy_of(packed: np.ndarray) -> np.ndarray:
    room = np.zeros(packed.size + 64, np.uint8)
    aligned = room[-room.ctypes.data % 64 :][: packed.size]
    aligned[:] = packed
    return aligned


def section(packed: np.ndarray, name: str) -> np.ndarray:
    at = {"weights": 96, "scales": 128, "compensation": 136}[name]
    start = int(packed[at : at + 8].view(np.uint64)[0])
    return packed[start:].view({"weights": np.int8, "scales": np.float32, "compensation": np.int32}[name])


@pytest.mark.parametrize("name", ["weights", "scales", "compensation"])
def test_a_wrong_packed_value_is_noticed(isa, rng, name):
    w = rng.standard_normal((40, 300)).astype(np.float32)
    x = rng.standard_normal((50, 300)).astype(np.float32)
    q, scales = quantize_weight(w)
    packed = copy_of(ops.Int8.from_dense(w).packed)
    weight = ops.Int8(packed)
    check_int8(ops.linear(x, weight), linear_int8(x, q, scales))
    values = section(packed, name)
    values[17] = values[17] * np.float32(1.0001) if name == "scales" else values[17] ^ 1
    with pytest.raises(AssertionError, match="outputs are wrong"):
        check_int8(ops.linear(x, weight), linear_int8(x, q, scales))
    with pytest.raises(ValueError, match="checksum"):
        weight.validate()


def test_a_saturating_product_would_be_noticed():
    """What vpmaddubsw makes of such pairs differs from the sum."""
    a, b = np.full((1, 4), 127, np.int8), np.full((1, 4), 127, np.int8)
    pairs = np.minimum((a.astype(int) + 128).reshape(2, 2) * b.reshape(2, 2).astype(int), 10**9).sum(1)
    saturated = np.minimum(pairs, 32767).sum() - 128 * b.astype(int).sum()
    assert saturated != product(a, b)[0, 0]


def test_a_wrong_product_is_noticed(rng):
    x, q = rng.standard_normal((5, 30)).astype(np.float32), random_bytes(rng, 20, 30)
    want = linear_int8(x, q, np.full(20, 0.1, np.float32))
    wrong = want.copy()
    wrong[4, 19] = np.nextafter(wrong[4, 19], np.float32(np.inf))
    with pytest.raises(AssertionError, match=r"1 of 100 outputs are wrong, first at \[4, 19\]"):
        check_int8(wrong, want)
