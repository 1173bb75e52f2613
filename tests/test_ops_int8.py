"""`pared.ops.Int8`: packing, taking over quantized weights, arguments, damaged buffers."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
from int8_check import quantize_weight

from pared import ops


@pytest.fixture
def weight(rng):
    return rng.standard_normal((37, 101)).astype(np.float32)


def test_what_it_says_of_itself(weight):
    weight[3] = 0
    packed = ops.Int8.from_dense(weight)
    q, scales = quantize_weight(weight)
    assert packed.shape == (37, 101)
    assert packed.nnz == np.count_nonzero(q)
    assert packed.dtype == "float32"
    assert packed.activation is None
    assert packed.nbytes < 37 * 101 * 1.6
    assert "Int8(shape=(37, 101)" in repr(packed)
    assert np.array_equal(packed.to_dense(), q.astype(np.float32) * scales[:, None])
    assert np.abs(packed.to_dense() - weight).max() <= 0.5 * scales.max() * (1 + 1e-6)
    packed.validate()


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0), (1, 1)])
def test_small_weights(shape):
    packed = ops.Int8.from_dense(np.ones(shape, np.float32))
    packed.validate()
    assert packed.shape == shape
    assert ops.linear(np.ones((3, shape[1]), np.float32), packed).shape == (3, shape[0])


def test_a_quantized_weight_is_taken_over_unchanged(rng):
    q = rng.integers(-128, 128, (20, 33)).astype(np.int8)
    scales = rng.random(20).astype(np.float32)
    packed = ops.Int8.from_quantized(q, scales)
    packed.validate()
    for got, want in zip(packed.to_quantized(), (q, scales), strict=True):
        assert np.array_equal(got, want)
    again = ops.Int8.from_quantized(q[:, ::-1].T[::-1].T, scales)
    assert np.array_equal(again.packed, packed.packed)
    assert np.array_equal(ops.Int8.from_quantized(q, 0.5).to_quantized()[1], np.full(20, 0.5))


def test_copies(weight):
    packed = ops.Int8.from_dense(weight, activation_scale=0.1, activation_zero=-3)
    for twin in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        twin.validate()
        assert np.array_equal(twin.packed, packed.packed)
        assert twin.activation == (pytest.approx(0.1), 125)


def test_torch_tensors(weight):
    torch = pytest.importorskip("torch")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        w = torch.from_numpy(weight).to(dtype)
        packed = ops.Int8(torch.from_numpy(ops.Int8.from_dense(w).packed))
        back = packed.to_dense()
        assert back.dtype == dtype
        q, scales = quantize_weight(w.float().numpy())
        assert torch.equal(back, (torch.from_numpy(q).float() * torch.from_numpy(scales)[:, None]).to(dtype))
    a, b = (
        torch.randint(-128, 128, (5, 9), dtype=torch.int8),
        torch.randint(-128, 128, (7, 9), dtype=torch.int8),
    )
    c = ops.gemm_s8(a, b)
    assert c.dtype == torch.int32
    assert torch.equal(c, a.int() @ b.int().T)


F = np.ones((2, 3), np.float32)
Q = np.ones((2, 3), np.int8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.Int8.from_dense([[1.0]]), TypeError, "weight: expected a numpy array"),
        (lambda: ops.Int8.from_dense(F[0]), ValueError, r"weight: expected \[out, in\] or .*, got \[3\]"),
        (lambda: ops.Int8.from_dense(F.astype(np.float64)), TypeError, "weight: expected dtype float32"),
        (lambda: ops.Int8.from_dense(F, groups=2), ValueError, "groups: expected 1"),
        (
            lambda: ops.Int8.from_dense(np.ones((3, 1, 1, 1), np.float32), groups=2),
            ValueError,
            "divisor of 3",
        ),
        (
            lambda: ops.Bitmap8.from_dense(np.ones((3, 1, 1, 1), np.float32)),
            ValueError,
            "got a convolution's",
        ),
        (
            lambda: ops.linear(F, ops.Int8.from_dense(np.ones((3, 3, 1, 1), np.float32))),
            ValueError,
            "use conv2d",
        ),
        (lambda: ops.Int8.from_dense(F * np.nan), ValueError, "NaN or infinity in row"),
        (lambda: ops.Int8.from_dense(F * np.inf), ValueError, "NaN or infinity in row"),
        (
            lambda: ops.Int8.from_dense(np.zeros((1, 65794), np.float32)),
            ValueError,
            "weight: expected at most 65793 inputs",
        ),
        (
            lambda: ops.Int8.from_dense(F, activation_scale=0),
            ValueError,
            "activation_scale: expected a positive number",
        ),
        (
            lambda: ops.Int8.from_dense(F, activation_scale=1e-42),
            ValueError,
            "activation_scale: expected a positive, normal number",
        ),
        (
            lambda: ops.Int8.from_dense(F, activation_scale=1e300),
            ValueError,
            "activation_scale: expected a positive, normal number",
        ),
        (lambda: ops.Int8.from_dense(F, activation_zero=3), ValueError, "activation_zero: expected 0"),
        (
            lambda: ops.Int8.from_dense(F, activation_scale=1.0, activation_zero=128),
            ValueError,
            "activation_zero: expected an integer in the range of int8",
        ),
        (
            lambda: ops.Int8.from_dense(F, activation_dtype="int4"),
            ValueError,
            "activation_dtype: expected 'int8' or 'uint8'",
        ),
        (lambda: ops.Int8.from_quantized(F, 1.0), TypeError, "q: expected dtype int8, got float32"),
        (lambda: ops.Int8.from_quantized(Q[0], 1.0), ValueError, r"q: expected \[out, in\] or"),
        (lambda: ops.Int8.from_quantized(Q, [1.0]), ValueError, r"scales: expected shape \[2\], got \[1\]"),
        (lambda: ops.Int8.from_quantized(Q, -1.0), ValueError, "scales: expected finite numbers"),
        (lambda: ops.Int8.from_quantized(Q, np.nan), ValueError, "scales: expected finite numbers"),
        (
            lambda: ops.Int8.from_quantized(Q, 1.0, dtype="float64"),
            ValueError,
            "dtype: expected float32, float16 or bfloat16",
        ),
        (lambda: ops.gemm_s8(Q, F), TypeError, "b: expected dtype int8, got float32"),
        (lambda: ops.gemm_s8(Q, Q[:, :2]), ValueError, r"b: expected shape \[any, 3\]"),
        (lambda: ops.gemm_s8(Q[0], Q), ValueError, "a: expected two dimensions"),
        (lambda: ops.gemm_s8(Q.T, Q[:, :2]), ValueError, "a: expected the last dimension contiguous"),
        (
            lambda: ops.gemm_s8(np.zeros((1, 131072), np.int8), np.zeros((1, 131072), np.int8)),
            ValueError,
            "a: expected a last dimension of at most 131071",
        ),
        (
            lambda: ops.linear(F[:, :2], ops.Int8.from_dense(F)),
            ValueError,
            "x: expected a last dimension of 3",
        ),
        (
            lambda: ops.linear(F.astype(np.float64), ops.Int8.from_dense(F)),
            TypeError,
            "x: expected dtype float32",
        ),
        (
            lambda: ops.linear(F, ops.Int8.from_dense(F), activation="tanh"),
            ValueError,
            "activation: expected one of",
        ),
        (lambda: ops.Int8(ops.CSR.from_dense(F).packed), ValueError, "expected a int8 buffer, got a csr one"),
        (
            lambda: ops.conv2d(np.ones((1, 1, 3, 3), np.float32), ops.Int8.from_dense(F)),
            ValueError,
            r"w: expected a weight \[out, in/groups, kh, kw\]",
        ),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("format", [ops.Int8, ops.Bitmap8, ops.BSRInt8])
@pytest.mark.parametrize(
    ("activations", "message"),
    [
        ("abc", "'abc'"),
        (0.5, "0.5"),
        ((0.5, 128), r"\(0.5, 128\)"),
        (("a", 128, 0, 255), r"\('a', 128, 0, 255\)"),
        ((0.5, 127.5, 0, 255), r"\(0.5, 127.5, 0, 255\)"),
        ((0.5, 2**70, 0, 255), r"\(0.5, 1180591620717411303424, 0, 255\)"),
        (("\u00fc" * 200, 1, 2, 3), r"\('\\xfc"),
    ],
)
def test_bad_activations_of_parts(format, activations, message):
    q, scales = np.ones((4, 8), np.int8), np.ones(4, np.float32)
    text = rf"^activations: expected None or \(scale, zero, low, high\), .*, got {message}"
    for call in (
        lambda: format.from_parts(q, scales, "float32", activations),
        lambda: format.from_stored(q.shape, q, scales, "float32", activations),
    ):
        with pytest.raises(TypeError, match=text):
            call()


@pytest.mark.parametrize("format", [ops.Int8, ops.Bitmap8, ops.BSRInt8])
def test_activations_of_parts_out_of_range(format):
    q, scales = np.ones((4, 8), np.int8), np.ones(4, np.float32)
    for activations, message in [
        ((0.0, 128, 0, 255), "activation_scale: expected a positive number, got 0"),
        ((1e-60, 128, 0, 255), "activation_scale: expected a positive number, got 1e-60"),
        ((float("nan"), 128, 0, 255), "activation_scale: expected a positive, normal number .*, got nan"),
        ((0.5, 300, 0, 255), "activations: expected 0 <= low <= zero <= high <= 255 .*, got 0, 300, 255"),
    ]:
        with pytest.raises(ValueError, match=f"^{message}"):
            format.from_parts(q, scales, "float32", activations)
    assert format.from_parts(q, scales, "float32", (0.5, 3, 0, 255)).activations == (0.5, 3, 0, 255)


def test_damaged_buffers_are_refused_and_never_read_out_of(weight):
    """Every byte of the header and what follows it, set to 0xff and flipped: an error, or an output."""
    good = ops.Int8.from_dense(weight, activation_scale=0.1, activation_zero=3).packed
    x = np.ones((2, 101), np.float32)
    room = np.zeros(good.size + 64, np.uint8)
    packed = room[-room.ctypes.data % 64 :][: good.size]
    for i in range(192):
        for value in (0xFF, int(good[i]) ^ 1, int(good[i]) ^ 0x80):
            packed[:] = good
            packed[i] = value
            changed = value != good[i]
            try:
                w = ops.Int8(packed)
                ops.linear(
                    x[:, : w.shape[1]] if w.shape[1] <= 101 else np.ones((2, w.shape[1]), np.float32), w
                )
            except ValueError:
                continue
            if changed:
                with pytest.raises(ValueError, match="packed weight"):
                    w.validate()
    with pytest.raises(ValueError, match=r"expected \d+ bytes"):
        ops.Int8(good[:-64])
