"""What attention has to give: in float64, with a bound that follows from the roundings of float32."""

from __future__ import annotations

from typing import Any

import numpy as np

EPS = float(np.finfo(np.float32).eps)


def expected(
    q: Any, k: Any, v: Any, mask: Any = None, scale: float | None = None, is_causal: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """The exact result, and how far from it float32 may be.

    A score is a sum of D products, off by at most (2 D + 4) eps times the sum of their magnitudes (a
    rounding a product where nothing is fused), and its sum with the mask by eps of that. What a score is off,
    its weight is off relatively, once for itself and once for the largest, which is subtracted; the
    exponent's own roundings are in proportion to it, and sums over K keys add K eps, once for the weights and
    once for the outputs.
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scale = q.shape[3] ** -0.5 if scale is None else scale
    shared = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, shared, 1), np.repeat(v, shared, 1)
    scores = scale * q @ k.swapaxes(2, 3)
    off = (2 * q.shape[3] + 4) * EPS * abs(scale) * (np.abs(q) @ np.abs(k).swapaxes(2, 3))
    if mask is not None:
        mask = np.asarray(mask)
        add = np.where(mask, 0.0, -np.inf) if mask.dtype == bool else mask.astype(np.float64)
        scores = scores + add
    if is_causal:
        seen = np.arange(k.shape[2]) <= np.arange(q.shape[2])[:, None]
        scores = np.where(seen, scores, -np.inf)
    finite = np.isfinite(scores)
    off = np.where(finite, off + EPS * np.where(finite, np.abs(scores), 0), 0)
    largest = np.max(scores, axis=-1, keepdims=True, initial=np.finfo(np.float32).min)
    with np.errstate(invalid="ignore"):
        e = np.where(finite, scores - largest, -np.inf)
    weights = np.exp(e)
    total = weights.sum(-1, keepdims=True)
    weights = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
    own = off + 4 * EPS * np.where(finite, np.abs(e), 0)
    relative = own + own.max(-1, keepdims=True, initial=0) + (2 * k.shape[2] + 24) * EPS
    return weights @ v, 1.1 * (weights * relative) @ np.abs(v) + 1e-37 * (1 + np.abs(v).sum(2, keepdims=True))


def check(y: Any, q: Any, k: Any, v: Any, **options: Any) -> None:
    want, bound = expected(q, k, v, **options)
    assert tuple(y.shape) == want.shape
    error = np.abs(np.asarray(y, np.float64) - want)
    assert (error <= bound).all(), (error / bound).max()
