"""The specification of selection (csrc/ref: a stable sort) on arrays, and the checks against it."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pared import _core

Bools = NDArray[np.bool_]
Floats = NDArray[np.float32]


def as_numpy(x: Any) -> NDArray[Any]:
    """A tensor or array as numpy; bfloat16, which numpy lacks, widened to float32."""
    if isinstance(x, np.ndarray):
        return x
    x = x.detach()
    return (x.float() if x.dtype.is_floating_point else x).numpy()


def keys(w: Any, key: str = "abs", g: Any = None) -> Floats:
    """float32 keys; `g` broadcasts."""
    w32 = as_numpy(w).astype(np.float32)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        if key == "abs":
            return np.abs(w32)
        if key == "identity":
            return w32
        if key == "square":
            return w32 * w32
        return np.abs(w32 * as_numpy(g).astype(np.float32))


# Orders of the last few arrays: a test asks for many k of one, and sorting is nearly all of its time.
_orders: OrderedDict[tuple[Any, ...], NDArray[np.int64]] = OrderedDict()


def _reference(
    scores: Floats, k: int
) -> tuple[NDArray[np.int64], Bools, Floats, NDArray[np.int64], NDArray[np.int64]]:
    """What csrc/ref/selection.cc says of the last axis of `scores`."""
    rows = int(np.prod(scores.shape[:-1]))
    flat = np.ascontiguousarray(scores, np.float32).reshape(rows, scores.shape[-1])
    key = (flat.shape, hashlib.blake2b(flat.tobytes()).digest())
    known = _orders.pop(key, None)
    found = _core.selection_reference(flat, k, known)
    _orders[key] = found[0]
    if len(_orders) > 8:
        _orders.popitem(last=False)
    return found


def order(scores: Floats) -> NDArray[np.int64]:
    """Indices along the last axis by key descending, ties by index, NaN last."""
    return _reference(scores, 0)[0].reshape(scores.shape)


def mask(scores: Floats, k: int) -> Bools:
    """The k largest along the last axis."""
    return _reference(scores, min(k, scores.shape[-1]))[1].reshape(scores.shape)


def threshold(flat: Floats, k: int) -> tuple[float, int, int]:
    """(value, above, ties) of the k-th largest."""
    _, _, value, above, ties = _reference(flat, k)
    return float(value[0]) + 0.0, int(above[0]), int(ties[0])  # the key of -0.0 is 0.0


def by_tap(w: NDArray[Any]) -> NDArray[Any]:
    """[out, in, *taps] as [out, taps, in]."""
    taps = int(np.prod(w.shape[2:]))
    return np.moveaxis(w.reshape(w.shape[0], w.shape[1], taps), 1, 2)


def from_tap(m: Bools, shape: tuple[int, ...]) -> Bools:
    return np.moveaxis(m, 2, 1).reshape(shape)


def nm(score: Floats, n: int, m: int) -> Bools:
    """`score` is [out, in, *taps]."""
    s = by_tap(score)
    out = np.zeros(s.shape, bool)
    whole = s.shape[2] // m * m
    out[:, :, :whole] = mask(s[:, :, :whole].reshape(*s.shape[:2], whole // m, m), n).reshape(
        *s.shape[:2], whole
    )
    out[:, :, whole:] = mask(s[:, :, whole:], n)
    return from_tap(out, score.shape)


def block_scores(score: Floats, r: int, c: int) -> Floats:
    """[row blocks, taps, column blocks]: down the rows, then left to right, in float32; padded with zeros."""
    s = by_tap(score)
    s = np.pad(s, ((0, -s.shape[0] % r), (0, 0), (0, -s.shape[2] % c)))
    s = s.reshape(s.shape[0] // r, r, s.shape[1], s.shape[2] // c, c)
    with np.errstate(over="ignore", invalid="ignore"):
        down = s[:, 0]
        for i in range(1, r):
            down = down + s[:, i]
        total = down[..., 0]
        for j in range(1, c):
            total = total + down[..., j]
    return total


def block_mask(scores: list[Floats], k: int, r: int, c: int) -> list[Bools]:
    """Masks of weights whose blocks compete."""
    grids = [block_scores(s, r, c) for s in scores]
    chosen = mask(np.concatenate([g.ravel() for g in grids]) if grids else np.zeros(0, np.float32), k)
    out, at = [], 0
    for s, grid in zip(scores, grids, strict=True):
        blocks = chosen[at : at + grid.size].reshape(grid.shape)
        at += grid.size
        rows, cols = s.shape[:2]
        elements = blocks.repeat(r, axis=0).repeat(c, axis=2)[:rows, :, :cols]
        out.append(from_tap(elements, s.shape))
    return out


def check_mask(flat: Floats, k: int, got: Bools) -> None:
    """Exactly the k largest, ties to the lowest index; says where a mask is wrong."""
    want = mask(flat, k)
    assert got.dtype == np.bool_
    assert np.all(got.view(np.uint8) <= 1), "a mask holds bytes other than 0 and 1"
    wrong = np.flatnonzero(got.ravel() != want)
    assert wrong.size == 0, (
        f"k={k}: {wrong.size} elements differ, the first at {wrong[0]}, key {flat[wrong[0]]}"
    )
