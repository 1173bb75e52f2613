"""What is added in the epilogue of convolutions, on every level: the same bits as an addition afterwards."""

from __future__ import annotations

import numpy as np
import pytest
from conv_check import ROUNDING, assert_within, bound, channels_last, reference, sparse_weight
from conv_check import Geometry as G
from hypothesis import given, settings
from hypothesis import strategies as st

from pared import ops
from pared.ops import conv2d

FORMATS = {
    "csr": ops.CSR.from_dense,
    "bsr": lambda w: ops.BSR.from_dense(w, block=(4, 1)),
    "dense": ops.Dense.from_dense,
    "int8": ops.Int8.from_dense,
    "bsr8": lambda w: ops.BSRInt8.from_dense(w, block=(1, 4)),
}


def laid(x, layout):
    return channels_last(x) if layout == "nhwc" else np.ascontiguousarray(x)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("format", FORMATS)
def test_the_bits_of_an_addition(isa, rng, format, stride, kernel, layout):
    """Sizes with whole vectors and tails, several tiles, several images; filters around the groups of 16."""
    for filters, size in ((35, (9, 13)), (16, (20, 24)), (5, (4, 4))):
        w = FORMATS[format](sparse_weight(rng, (filters, 8, kernel, kernel), 0.7))
        x = laid(rng.standard_normal((2, 8, *size)).astype(np.float32), layout)
        bias = rng.standard_normal(filters).astype(np.float32)
        options = {"stride": stride, "padding": kernel // 2}
        plain = conv2d(x, w, bias, **options)
        r = laid(rng.standard_normal(plain.shape).astype(np.float32), layout)
        assert np.array_equal(conv2d(x, w, bias, **options, residual=r), plain + r)
        y = conv2d(x, w, bias, **options, activation="relu", residual=r)
        assert np.array_equal(y, np.maximum(plain + r, 0))
        assert y.strides == plain.strides


@settings(max_examples=25)
@given(
    images=st.integers(1, 3),
    sizes=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    filters=st.integers(1, 40),
    layout=st.sampled_from(["nchw", "nhwc"]),
    kernel=st.sampled_from([1, 3]),
    seed=st.integers(0, 2**32 - 1),
)
def test_sixteen_bits_are_rounded_once(isa, images, sizes, filters, layout, kernel, seed):
    rng = np.random.default_rng(seed)
    g = G(padding=(kernel // 2,) * 4)
    w = sparse_weight(rng, (filters, 6, kernel, kernel), 0.5)
    x = laid(rng.standard_normal((images, 6, *sizes)).astype(np.float16), layout)
    want = reference(x, w, None, g)
    r = laid(rng.standard_normal(want.shape).astype(np.float16), layout)
    y = conv2d(x, ops.CSR.from_dense(w), None, padding=kernel // 2, residual=r)
    relative, _ = ROUNDING["float16"]
    limit = bound(x, w, None, g, "float16") + (relative + 2.0**-22) * np.abs(r)
    assert_within(y, want + r.astype(np.float64), limit)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_bfloat16(isa, rng, layout):
    torch = pytest.importorskip("torch")
    w = ops.CSR.from_dense(sparse_weight(rng, (19, 6, 3, 3), 0.5))
    memory = torch.channels_last if layout == "nhwc" else torch.contiguous_format
    x = torch.from_numpy(rng.standard_normal((2, 6, 7, 9)).astype(np.float32))
    x = x.bfloat16().contiguous(memory_format=memory)
    exact = conv2d(x.float(), w, padding=1)
    r = torch.randn_like(exact).bfloat16().contiguous(memory_format=memory)
    assert torch.equal(conv2d(x, w, padding=1, residual=r), (exact + r.float()).bfloat16())


def test_one_image_without_a_batch(isa, rng):
    w = ops.CSR.from_dense(sparse_weight(rng, (5, 3, 1, 1), 0.5))
    x, r = (
        rng.standard_normal((3, 4, 6)).astype(np.float32),
        rng.standard_normal((5, 4, 6)).astype(np.float32),
    )
    assert np.array_equal(conv2d(x, w, residual=r), conv2d(x, w) + r)
    with pytest.raises(ValueError, match="residual: expected shape"):
        conv2d(x, w, residual=r[None])


def test_a_residual_that_is_left_out_is_seen(isa, rng):
    w = ops.CSR.from_dense(sparse_weight(rng, (5, 3, 1, 1), 0.5))
    x, r = rng.standard_normal((1, 3, 4, 6)).astype(np.float32), np.full((1, 5, 4, 6), 1e-3, np.float32)
    assert not np.array_equal(conv2d(x, w, residual=r), conv2d(x, w))


X = np.zeros((2, 3, 4, 6), np.float32)
GOOD = np.zeros((2, 5, 4, 6), np.float32)


@pytest.mark.parametrize(
    ("residual", "message"),
    [
        ([1.0], "residual: expected a numpy array"),
        (GOOD.astype(np.float64), "residual: expected"),
        (GOOD.astype(np.float16), "residual: expected"),
        (GOOD[:1], "residual: expected shape"),
        (GOOD[0], "residual: expected shape"),
        (GOOD[:, :, :, :1], "residual: expected shape"),
        (np.zeros((2, 5, 4, 12), np.float32)[..., ::2], "residual: expected the memory layout"),
        (channels_last(GOOD), "residual: expected the memory layout"),
        (np.broadcast_to(np.float32(1), GOOD.shape), "residual: expected the memory layout"),
    ],
)
@pytest.mark.parametrize("format", FORMATS)
def test_bad_residuals(format, residual, message):
    w = FORMATS[format](np.ones((5, 3, 1, 1), np.float32))
    with pytest.raises((TypeError, ValueError), match=message):
        conv2d(X, w, residual=residual)


def test_gradients_are_refused():
    torch = pytest.importorskip("torch")
    w = ops.CSR.from_dense(np.ones((5, 3, 1, 1), np.float32))
    with pytest.raises(RuntimeError, match="residual: expected a tensor that needs no gradient"):
        conv2d(torch.from_numpy(X), w, residual=torch.zeros(GOOD.shape, requires_grad=True))
