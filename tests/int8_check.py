"""The specification of the int8 linear operation in numpy: integers exact, floats rounded step by step."""

from __future__ import annotations

import numpy as np

SMALLEST = np.float32(2.0**-100)


def quantize_weight(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``(q int8 [out, in], scales float32 [out])``, symmetric by output."""
    largest = np.abs(w).max(axis=1, initial=0).astype(np.float32)
    scales = np.where(largest < SMALLEST, np.float32(0), largest / np.float32(127))
    safe = np.where(scales == 0, np.float32(1), scales)
    q = np.rint(w.astype(np.float32) / safe[:, None])
    return np.where(scales[:, None] == 0, 0, q).astype(np.int8), scales


def quantize_tokens(x: np.ndarray, activations=None) -> tuple[np.ndarray, np.ndarray, int]:
    """``(u [tokens, in], scales [tokens], zero)``: unsigned bytes as integers."""
    x = x.astype(np.float32)
    bad = ~np.isfinite(x).all(axis=1)
    x = np.where(bad[:, None], np.float32(0), x)
    if activations is None:
        largest = np.abs(x).max(axis=1, initial=0)
        some = largest >= SMALLEST
        safe = np.where(some, largest, np.float32(1))
        inverse = np.where(some, np.float32(127) / safe, np.float32(0))
        scales = np.where(some, largest / np.float32(127), np.float32(0))
        u, zero = np.rint(x * inverse[:, None]) + 128, 128
    else:
        scale, zero, low, high = activations
        with np.errstate(over="ignore"):
            scaled = x * (np.float32(1) / np.float32(scale))
        u = np.rint(np.clip(scaled, low - zero, high - zero)) + zero
        scales = np.full(len(x), np.float32(scale))
    return u.astype(np.int64), np.where(bad, np.float32(np.nan), scales), zero


def linear_int8(x, q, scales, bias=None, activations=None) -> np.ndarray:
    """What `pared.ops.linear` gives, bit by bit, in float32."""
    u, x_scales, zero = quantize_tokens(x, activations)
    sums = ((u - zero) @ q.astype(np.int64).T).astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        y = sums * x_scales[:, None] * scales[None, :].astype(np.float32)
        return y + (np.zeros(len(q), np.float32) if bias is None else bias)


def check_int8(got: np.ndarray, want: np.ndarray) -> None:
    """Fails unless every bit is the same (NaN equals NaN)."""
    assert got.shape == want.shape
    wrong = ~((got == want) | (np.isnan(got) & np.isnan(want)))
    assert not wrong.any(), (
        f"{wrong.sum()} of {wrong.size} outputs are wrong, first at {np.argwhere(wrong)[0].tolist()}: "
        f"{got[wrong][0]} for {want[wrong][0]}"
    )
