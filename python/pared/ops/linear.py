"""The linear operation on packed weights."""

from __future__ import annotations

from pared._types import Array
from pared.ops._arrays import activation_name, empty_like_kind, refuse_grad, require_array
from pared.ops._device import DeviceWeight
from pared.ops._formats import FORMATS
from pared.ops.packed import PackedWeight


def linear(
    x: Array, w: PackedWeight | DeviceWeight, bias: Array | None = None, activation: str | None = None
) -> Array:
    """``activation(x @ w.T + bias)`` with a packed weight.

    Parameters
    ----------
    x : [..., in], float32, bfloat16 or float16, last axis contiguous; upcast inside, never copied.
    w : packed weight, [out, in]; or one in a device's memory, `PackedWeight.to`: `x` and `bias` are then
        tensors there.
    bias : [out], float32, or None.
    activation : None, "relu", "gelu" (erf), "gelu_tanh" or "silu".

    Returns
    -------
    [..., out], of `x`'s kind and dtype. The sum is in float32; a term with a stored zero is skipped, so
    ``0 * inf`` contributes nothing where a dense product gives NaN.

    Raises
    ------
    TypeError, ValueError : naming the argument, what was expected and what came.
    RuntimeError : grad mode is on and `x` or `bias` asks for a gradient; pared's operations have none.
    """
    if isinstance(w, DeviceWeight):
        return w.linear(x, bias, activation)  # type: ignore[arg-type]  # it checks them
    require_array(x, "x")
    if not isinstance(w, PackedWeight):
        known = ", ".join(f.weight.__name__ for f in FORMATS.values() if f.linear is not None)
        raise TypeError(f"w: expected a packed weight ({known}), got {type(w).__name__}")
    if len(w.shape) != 2:
        raise ValueError(f"w: expected a linear weight [out, in], got shape {list(w.shape)}; use conv2d")
    kernel = FORMATS[w.kind].linear
    if kernel is None:
        raise ValueError(f"w: expected a format with a linear kernel, got {type(w).__name__}")
    refuse_grad(x, "x")
    refuse_grad(bias, "bias")
    out = empty_like_kind(x, (*x.shape[:-1], w.shape[0]))
    kernel(x, w.packed, bias, out, activation_name(activation))
    return out
