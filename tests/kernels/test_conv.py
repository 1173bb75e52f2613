"""The convolution kernels on every instruction set, against the scalar specification. Only numpy."""

from __future__ import annotations

import numpy as np
import pytest
from conv_check import Geometry, assert_within, bound, channels_last, reference, sparse_weight
from hypothesis import given, settings
from hypothesis import strategies as st

import pared.ops
from pared import _core


def run(x, w, bias, g: Geometry, activation=None):
    """conv2d with the extension's own arguments: padding may differ on the four sides."""
    packed = pared.ops.CSR.from_dense(w, groups=g.groups)
    packed.validate()
    n, _, height, width = x.shape
    out_h, out_w = _core.conv2d_output_size(height, width, *w.shape[2:], g.stride, g.padding, g.dilation)
    room = np.full((n + 1, w.shape[0], out_h, out_w), np.nan, dtype=x.dtype)
    if not x.flags.c_contiguous and x.strides[1] < x.strides[3]:
        room = channels_last(room)
    y = room[:n]
    _core.conv2d(x, packed.packed, bias, g.stride, g.padding, g.dilation, g.groups, activation, None, y)
    assert np.isnan(room[n]).all(), "written behind the last image"
    return y


def check(x, w, bias, g: Geometry):
    dtype = str(x.dtype)
    assert_within(run(x, w, bias, g), reference(x, w, bias, g), bound(x, w, bias, g, dtype))


LAYOUTS = pytest.mark.parametrize("layout", [np.ascontiguousarray, channels_last], ids=["nchw", "nhwc"])


@LAYOUTS
@pytest.mark.parametrize("positions", [1, 15, 16, 17, 63, 64, 65, 95, 96, 97, 193])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3)], ids=str)
def test_tile_boundaries(isa, rng, layout, positions, kernel):
    """Output positions around the vector's 16 and the tiles' 64 and 96, rows around the row group's 16."""
    g = Geometry(padding=(kernel[0] // 2,) * 4)
    for filters, sparsity in ((15, 0.5), (17, 0.95)):
        x = layout(rng.standard_normal((1, 11, 1, positions)).astype(np.float32))
        check(x, sparse_weight(rng, (filters, 11, *kernel), sparsity), None, g)


@LAYOUTS
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7])
def test_small_images_share_tiles(isa, rng, layout, size):
    """A tile that spans many rows of many images."""
    x = layout(rng.standard_normal((9, 5, size, size)).astype(np.float32))
    check(x, sparse_weight(rng, (18, 5, 3, 3), 0.7), None, Geometry(padding=(1, 1, 1, 1)))
    check(x, sparse_weight(rng, (18, 5, 1, 1), 0.7), None, Geometry())
    check(x, sparse_weight(rng, (18, 5, 1, 1), 0.7), None, Geometry(stride=(2, 2)))


@LAYOUTS
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("kernel", [(1, 1), (2, 3), (3, 3), (7, 7)], ids=str)
def test_strides(isa, rng, layout, dtype, stride, kernel):
    """Steps 1 and 2 have vector loads of their own, for each type."""
    x = layout(rng.standard_normal((2, 6, 19, 37)).astype(dtype))
    w = sparse_weight(rng, (20, 6, *kernel), 0.8)
    bias = rng.standard_normal(20).astype(np.float32)
    for pad in ((0, 0, 0, 0), (2, 0, 1, 3)):
        check(x, w, bias, Geometry(stride=(stride, stride), padding=pad))


