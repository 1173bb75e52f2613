"""Max pooling on every level, against the definition; results are exact. Only numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pared.ops import max_pool2d


def expected(x: Any, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil: bool = False) -> Any:
    """Window by window; the number of windows as torch documents it."""
    sizes = []
    for axis in (0, 1):
        size, k, s, p, d = x.shape[2 + axis], kernel[axis], stride[axis], padding[axis], dilation[axis]
        free = size + 2 * p - d * (k - 1) - 1
        n = (free + s - 1 if ceil else free) // s + 1
        sizes.append(n - 1 if ceil and (n - 1) * s >= size + p else n)
    y = np.full((*x.shape[:2], *sizes), -np.inf, x.dtype)
    for oy, ox in np.ndindex(*sizes):
        for i, j in np.ndindex(*kernel):
            iy = oy * stride[0] - padding[0] + i * dilation[0]
            ix = ox * stride[1] - padding[1] + j * dilation[1]
            if 0 <= iy < x.shape[2] and 0 <= ix < x.shape[3]:
                y[:, :, oy, ox] = np.maximum(y[:, :, oy, ox], x[:, :, iy, ix])
    return y


def check(
    x: Any, kernel: Any, stride: Any, padding: Any = (0, 0), dilation: Any = (1, 1), ceil: bool = False
) -> None:
    y = max_pool2d(x, kernel, stride, padding, dilation, ceil)
    np.testing.assert_array_equal(y, expected(x, kernel, stride, padding, dilation, ceil))


@pytest.mark.parametrize("width", [3, 7, 8, 9, 15, 16, 17, 31, 33, 64, 112])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_widths_around_the_vectors(isa, rng, width, stride):
    x = rng.standard_normal((2, 3, 9, width)).astype(np.float32)
    check(x, (3, 3), (stride, stride), (1, 1))
    check(x.astype(np.float16), (3, 2), (stride, stride), (1, 0))


pairs = st.tuples(st.integers(1, 4), st.integers(1, 4))


@settings(max_examples=60)
@given(
    size=st.tuples(st.integers(1, 20), st.integers(1, 50)),
    kernel=pairs,
    stride=pairs,
    dilation=pairs,
    padding=st.tuples(st.integers(0, 6), st.integers(0, 6)),
    ceil=st.booleans(),
    half=st.booleans(),
    holes=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_window(isa, size, kernel, stride, dilation, padding, ceil, half, holes, seed):
    rng = np.random.default_rng(seed)
    span = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    padding = tuple(min(p, n // 2) for p, n in zip(padding, span, strict=True))
    # The fixture asks for a kernel to run: the first is a window that always fits.
    check(rng.standard_normal((1, 1, 2, 2)).astype(np.float32), (1, 1), (1, 1))
    assume(all(n + 2 * p >= s for n, p, s in zip(size, padding, span, strict=True)))
    x = rng.standard_normal((2, 2, *size)).astype(np.float16 if half else np.float32)
    if holes:
        x[rng.random(x.shape) < 0.1] = rng.choice([np.nan, -np.inf, np.inf, -0.0])
    check(x, kernel, stride, padding, dilation, ceil)


@pytest.mark.parametrize("at", [(0, 0), (0, 5), (2, 16), (6, 30), (3, 8)])
def test_not_a_number_stays_in_its_windows(isa, rng, at):
    """First, in the middle and last in a window, in rows and columns."""
    x = rng.standard_normal((1, 1, 7, 31)).astype(np.float32)
    x[0, 0][at] = np.nan
    for stride in (1, 2, 3):
        check(x, (3, 3), (stride, stride), (1, 1))


def test_a_slice_of_channels_is_read_where_it_is(isa, rng):
    room = np.full((3, 7, 5, 9), np.nan, np.float32)
    room[1:, 2:5] = rng.standard_normal((2, 3, 5, 9))
    x = room[1:, 2:5]
    np.testing.assert_array_equal(max_pool2d(x, 2), max_pool2d(x.copy(), 2))
    assert not np.isnan(max_pool2d(x, 2)).any()


def test_a_wrong_result_is_seen(isa, rng):
    x = rng.standard_normal((1, 2, 9, 20)).astype(np.float32)
    y = max_pool2d(x, 3, 2, 1)
    want = expected(x, (3, 3), (2, 2), (1, 1), (1, 1))
    y[0, 1, 2, 3] = np.nextafter(y[0, 1, 2, 3], np.float32(9))
    with pytest.raises(AssertionError):
        np.testing.assert_array_equal(y, want)


def test_shapes_and_kinds(isa, rng):
    x = rng.standard_normal((3, 8, 10)).astype(np.float32)
    assert max_pool2d(x, 2).shape == (3, 4, 5)
    assert max_pool2d(x, (1, 2), 1).shape == (3, 8, 9)
    assert max_pool2d(x[None][:0], 2).shape == (0, 3, 4, 5)
    torch = pytest.importorskip("torch")
    t = torch.from_numpy(x).to(torch.bfloat16)
    assert torch.equal(max_pool2d(t, 3, 2, 1), torch.nn.functional.max_pool2d(t, 3, 2, 1))
    with pytest.raises(RuntimeError, match="x: expected a tensor that needs no gradient"):
        max_pool2d(t.requires_grad_(), 2)


def test_threads_give_the_same(rng):
    torch = pytest.importorskip("torch")
    x = rng.standard_normal((2, 64, 40, 40)).astype(np.float32)
    before = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(max_pool2d(x, 3, 2, 1))
    finally:
        torch.set_num_threads(before)
    assert all((r == results[0]).all() for r in results)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": [1.0]}, "x: expected a numpy array"),
        ({"x": np.zeros((4, 4), np.float32)}, "x: expected .N, C, H, W."),
        ({"x": np.zeros((1, 1, 4, 4))}, "x: expected"),
        ({"x": np.zeros((1, 1, 4, 8), np.float32)[..., ::2]}, "x: expected contiguous planes"),
        ({"x": np.zeros((1, 1, 1, 4), np.float32)}, "x: expected a padded size"),
        ({"kernel_size": 0}, "kernel_size: expected an integer of at least 1"),
        ({"kernel_size": 2.0}, "kernel_size: expected an int"),
        ({"stride": 0}, "stride: expected an integer of at least 1"),
        ({"stride": (1, 2, 3)}, "stride: expected an int"),
        ({"padding": 2}, "padding: expected 0 to half"),
        ({"padding": -1}, "padding: expected an integer of at least 0"),
        ({"dilation": 0}, "dilation: expected an integer of at least 1"),
        ({"dilation": 1 << 40}, "dilation: expected an integer of at most"),
        ({"ceil_mode": 1}, "ceil_mode: expected a bool"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises((TypeError, ValueError), match=message):
        max_pool2d(**{"x": np.zeros((1, 1, 4, 4), np.float32), "kernel_size": 2, **change})
