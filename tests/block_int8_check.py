"""What an int8 linear operation has to give, to the bit: csrc/kernels/types.h in numpy, sums in int64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from linear_check import activation, to_float64

LEAST = np.float32(2.0**-100)  # rows of activations or weights below it count as zero


def quantize_rows(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``(q, scales)`` of float32 rows: q int64 in [-127, 127]; NaN scales for rows that are not finite."""
    x = np.asarray(x, np.float32)
    most = np.abs(x).max(1, initial=0).astype(np.float32)
    finite = np.isfinite(most)
    counts = finite & (most >= LEAST)
    safe = np.where(counts, most, np.float32(1))
    inverse = np.where(counts, np.float32(127) / safe, np.float32(0)).astype(np.float32)
    with np.errstate(invalid="ignore"):
        q = np.rint(x * inverse[:, None])
    q = np.where(counts[:, None], q, 0).astype(np.int64)
    scales = np.where(finite, np.where(counts, safe / np.float32(127), np.float32(0)), np.float32(np.nan))
    return q, scales.astype(np.float32)


def quantize_weight(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``(q, scales)`` of a weight whose first axis is the outputs."""
    rows = np.asarray(w, np.float32).reshape(len(w), math.prod(np.shape(w)[1:]))
    most = np.abs(rows).max(1, initial=0).astype(np.float32)
    scales = np.where(most >= LEAST, most / np.float32(127), np.float32(0)).astype(np.float32)
    safe = np.where(scales > 0, scales, np.float32(1))
    q = np.where(scales[:, None] > 0, np.rint(rows / safe[:, None]), 0)
    return q.astype(np.int8).reshape(np.shape(w)), scales


def expected(x: Any, q: np.ndarray, scales: np.ndarray, bias: Any = None) -> np.ndarray:
    """Float32 [tokens, outputs] before the activation; x of any float type, leading axes folded."""
    rows = to_float64(x).reshape(math.prod(x.shape[:-1]), q.shape[1]).astype(np.float32)
    qx, sx = quantize_rows(rows)
    total = qx @ q.astype(np.int64).T
    if total.size:
        assert np.abs(total).max() < 2**31
    y = total.astype(np.int32).astype(np.float32) * (scales[None, :] * sx[:, None])
    return y if bias is None else y + np.asarray(bias, np.float32)


def check_int8(
    y: Any, x: Any, q: np.ndarray, scales: np.ndarray, bias: Any = None, name: str | None = None
) -> None:
    """Raise AssertionError unless `y` (float32) has exactly the bits of the specification.

    After an activation: unless it is within the activation's own error.
    """
    assert tuple(y.shape) == (*x.shape[:-1], len(q))
    want = expected(x, q, scales, bias)
    got = np.asarray(y).reshape(want.shape)
    if name is None:
        wrong = ~((got == want) | (np.isnan(got) & np.isnan(want)))
    else:
        want = activation(name, want.astype(np.float64))
        wrong = ~(
            (np.abs(got - want) <= 8 * 2.0**-23 * np.abs(want) + 2.0**-147) | (np.isnan(got) & np.isnan(want))
        )
    if wrong.any():
        token, row = np.argwhere(wrong)[0]
        raise AssertionError(
            f"{wrong.sum()} of {wrong.size} outputs are wrong; token {token}, row {row}: expected "
            f"{want[token, row]!r}, got {got[token, row]!r}"
        )