@LAYOUTS
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding"),
    [
        ((8, 8), (3, 3), (2, 2), (1, 1, 1, 1)),  # phases as wide as the output: tiles are one run
        ((9, 8), (3, 3), (2, 1), (1, 1, 1, 1)),
        ((7, 9), (3, 3), (2, 2), (0, 0, 0, 0)),  # wider
        ((5, 4), (3, 3), (2, 2), (1, 0, 3, 4)),  # narrower: padding is wider than the image
        ((3, 3), (2, 2), (5, 5), (1, 4, 4, 2)),  # phases that lie outside the image
        ((72, 56), (1, 1), (2, 2), (0, 0, 0, 0)),  # a plane of 1024 floats: channels are moved apart
        ((6, 6), (1, 1), (1, 1), (1, 1, 2, 2)),
    ],
    ids=str,
)
def test_phases_of_a_stride(isa, layout, dtype, size, kernel, stride, padding):
    """Strided and 16-bit images are split into planes first. Integers are exact: a lost element shows."""
    x = layout((np.arange(3 * 5 * size[0] * size[1]) % 61 - 30).astype(dtype).reshape(3, 5, *size))
    w = np.zeros((18, 5, *kernel), dtype=np.float32)
    w[np.arange(18), np.arange(18) % 5] = np.arange(-4, 4)[np.arange(kernel[0] * kernel[1]) % 8].reshape(
        kernel
    )
    g = Geometry(stride=stride, padding=padding)
    assert np.array_equal(run(x, w, None, g), reference(x, w, None, g))


def at_boundary(x, offset=0):
    """A copy of `x` that begins `offset` elements behind a 64-byte boundary."""
    room = np.full(x.size + 32, np.nan, dtype=x.dtype)
    begin = -room.ctypes.data % 64 // x.itemsize + offset
    copy = room[begin : begin + x.size].reshape(x.shape)
    copy[...] = x
    return copy


@pytest.mark.parametrize("size", [(4, 4), (8, 6), (12, 12), (1, 16), (16, 16), (28, 28), (16, 17), (31, 32)])
@pytest.mark.parametrize(("images", "channels"), [(1, 1), (3, 5), (1, 300)])
def test_planes_that_are_panels(isa, rng, size, images, channels):
    """1x1 kernels multiply aligned planes of whole vectors where they lie, others from a packed panel."""
    x = rng.standard_normal((images, channels, *size)).astype(np.float32)
    g = Geometry()
    for sparsity in (0.5, 0.9, 0.98):
        w = sparse_weight(rng, (35, channels, 1, 1), sparsity)
        check(at_boundary(x), w, None, g)
        check(at_boundary(x, 4), w, None, g)


def test_a_slice_of_channels_and_images_is_multiplied_in_place(isa, rng):
    """Channels and images apart by whole vectors, and by something else; NaN around them is not read."""
    for gap in (16, 5):
        room = at_boundary(np.full((5, 40, 3, 64 + gap), np.nan, dtype=np.float32))
        planes = np.lib.stride_tricks.as_strided(
            room[::2, 7:], (3, 33, 9, 16), (*room[::2].strides[:2], 64, 4), writeable=True
        )
        planes[...] = rng.standard_normal(planes.shape)
        check(planes, sparse_weight(rng, (20, 33, 1, 1), 0.7), None, Geometry())


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("size", [(8, 8), (7, 7), (14, 13), (28, 28), (64, 64)])
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (1, 2), (3, 1)])
def test_split_planes_that_are_panels(isa, rng, dtype, size, stride):
    """Phases of a stride and widened images, a few images at a time, whose last vectors are not full."""
    x = rng.standard_normal((2, 130, *size)).astype(dtype)
    check(x, sparse_weight(rng, (18, 130, 1, 1), 0.9), None, Geometry(stride=stride))


@LAYOUTS
def test_more_images_than_are_split_at_once(isa, rng, layout):
    """Phases of a few images at a time: each later group lands behind the first in the output."""
    x = layout(rng.standard_normal((3, 2, 1100, 500)).astype(np.float32))
    check(x, sparse_weight(rng, (2, 2, 2, 2), 0.5), None, Geometry(stride=(2, 2)))


@LAYOUTS
def test_many_blocks_of_the_reduction(isa, rng, layout):
    """More channels than a K block, and than a transpose call, holds; filters in several row groups."""
    x = layout(rng.standard_normal((1, 300, 5, 6)).astype(np.float32))
    check(x, sparse_weight(rng, (50, 300, 3, 3), 0.9), None, Geometry(padding=(1, 1, 1, 1)))
    check(x, sparse_weight(rng, (50, 300, 1, 1), 0.9), None, Geometry(stride=(2, 1)))


