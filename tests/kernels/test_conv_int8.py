"""int8 Conv2d on every level, to the bit, against torch's convolution of the same integers in float64."""

from __future__ import annotations

import numpy as np
import pytest
from block_int8_check import LEAST, quantize_weight

from pared import ops
from pared.ops._formats import FORMATS

torch = pytest.importorskip("torch")
functional = torch.nn.functional

# channels, filters, groups, kernel, size, stride, padding, dilation, images
SHAPES = [
    (3, 5, 1, (3, 3), (7, 9), (1, 1), (1, 1), (1, 1), 1),
    (8, 16, 1, (1, 1), (14, 14), (1, 1), (0, 0), (1, 1), 2),
    (8, 7, 1, (1, 1), (15, 13), (2, 2), (0, 0), (1, 1), 1),
    (20, 33, 1, (3, 3), (12, 20), (1, 1), (1, 1), (1, 1), 2),
    (4, 9, 1, (3, 3), (13, 17), (2, 2), (1, 1), (1, 1), 1),
    (6, 8, 2, (3, 2), (11, 10), (2, 3), (2, 0), (1, 2), 2),
    (5, 10, 5, (3, 3), (9, 9), (1, 1), (1, 1), (2, 2), 1),
    (17, 4, 1, (5, 1), (8, 3), (3, 1), (2, 4), (1, 1), 1),
    (70, 18, 1, (2, 2), (5, 6), (1, 2), (0, 1), (3, 1), 1),
    (2, 3, 1, (7, 7), (7, 7), (1, 1), (0, 0), (1, 1), 3),
    (130, 6, 1, (1, 1), (3, 150), (1, 1), (1, 1), (1, 1), 1),
    (4, 4, 1, (1, 1), (1, 1), (1, 1), (0, 0), (1, 1), 2),
]


