"""What attention has to give: csrc/ref/attention.h, with its bound and the rounding of the output's dtype."""

from __future__ import annotations

from typing import Any

import numpy as np

from pared import _core


def expected(
    q: Any, k: Any, v: Any, mask: Any = None, scale: float | None = None, is_causal: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """The exact result, and how far from it float32 may be."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    batch, heads, queries, features = q.shape
    scale = features**-0.5 if scale is None else scale
    k, v = (np.repeat(x, heads // x.shape[1], 1) for x in (k, v))
    if mask is not None:
        mask = np.asarray(mask)
        add = np.where(mask, 0.0, -np.inf) if mask.dtype == bool else mask.astype(np.float64)
        mask = _flat(np.broadcast_to(add, (batch, heads, queries, k.shape[2])))
    y, error = _core.attention_reference(_flat(q), _flat(k), _flat(v), mask, scale, is_causal)
    shape = (batch, heads, queries, v.shape[3])
    return y.reshape(shape), error.reshape(shape)


def _flat(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x.reshape(-1, *x.shape[2:]))


def check(y: Any, q: Any, k: Any, v: Any, **options: Any) -> None:
    want, bound = expected(q, k, v, **options)
    assert tuple(y.shape) == want.shape
    dtype = str(y.dtype)
    if "16" in dtype:  # half a unit in the last place; float16 has none below 2^-24
        bound = bound + 2.0 ** (-8 if "bfloat16" in dtype else -11) * np.abs(want) + 2.0**-25
    error = np.abs(np.asarray(y.float() if "torch" in dtype else y, np.float64) - want)
    assert (error <= bound).all(), (error / bound).max()
