"""The specification that conv2d is compared with, and the bound that it has to keep."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pared import _core

F64 = NDArray[np.float64]

# Half the distance between neighbours of 1, and half of the smallest subnormal.
ROUNDING = {
    "float32": (2.0**-24, 2.0**-150),
    "float16": (2.0**-11, 2.0**-25),
    "bfloat16": (2.0**-8, 2.0**-134),
}


class Geometry(NamedTuple):
    """One convolution, as the extension's own arguments."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1


def reference(x: Any, w: Any, bias: Any, g: Geometry) -> F64:
    """conv2d in double, by the scalar specification."""
    x64, w64 = (np.ascontiguousarray(a, dtype=np.float64) for a in (x, w))
    b64 = None if bias is None else np.asarray(bias, dtype=np.float64)
    size = _core.conv2d_output_size(*x.shape[2:], *w.shape[2:], g.stride, g.padding, g.dilation)
    y = np.empty((x.shape[0], w.shape[0], *size))
    _core.conv2d_reference(x64, w64, b64, y, g.stride, g.padding, g.dilation, g.groups)
    return y


def bound(x: Any, w: Any, bias: Any, g: Geometry, dtype: str) -> F64:
    """The largest error that float32 accumulation in any order, and rounding to `dtype`, can cause.

    A sum of n products, each rounded, in any order: |error| <= gamma(n) * sum |w| |x|,
    gamma(n) = n u / (1 - n u) (Higham, Accuracy and Stability, 3.1). n is the row's non-zeros, and three for
    the bias and for roundings of the operands.
    """
    u = ROUNDING["float32"][0]
    n = np.count_nonzero(np.reshape(w, (w.shape[0], -1)), axis=1) + 3
    magnitude = reference(np.abs(x), np.abs(w), None if bias is None else np.abs(bias), g)
    error = (n * u / (1 - n * u))[None, :, None, None] * magnitude
    relative, absolute = ROUNDING[dtype]
    return error + relative * (magnitude + error) + absolute


def assert_within(y: Any, expected: F64, limit: F64) -> None:
    """Fails unless every element of `y` is within `limit` of `expected`."""
    assert y.shape == expected.shape
    error = np.abs(np.asarray(y, dtype=np.float64) - expected)
    worst = np.unravel_index(np.argmax(error - limit), error.shape) if error.size else ()
    assert np.all(error <= limit), f"at {worst}: got {y[worst]}, expected {expected[worst]} +- {limit[worst]}"


def sparse_weight(rng: np.random.Generator, shape: tuple[int, ...], sparsity: float) -> NDArray[np.float32]:
    """A random weight with about that share of zeros."""
    w = rng.standard_normal(shape).astype(np.float32)
    w[rng.random(shape) < sparsity] = 0.0
    return w


def channels_last(x: NDArray[Any]) -> NDArray[Any]:
    """The same images with channels innermost in memory."""
    return np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