def quantize_images(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``(q, scales)``: as csrc/ops/conv_bsr8.h says, a scale an image."""
    most = np.abs(x).reshape(len(x), -1).max(1).astype(np.float32)
    counts = np.isfinite(most) & (most >= LEAST)
    scales = np.where(counts, most / np.float32(127), np.float32(1)).astype(np.float32)
    inverse = (np.float32(1) / scales).astype(np.float32)
    with np.errstate(invalid="ignore"):
        q = np.rint(np.clip(x * inverse[:, None, None, None], -127, 127))
    q = np.where(counts[:, None, None, None], q, 0)
    return q, np.where(counts, scales, np.where(np.isfinite(most), np.float32(0), np.float32(np.nan)))


def quantize_with(x: np.ndarray, activations) -> tuple[np.ndarray, np.ndarray]:
    """The same with a given scale, zero point and range."""
    scale, zero, low, high = activations
    finite = np.isfinite(x).reshape(len(x), -1).all(1)
    inverse = np.float32(1) / np.float32(scale)
    q = np.rint(np.clip(np.where(np.isfinite(x), x, 0) * inverse, low - zero, high - zero))
    return q, np.where(finite, np.float32(scale), np.float32(np.nan)).astype(np.float32)


def expected(
    x, q, scales, bias, stride, padding, dilation, groups, dense=False, activations=None
) -> np.ndarray:
    """dense: as csrc/ops/conv_int8.h rounds, else as csrc/ops/conv_bsr8.h does."""
    qx, sx = quantize_images(x) if activations is None else quantize_with(x, activations)
    total = functional.conv2d(
        torch.from_numpy(qx.astype(np.float64)),
        torch.from_numpy(q.astype(np.float64)),
        None,
        stride,
        padding,
        dilation,
        groups,
    ).numpy()
    assert np.abs(total).max(initial=0) < 2**31
    sums, sx = total.astype(np.int32).astype(np.float32), sx[:, None, None, None]
    y = sums * sx * scales[None, :, None, None] if dense else sums * (scales[None, :, None, None] * sx)
    return y + bias[None, :, None, None]


def sparse_weight(rng, shape: tuple[int, ...], block_rows: int) -> np.ndarray:
    w = rng.standard_normal(shape).astype(np.float32)
    quads, channels = -(-shape[0] // block_rows), -(-shape[1] // 4)
    keep = (rng.random((quads, channels, *shape[2:])) < 0.5).astype(np.float32)
    return w * keep.repeat(block_rows, 0)[: shape[0]].repeat(4, 1)[:, : shape[1]]


def check(y, want) -> None:
    assert tuple(y.shape) == want.shape
    got = np.asarray(y)
    wrong = ~((got == want) | (np.isnan(got) & np.isnan(want)))
    assert not wrong.any(), f"{wrong.sum()} of {wrong.size} wrong, first at {np.argwhere(wrong)[0]}"


@pytest.mark.parametrize("block_rows", [1, 4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(isa, rng, shape, block_rows):
    channels, filters, groups, kernel, size, stride, padding, dilation, images = shape
    w = sparse_weight(rng, (filters, channels // groups, *kernel), block_rows)
    bias = rng.standard_normal(filters).astype(np.float32)
    x = rng.standard_normal((images, channels, *size)).astype(np.float32)
    packed = ops.BSRInt8.from_dense(w, block=(block_rows, 4), groups=groups)
    want = expected(x, *quantize_weight(w), bias, stride, padding, dilation, groups)
    check(ops.conv2d(x, packed, bias, stride, padding, dilation, groups), want)
    last = torch.from_numpy(x).contiguous(memory_format=torch.channels_last)
    y = ops.conv2d(last, packed, torch.from_numpy(bias), stride, padding, dilation, groups)
    check(y.numpy(), want)


# Besides SHAPES, for the dense kernel: panels and runs that are cut, groups of several panels.
DENSE_SHAPES = [
    *SHAPES,
    (64, 70, 1, (3, 3), (9, 15), (1, 1), (1, 1), (1, 1), 1),
    (600, 17, 1, (1, 1), (4, 7), (1, 1), (0, 0), (1, 1), 2),
    (160, 33, 1, (3, 3), (5, 7), (1, 1), (1, 1), (1, 1), 1),
    (8, 70, 2, (3, 3), (6, 25), (1, 1), (1, 1), (1, 1), 1),
    (7, 7, 7, (3, 3), (9, 33), (1, 1), (1, 1), (1, 1), 1),
    (3, 64, 1, (7, 7), (31, 37), (2, 2), (3, 3), (1, 1), 1),
    (68, 34, 17, (3, 3), (6, 7), (1, 1), (0, 1), (1, 1), 1),
]


@pytest.mark.parametrize("activations", [None, (0.031, 0, "uint8"), (0.02, 117, "uint8"), (0.05, -3, "int8")])
@pytest.mark.parametrize("shape", DENSE_SHAPES, ids=str)
def test_dense_weights(isa, rng, shape, activations):
    """Both layouts, with activations dynamic and static: padding is the zero point then."""
    channels, filters, groups, kernel, size, stride, padding, dilation, images = shape
    w = rng.standard_normal((filters, channels // groups, *kernel)).astype(np.float32)
    bias = rng.standard_normal(filters).astype(np.float32)
    x = rng.standard_normal((images, channels, *size)).astype(np.float32)
    scale, zero, dtype = activations or (None, 0, "int8")
    packed = ops.Int8.from_dense(
        w, groups=groups, activation_scale=scale, activation_zero=zero, activation_dtype=dtype
    )
    q, scales = packed.to_quantized()
    for got, want in zip((q, scales), quantize_weight(w), strict=True):
        assert np.array_equal(got, want)
    assert np.array_equal(packed.to_dense(), q * scales[:, None, None, None])
    packed.validate()
    geometry = (stride, padding, dilation, groups)
    want = expected(x, q, scales, bias, *geometry, dense=True, activations=packed.activations)
    check(ops.conv2d(x, packed, bias, *geometry), want)
    last = torch.from_numpy(x).contiguous(memory_format=torch.channels_last)
    check(ops.conv2d(last, packed, torch.from_numpy(bias), *geometry).numpy(), want)


def test_dense_weights_that_are_quantised_already(isa, rng):
    """Every byte, -128 included, at the length where sums come closest to 2^31."""
    q = rng.integers(-128, 128, (18, 40, 3, 3), dtype=np.int8)
    scales = rng.random(18, np.float32)
    packed = ops.Int8.from_quantized(q, scales, activation_scale=0.5, activation_dtype="uint8")
    assert np.array_equal(packed.to_quantized()[0], q)
    x = rng.random((1, 40, 8, 8), np.float32) * 127
    want = expected(
        x, q, scales, np.zeros(18, np.float32), 1, 1, 1, 1, dense=True, activations=packed.activations
    )
    check(ops.conv2d(x, packed, padding=1), want)
    worst = ops.Int8.from_quantized(
        np.full((1, 7310, 3, 3), -128, np.int8), 1.0, activation_scale=1.0, activation_dtype="uint8"
    )
    y = ops.conv2d(np.full((1, 7310, 3, 3), 255, np.float32), worst)
    assert y.reshape(()) == np.float32(-128 * 255 * 7310 * 9)


def test_threads_share_outputs_or_filters(isa, rng):
    """Large enough for two threads, both ways of sharing, with the bits of one."""
    for size, filters in ((20, 64), (3, 300)):
        w = rng.standard_normal((filters, 128, 3, 3)).astype(np.float32)
        x = rng.standard_normal((1, 128, size, size)).astype(np.float32)
        packed = ops.Int8.from_dense(w)
        want = expected(x, *packed.to_quantized(), np.zeros(filters, np.float32), 1, 1, 1, 1, dense=True)
        before = torch.get_num_threads()
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                check(ops.conv2d(x, packed, padding=1), want)
        finally:
            torch.set_num_threads(before)


@pytest.mark.parametrize("weight", ["bsr8", "int8"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_images(isa, rng, dtype, weight):
    w = sparse_weight(rng, (9, 12, 3, 3), 1)
    packed = FORMATS[weight].weight.from_dense(w)
    x = torch.from_numpy(rng.standard_normal((2, 12, 9, 11))).to(getattr(torch, dtype))
    for images in (x, x.contiguous(memory_format=torch.channels_last)):
        y = ops.conv2d(images, packed, padding=1)
        assert y.dtype == x.dtype
        assert torch.equal(y, ops.conv2d(images.float(), packed, padding=1).to(x.dtype))


def test_images_that_are_not_finite_or_tiny(isa, rng):
    w = sparse_weight(rng, (6, 8, 3, 3), 1)
    q, scales = quantize_weight(w)
    bias = rng.standard_normal(6).astype(np.float32)
    x = rng.standard_normal((5, 8, 6, 6)).astype(np.float32)
    x[0, 3, 2, 1] = np.nan
    x[1, 7, 5, 5] = -np.inf
    x[2] = 0
    x[3] *= np.float32(2.0**-110)
    for packed, dense in ((ops.BSRInt8.from_dense(w), False), (ops.Int8.from_dense(w), True)):
        y = ops.conv2d(x, packed, bias, padding=1)
        check(y, expected(x, q, scales, bias, 1, 1, 1, 1, dense))
        assert np.isnan(y[:2]).all()
        assert np.array_equal(y[2], np.broadcast_to(bias[:, None, None], y[2].shape))
    static = ops.Int8.from_dense(w, activation_scale=0.03, activation_zero=9)
    for images in (torch.from_numpy(x), torch.from_numpy(x).contiguous(memory_format=torch.channels_last)):
        y = ops.conv2d(images, static, torch.from_numpy(bias), padding=1).numpy()
        check(y, expected(x, q, scales, bias, 1, 1, 1, 1, True, static.activations))


def test_a_slice_of_channels_and_activations(isa, rng):
    w = sparse_weight(rng, (10, 8, 3, 3), 4)
    packed = ops.BSRInt8.from_dense(w)
    x = rng.standard_normal((2, 20, 8, 9)).astype(np.float32)
    zero = np.zeros(10, np.float32)
    last = np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    for weight, dense in ((packed, False), (ops.Int8.from_dense(w), True)):
        want = expected(x[:, 4:12], *quantize_weight(w), zero, 1, 1, 1, 1, dense)
        for part in (x[:, 4:12], last[:, 4:12]):
            check(ops.conv2d(part, weight, padding=1), want)
            check(ops.conv2d(part, weight, padding=1, activation="relu"), np.maximum(want, 0))


def test_planted_faults_are_caught(isa, rng):
    """Taps in another order, channels in another order, padding that is not zero."""
    w = sparse_weight(rng, (6, 8, 3, 3), 1)
    x = rng.standard_normal((1, 8, 7, 7)).astype(np.float32)
    y = ops.conv2d(x, ops.BSRInt8.from_dense(w), padding=1)
    q, scales = quantize_weight(w)
    zero = np.zeros(6, np.float32)
    check(y, expected(x, q, scales, zero, 1, 1, 1, 1))
    # A static zero point that padding ignores: the bytes of padding then stand for -zero * scale.
    static = ops.Int8.from_dense(w, activation_scale=0.03, activation_zero=40, activation_dtype="uint8")
    shifted = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=np.float32(-40 * 0.03))
    check(
        ops.conv2d(x, static, padding=1), expected(x, q, scales, zero, 1, 1, 1, 1, True, static.activations)
    )
    with pytest.raises(AssertionError):
        check(ops.conv2d(shifted, static), expected(x, q, scales, zero, 1, 1, 1, 1, True, static.activations))
    for wrong in (q.transpose(0, 1, 3, 2), q[:, [1, 0, *range(2, 8)]]):
        with pytest.raises(AssertionError):
            check(y, expected(x, np.ascontiguousarray(wrong), scales, zero, 1, 1, 1, 1))
    edge = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)), mode="edge")
    with pytest.raises(AssertionError):
        check(ops.conv2d(edge, ops.BSRInt8.from_dense(w)), expected(x, q, scales, zero, 1, 1, 1, 1))


@pytest.mark.parametrize("weight", ["bsr8", "int8"])
def test_module(isa, rng, weight):
    from pared.nn import Conv2d

    plain = torch.nn.Conv2d(8, 12, 3, padding=1, stride=2)
    module = Conv2d.from_module(plain, format=weight, activation="relu")
    x = torch.randn(2, 8, 9, 9)
    w = plain.weight.detach().numpy()
    bias = plain.bias.detach().numpy()
    want = expected(x.numpy(), *quantize_weight(w), bias, 2, 1, 1, 1, weight == "int8")
    check(module(x).numpy(), np.maximum(want, 0))
    assert (module(x) - plain(x).relu()).abs().max() < 0.05


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor, torch.quantize_per_channel")
def test_against_torchs_quantised_convolution(isa, rng):
    """The same bytes through torch's own int8 convolution: its sums are ours."""
    if "onednn" not in torch.backends.quantized.supported_engines:
        pytest.skip("this build of torch has no onednn engine for quantised convolutions")
    w = sparse_weight(rng, (8, 16, 3, 3), 4)
    q, scales = quantize_weight(w)
    x = rng.standard_normal((1, 16, 10, 10)).astype(np.float32)
    qx, sx = quantize_images(x)
    y = ops.conv2d(x, ops.BSRInt8.from_dense(w), padding=1)
    # One scale for all sums, so that torch's requantisation to 8 bits is the only rounding that differs.
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = "onednn"
    try:
        weight = torch._make_per_channel_quantized_tensor(
            torch.from_numpy(q),
            torch.from_numpy(scales.astype(np.float64)),
            torch.zeros(8, dtype=torch.int64),
            0,
        )
        image = torch._make_per_tensor_quantized_tensor(
            torch.from_numpy((qx + 128).astype(np.uint8)), float(sx[0]), 128
        )
        step = float(np.abs(y).max()) / 127
        params = torch.ops.quantized.conv2d_prepack(weight, None, [1, 1], [1, 1], [1, 1], 1)
        theirs = torch.ops.quantized.conv2d(image, params, step, 128).dequantize().numpy()
    finally:
        torch.backends.quantized.engine = before
    assert np.abs(theirs - y).max() <= step * 0.501
