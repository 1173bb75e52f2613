"""Checks a sparse linear result against csrc/ref in float64, within a bound that is a formula."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pared import _core

UNIT = 2.0**-24  # float32's unit roundoff
# Rounding unit and least denormal of the output.
OUTPUT = {"float32": (0.0, 0.0), "float16": (2.0**-11, 2.0**-25), "bfloat16": (2.0**-8, 2.0**-134)}
# An activation's largest slope, and its own error in ulp (csrc/kernels/generic/activation.h).
ACTIVATIONS = {
    None: (1.0, 0.0),
    "relu": (1.0, 0.0),
    "silu": (1.1, 4.0),
    "gelu": (1.13, 8.0),
    "gelu_tanh": (1.13, 4.0),
}


def activation(name: str | None, x: np.ndarray) -> np.ndarray:
    """In float64, tails included."""
    if name is None:
        return x
    if name == "relu":
        return np.maximum(x, 0.0)
    t = np.abs(x)
    with np.errstate(over="ignore", under="ignore"):
        if name == "gelu":
            tail = np.frompyfunc(lambda v: 0.5 * math.erfc(v * math.sqrt(0.5)), 1, 1)(t).astype(np.float64)
        else:
            z = t if name == "silu" else 2 * math.sqrt(2 / math.pi) * (t + 0.044715 * t**3)
            tail = np.exp(-z) / (1.0 + np.exp(-z))
        return np.where(x < 0, x * tail, x - x * tail)


def to_float64(a: Any) -> np.ndarray:
    """A numpy array or a torch tensor, bfloat16 included."""
    return a.astype(np.float64) if isinstance(a, np.ndarray) else a.detach().double().numpy()


def expected(
    x: Any, w: Any, bias: Any = None, name: str | None = None, dtype: str = "float32"
) -> tuple[np.ndarray, np.ndarray]:
    """The exact result, [tokens, rows], and how far a correct kernel's may be from it.

    A sum of n products has n - 1 additions and n multiplications in some order; the kernels add partial sums
    (up to 8), the blocks of the reduction, and the bias. Each term passes at most n + 12 roundings, each
    within a factor 1 +- u: |error| <= gamma(n + 12) * (|x| |W|^T + |bias|), gamma(m) = m u / (1 - m u).
    """
    x, w = to_float64(x), to_float64(w)
    w = np.where(np.abs(w) < np.finfo(np.float32).tiny, 0.0, w)  # zeros and denormals are not stored
    rows, columns = np.nonzero(w)
    row_ptr = np.searchsorted(rows, np.arange(w.shape[0] + 1)).astype(np.int64)
    total, magnitude = _core.linear_reference(
        np.ascontiguousarray(x.reshape(-1, w.shape[1]))
        if x.size
        else np.zeros((math.prod(x.shape[:-1]), w.shape[1])),
        row_ptr,
        columns.astype(np.int64),
        w[rows, columns],
        None if bias is None else to_float64(bias),
    )
    m = np.diff(row_ptr) + 12
    tolerance = m * UNIT / (1 - m * UNIT) * magnitude
    slope, ulps = ACTIVATIONS[name]
    unit, least = OUTPUT[dtype]
    y = activation(name, total)
    # A product of normal numbers may underflow: half of float32's least denormal for each.
    tolerance = slope * (tolerance + m * 2.0**-150) + ulps * (2.0**-23 * np.abs(y) + 2.0**-149)
    return y, tolerance * (1 + unit) + unit * np.abs(y) + least


def check_linear(
    y: Any, x: Any, w: Any, bias: Any = None, name: str | None = None, dtype: str = "float32"
) -> None:
    """Raise AssertionError unless `y` is activation(x w^T + bias) within the bound, in the right shape."""
    want, tolerance = expected(x, w, bias, name, dtype)
    assert tuple(y.shape) == (*x.shape[:-1], w.shape[0])
    got = to_float64(y).reshape(want.shape)
    error = np.abs(got - want)
    wrong = ~(error <= tolerance)
    if wrong.any():
        token, row = np.argwhere(wrong)[0]
        raise AssertionError(
            f"{wrong.sum()} of {wrong.size} outputs are wrong; token {token}, row {row}: expected "
            f"{want[token, row]!r} within {tolerance[token, row]:.3g}, got {got[token, row]!r}"
        )
