"""Checks layer normalisation against csrc/ref in float64, within a bound that is a formula."""

from __future__ import annotations

from typing import Any

import numpy as np
from linear_check import OUTPUT, UNIT, to_float64

from pared import _core


def expected(
    x: Any, weight: Any, bias: Any, eps: float, residual: Any, dtype: str
) -> tuple[np.ndarray, np.ndarray]:
    """The exact result, and how far from it float32 may be.

    With n features, s = x + residual is off by a rounding, the mean by gamma(n + 2) times the mean magnitude
    of s, and a deviation d from it by both and a rounding: e. The variance is off by what 2 |d| e + e^2 are
    in the mean, and by gamma(n + 4) of itself; the result by e and by what the inverse root of that range of
    variances leaves open, and by four roundings of its own.
    """
    shape = x.shape
    x = to_float64(x).reshape(-1, shape[-1])
    n = x.shape[1]
    if residual is not None:
        residual = to_float64(residual).reshape(x.shape)
    w, b = (None if a is None else to_float64(a) for a in (weight, bias))
    y = _core.layer_norm_reference(x, residual, w, b, eps)
    s = x if residual is None else x + residual
    mean = s.mean(1, keepdims=True)
    d = np.abs(s - mean)
    e = UNIT * (np.abs(s) + d) + (n + 2) * UNIT * np.abs(s).mean(1, keepdims=True)
    variance = (d * d).mean(1, keepdims=True)
    off = (2 * d * e + e * e).mean(1, keepdims=True) + (n + 4) * UNIT * variance
    most, least = 1 / np.sqrt(np.maximum(variance - off, 0) + eps), 1 / np.sqrt(variance + eps)
    scale = np.abs(1.0 if w is None else w)
    result = d * least * scale
    bound = scale * (e * most + d * (most - least)) + 4 * UNIT * (result + np.abs(0.0 if b is None else b))
    relative, denormal = OUTPUT[dtype]
    return y.reshape(shape), (1.1 * bound + relative * np.abs(y) + denormal + 1e-45).reshape(shape)


def check(y: Any, x: Any, weight: Any, bias: Any, eps: float, residual: Any) -> None:
    dtype = str(x.dtype).removeprefix("torch.")
    want, bound = expected(x, weight, bias, eps, residual, dtype)
    assert tuple(y.shape) == want.shape
    assert y.dtype == x.dtype
    error = np.abs(to_float64(y) - want)
    assert (error <= bound).all(), (error / bound).max()