def test_deep_convolution(isa, rng):
    """A million weights at 80 % zeros have K blocks of their own depth."""
    w = np.zeros((1024, 1024, 1, 1), dtype=np.float32)
    w[:, :300] = sparse_weight(rng, (1024, 300, 1, 1), 0.3)
    x = rng.standard_normal((1, 1024, 3, 6)).astype(np.float32)
    check(x, w, None, Geometry())


@LAYOUTS
@pytest.mark.parametrize(
    ("images", "size"),
    [
        (1, (56, 56)),  # two bands of rows a vector
        (1, (16, 20)),  # four bands
        (1, (28, 28)),  # whole vectors, the second of a row not full
        (1, (14, 14)),
        (1, (7, 7)),
        (8, (7, 7)),  # bands of several images
        (5, (7, 8)),  # the last of one image alone
        (3, (9, 4)),
        (2, (61, 5)),
        (1, (17, 48)),  # tiles of eight rows and of less
        (1, (2, 100)),  # too few rows for strips
        (1, (1, 33)),
    ],
    ids=str,
)
def test_strips_of_rows(isa, rng, layout, images, size):
    """Every way to cut outputs into vectors; channels in several K blocks. Integers are exact."""
    x = layout(rng.integers(-4, 5, (images, 19, *size)).astype(np.float32))
    w = rng.integers(-3, 4, (18, 19, 3, 3)).astype(np.float32) * (rng.random((18, 19, 3, 3)) < 0.4)
    g = Geometry(padding=(1, 1, 1, 1))
    assert np.array_equal(run(x, w.astype(np.float32), None, g), reference(x, w, None, g))


@LAYOUTS
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(
    ("kernel", "stride", "dilation"),
    [
        ((3, 1), (1, 1), (1, 1)),
        ((2, 2), (1, 1), (1, 1)),
        ((5, 4), (1, 1), (1, 1)),  # more columns than have code of their own
        ((9, 8), (1, 1), (1, 1)),  # more taps than a table in registers holds
        ((17, 15), (1, 1), (1, 1)),  # one channel a K block
        ((16, 16), (1, 1), (1, 1)),  # more taps than an offset can name
        ((3, 3), (1, 1), (2, 1)),
        ((3, 2), (1, 1), (9, 3)),  # taps so far apart that they share no row
        ((3, 3), (2, 2), (1, 1)),
        ((7, 7), (2, 2), (1, 1)),
        ((4, 3), (3, 2), (2, 1)),
    ],
    ids=str,
)
def test_strips_of_kernels(isa, rng, layout, dtype, kernel, stride, dilation):
    """Strips of each column of the kernel, of each phase of the rows. Integers are exact."""
    x = layout(rng.integers(-4, 5, (2, 3, 34, 32)).astype(dtype))
    w = (rng.integers(-3, 4, (18, 3, *kernel)) * (rng.random((18, 3, *kernel)) < 0.3)).astype(np.float32)
    g = Geometry(stride, (3, 2, 1, 4), dilation)
    expected = reference(x, w, None, g)
    y = run(x, w, None, g)
    # Sums up to 2048 are float16's, too.
    assert np.array_equal(y, expected.astype(dtype))


def test_what_lies_around_an_image_is_not_read(isa, rng):
    """Rows, channels and images of a larger array of NaN, through strips of whole vectors and of bands."""
    for size in ((14, 14), (9, 7), (16, 24)):
        room = np.full((5, 40, size[0] + 2, size[1]), np.nan, dtype=np.float32)
        x = room[::2, 7:24, 1:-1]
        x[...] = rng.standard_normal(x.shape)
        check(x, sparse_weight(rng, (20, 17, 3, 3), 0.7), None, Geometry(padding=(1, 1, 1, 1)))


