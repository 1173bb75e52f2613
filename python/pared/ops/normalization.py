"""Layer normalisation on plain arrays."""

from __future__ import annotations

from pared import _core
from pared._types import Array
from pared.ops._arrays import empty_like_kind, number, refuse_grad, require_array


def layer_norm(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    eps: float = 1e-5,
    residual: Array | None = None,
) -> Array:
    """``(s - mean(s)) / sqrt(var(s) + eps) * weight + bias`` over the last axis, with ``s = x + residual``.

    Parameters
    ----------
    x : [..., features], float32, bfloat16 or float16, last axis contiguous; upcast inside, never copied.
    weight, bias : [features], float32, or None for ones and zeros.
    eps : added to the variance, which is the biased one.
    residual : of `x`'s shape and dtype, added first, in float32 and not rounded before it is normalised; or
        None.

    Returns
    -------
    [..., features], of `x`'s kind and dtype. A NaN or an infinity makes its row NaN.

    Raises
    ------
    TypeError, ValueError : naming the argument, what was expected and what came.
    RuntimeError : grad mode is on and an input asks for a gradient; pared's operations have none.

    Notes
    -----
    Ba, Kiros and Hinton, "Layer Normalization", arXiv:1607.06450, equation 3.
    """
    require_array(x, "x")
    for name, a in (("x", x), ("weight", weight), ("bias", bias), ("residual", residual)):
        refuse_grad(a, name)
    out = empty_like_kind(x, tuple(x.shape))
    _core.layer_norm(x, residual, weight, bias, out, number(eps, "eps"))
    return out
