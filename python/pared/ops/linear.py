"""The linear operation on packed weights."""

from __future__ import annotations

from pared import _core
from pared._types import Array
from pared.ops._arrays import require_array
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
    # One call for everything: each line of Python costs a microsecond where a model has run since the last.
    if isinstance(w, PackedWeight):
        y: Array = _core.linear(x, w.packed, bias, activation)
        return y
    if isinstance(w, DeviceWeight):
        return w.linear(x, bias, activation)  # type: ignore[arg-type]  # it checks them
    require_array(x, "x")
    known = ", ".join(f.weight.__name__ for f in FORMATS.values())
    raise TypeError(f"w: expected a packed weight ({known}), got {type(w).__name__}")
