"""Scaled dot-product attention on plain arrays."""

from __future__ import annotations

import math
from typing import Any

from pared import _core
from pared._types import Array
from pared.ops._arrays import dtype_of_kind, empty_like_kind, is_torch, number, refuse_grad, require_array


def attention(
    q: Array,
    k: Array,
    v: Array,
    mask: Array | None = None,
    scale: float | None = None,
    is_causal: bool = False,
) -> Array:
    """``softmax(scale * q @ k.T + mask) @ v`` for each head.

    Parameters
    ----------
    q : [batch, heads, queries, features], float32, bfloat16 or float16, last axis contiguous; other strides
        are free, so that views of [batch, positions, heads * features] are read where they are.
    k, v : [batch, groups, keys, features], [batch, groups, keys, out], of `q`'s dtype, where `groups`
        divides `heads`: ``heads // groups`` consecutive heads share one of them.
    mask : broadcast to [batch, heads, queries, keys]; float32 or of `q`'s dtype, added to the scores; or
        bool, False for keys that are not seen; or None.
    scale : None is ``features ** -0.5``.
    is_causal : query i sees the keys up to i alone.

    Returns
    -------
    [batch, heads, queries, out], of `q`'s kind and dtype, as a view of contiguous [batch, queries, heads,
    out]; computed in float32. A query that sees no key (False, or -inf, for all of them) gets zeros.

    Raises
    ------
    TypeError, ValueError : naming the argument, what was expected and what came.
    RuntimeError : grad mode is on and an input asks for a gradient; pared's operations have none.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        require_array(x, name)
        refuse_grad(x, name)
        if x.ndim != 4:
            raise ValueError(
                f"{name}: expected shape [batch, heads, positions, features], got {list(x.shape)}"
            )
    if not isinstance(is_causal, bool):
        raise TypeError(f"is_causal: expected True or False, got {type(is_causal).__name__}")
    batch, heads, queries, features = q.shape
    name = str(q.dtype).rpartition(".")[2]
    # Of another dtype, which the extension refuses, an output may not even be made.
    dtype = dtype_of_kind(q, name if name in ("float16", "bfloat16") else "float32")
    out: Any = empty_like_kind(q, (batch, queries, heads, v.shape[3]), dtype)
    y = out.transpose(1, 2) if is_torch(out) else out.transpose(0, 2, 1, 3)
    if mask is not None:
        require_array(mask, "mask")
        refuse_grad(mask, "mask")
        mask = _broadcast(mask, (batch, heads, queries, k.shape[2]))
    if scale is None:
        scale = 1.0 if features == 0 else 1.0 / math.sqrt(features)
    _core.attention(q, k, v, mask, y, number(scale, "scale"), is_causal)
    return y


def _broadcast(mask: Any, shape: tuple[int, ...]) -> Any:
    try:
        if is_torch(mask):
            return mask.expand(shape)
        import numpy as np

        return np.broadcast_to(mask, shape, subok=True)  # a mask on the mask is refused, not dropped
    except (RuntimeError, ValueError):
        raise ValueError(
            f"mask: expected a shape that broadcasts to {list(shape)}, got {list(mask.shape)}"
        ) from None