@LAYOUTS
@pytest.mark.parametrize(("groups", "channels", "filters"), [(12, 12, 12), (12, 12, 24), (3, 21, 33)])
def test_groups(isa, rng, layout, groups, channels, filters):
    x = layout(rng.standard_normal((2, channels, 9, 11)).astype(np.float32))
    w = sparse_weight(rng, (filters, channels // groups, 3, 3), 0.4)
    check(x, w, None, Geometry((2, 1), (1, 1, 1, 1), (1, 2), groups))


@LAYOUTS
def test_kernel_larger_than_the_image(isa, rng, layout):
    x = layout(rng.standard_normal((2, 3, 2, 3)).astype(np.float32))
    check(x, sparse_weight(rng, (4, 3, 7, 9), 0.3), None, Geometry(padding=(3, 4, 4, 3)))


@LAYOUTS
def test_empty_and_full_rows(isa, rng, layout):
    """A row group without non-zeros, one with a single one, and full rows; the bias reaches all of them."""
    w = np.zeros((49, 7, 3, 3), dtype=np.float32)
    w[16, 3, 1, 2] = 2.0
    w[33] = rng.standard_normal((7, 3, 3))
    bias = rng.standard_normal(49).astype(np.float32)
    x = layout(rng.standard_normal((2, 7, 8, 8)).astype(np.float32))
    g = Geometry(padding=(1, 1, 1, 1))
    check(x, w, bias, g)
    assert np.array_equal(
        run(x, np.zeros_like(w), bias, g), np.broadcast_to(bias[:, None, None], (2, 49, 8, 8))
    )


@LAYOUTS
@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
def test_activations(isa, rng, layout, activation):
    x = layout(rng.standard_normal((1, 8, 7, 7)).astype(np.float32))
    w, bias = sparse_weight(rng, (20, 8, 3, 3), 0.5), rng.standard_normal(20).astype(np.float32)
    g = Geometry(padding=(1, 1, 1, 1))
    plain = run(x, w, bias, g).astype(np.float64)
    erf = np.vectorize(__import__("math").erf)
    expected = {
        "relu": lambda v: np.maximum(v, 0),
        "gelu": lambda v: 0.5 * v * (1 + erf(v / np.sqrt(2))),
        "gelu_tanh": lambda v: 0.5 * v * (1 + np.tanh(np.sqrt(2 / np.pi) * (v + 0.044715 * v**3))),
        "silu": lambda v: v / (1 + np.exp(-v)),
    }[activation](plain)
    # On the same sums: what is left is the activation's own rounding, a few units of its argument.
    assert_within(run(x, w, bias, g, activation), expected, 2.0**-21 * (np.abs(plain) + 2.0**-20))


@LAYOUTS
def test_padding_is_zero_not_a_neighbour(isa, layout):
    """Integers are exact: any element that leaks in from beyond a border shows."""
    x = layout(np.arange(1, 2 * 3 * 5 * 17 + 1, dtype=np.float32).reshape(2, 3, 5, 17))
    w = np.ones((2, 3, 3, 3), dtype=np.float32)
    g = Geometry(padding=(1, 1, 1, 1))
    assert np.array_equal(run(x, w, None, g), reference(x, w, None, g))


@LAYOUTS
def test_zero_times_infinity_is_skipped(isa, layout):
    """A stored zero reads nothing: only outputs that a non-zero weight connects see a non-finite input."""
    x = np.ones((1, 2, 4, 5), dtype=np.float32)
    x[0, 0, 1, 2], x[0, 1, 3, 3] = np.inf, np.nan
    w = np.zeros((3, 2, 1, 1), dtype=np.float32)
    w[0, 0], w[1, 1] = 1.0, -1.0
    y = run(layout(x), w, None, Geometry())
    assert np.array_equal(y[0, 0], x[0, 0])
    assert np.array_equal(y[0, 1], -x[0, 1], equal_nan=True)
    assert not y[0, 2].any()


def test_slices_need_no_copy(isa, rng):
    """Channels and images of a larger array, in both layouts."""
    big = rng.standard_normal((4, 12, 6, 7)).astype(np.float32)
    for kernel, pad in ((1, 0), (3, 1)):
        w = sparse_weight(rng, (5, 6, kernel, kernel), 0.5)
        g = Geometry(padding=(pad,) * 4)
        for x in (big[:, 3:9], big[::2, 6:], channels_last(big)[:, 3:9], channels_last(big)[::2, 6:]):
            y = pared.ops.conv2d(x, pared.ops.CSR.from_dense(w), padding=pad)
            assert_within(y, reference(x, w, None, g), bound(x, w, None, g, "float32"))


@st.composite
def cases(draw):
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    shape = (draw(st.integers(1, 3)), groups * draw(st.integers(1, 9)))
    kernel = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    dilation = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    padding = draw(st.tuples(*[st.integers(0, 3)] * 4))
    least = [max(1, dilation[a] * (kernel[a] - 1) + 1 - padding[2 * a] - padding[2 * a + 1]) for a in (0, 1)]
    size = [draw(st.integers(n, n + 20)) for n in least]
    g = Geometry(draw(st.tuples(st.integers(1, 4), st.integers(1, 4))), padding, dilation, groups)
    filters = groups * draw(st.integers(1, 12))
    return (*shape, *size), (filters, shape[1] // groups, *kernel), g


@settings(max_examples=60)
@given(
    case=cases(),
    seed=st.integers(0, 2**32 - 1),
    sparsity=st.sampled_from([0.0, 0.6, 0.95]),
    dtype=st.sampled_from([np.float32, np.float16]),
    last=st.booleans(),
    with_bias=st.booleans(),
)
def test_any_convolution(isa, case, seed, sparsity, dtype, last, with_bias):
    image, weight, g = case
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(image).astype(dtype)
    bias = rng.standard_normal(weight[0]).astype(np.float32) if with_bias else None
    check(channels_last(x) if last else x, sparse_weight(rng, weight, sparsity), bias, g)


@pytest.mark.parametrize(
    ("size", "stride"), [((2, 1), (1, 2)), ((1, 5), (3, 1)), ((7, 1), (2, 2)), ((1, 1), (2, 3))]
)
def test_a_stride_that_leaves_out_nothing(isa, rng, size, stride):
    """The output is as large as the image, which is as narrow as one step."""
    x = rng.standard_normal((2, 3, *size)).astype(np.float32)
    check(x, sparse_weight(rng, (4, 3, 1, 1), 0.3), None, Geometry(stride=stride))


# Planted faults: the comparison that all the tests above rest on has to notice each of them.


def test_the_check_notices_padding_off_by_one(isa, rng):
    x = rng.standard_normal((1, 4, 8, 40)).astype(np.float32)
    w = sparse_weight(rng, (6, 4, 3, 3), 0.9)
    g, shifted = Geometry(padding=(1, 1, 1, 1)), Geometry(padding=(1, 1, 0, 2))
    check(x, w, None, g)
    with pytest.raises(AssertionError, match="expected"):
        assert_within(run(x, w, None, shifted), reference(x, w, None, g), bound(x, w, None, g, "float32"))


def test_the_check_notices_a_dropped_run(isa, rng):
    """One vector's worth of one output row not gathered: what a lost lane mask would leave."""
    x = rng.standard_normal((1, 4, 8, 40)).astype(np.float32)
    w = sparse_weight(rng, (6, 4, 3, 3), 0.9)
    g = Geometry(padding=(1, 1, 1, 1))
    y = run(x, w, None, g)
    dropped = x.copy()
    dropped[0, 2, 4, 16:32] = 0.0
    with pytest.raises(AssertionError, match="expected"):
        assert_within(run(dropped, w, None, g), reference(x, w, None, g), bound(x, w, None, g, "float32"))
    y[0, 5, 7, 39] = np.nan
    with pytest.raises(AssertionError, match="expected"):
        assert_within(y, reference(x, w, None, g), bound(x, w, None, g, "float32"))


def test_the_check_notices_a_lost_weight(isa, rng):
    """The bound is tight enough to see one ordinary weight of 450 go missing."""
    x = rng.standard_normal((1, 100, 6, 6)).astype(np.float32)
    w = sparse_weight(rng, (4, 100, 3, 3), 0.5)
    g = Geometry()
    pruned = w.copy()
    stored = np.argwhere(w[1])
    order = np.argsort(np.abs(w[1][tuple(stored.T)]))
    pruned[(1, *stored[order[len(order) // 2]])] = 0.0
    with pytest.raises(AssertionError, match="expected"):
        assert_within(run(x, pruned, None, g), reference(x, w, None, g), bound(x, w, None, g, "float32"))
