"""The two-dimensional convolution with packed weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pared import _core
from pared._types import Array
from pared.ops._arrays import empty_images, integer, is_torch, require_array
from pared.ops._formats import FORMATS
from pared.ops.packed import PackedWeight

IntPair = int | Sequence[int]


def int_pair(value: Any, name: str, least: int = 1) -> tuple[int, int]:
    """An int, or a pair of ints, as a pair (height, width). Raises ``TypeError`` or ``ValueError``."""
    pair = (value, value) if isinstance(value, (int, np.integer)) else value
    if (
        isinstance(pair, Sequence)
        and len(pair) == 2
        and all(type(v) is int or isinstance(v, np.integer) for v in pair)
    ):
        height, width = (integer(v, name, least, 2**31 - 1) for v in pair)
        return height, width
    raise TypeError(f"{name}: expected an int or a pair of ints (height, width), got {value!r}")


def resolve_padding(
    padding: Any, kernel: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int]
) -> tuple[int, int, int, int]:
    """`padding` as torch takes it, as (top, bottom, left, right).

    ``"same"`` pads to the input's size, the odd row and column at the bottom and right; it needs stride 1.
    """
    if isinstance(padding, str):
        if padding == "valid":
            return 0, 0, 0, 0
        if padding != "same":
            raise ValueError(f"padding: expected 'same', 'valid', an int or a pair, got {padding!r}")
        if stride != (1, 1):
            raise ValueError(f"padding: expected stride 1 with 'same', got stride {stride}")
        total_h, total_w = dilation[0] * (kernel[0] - 1), dilation[1] * (kernel[1] - 1)
        return total_h // 2, total_h - total_h // 2, total_w // 2, total_w - total_w // 2
    ph, pw = int_pair(padding, "padding", 0)
    return ph, ph, pw, pw


class _Frame(NamedTuple):
    """The arguments of a convolution as the extension takes them, and its output's height and width."""

    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    out: tuple[int, int]


def _frame(
    size: tuple[int, int], kernel: tuple[int, int], stride: Any, padding: Any, dilation: Any
) -> _Frame:
    strides, dilations = int_pair(stride, "stride"), int_pair(dilation, "dilation")
    pads = resolve_padding(padding, kernel, strides, dilations)
    return _Frame(
        strides, pads, dilations, _core.conv2d_output_size(*size, *kernel, strides, pads, dilations)
    )


def _empty_images(x: Any, shape: tuple[int, int, int, int]) -> Array:
    """An uninitialised [N, C, H, W] of `x`'s kind, dtype, device and memory layout."""
    if is_torch(x):
        return empty_images(x, shape)
    images: NDArray[Any]
    if x.strides[1] == x.itemsize != x.strides[3] and not x.flags.c_contiguous:
        n, c, h, w = shape
        images = np.empty((n, h, w, c), dtype=x.dtype).transpose(0, 3, 1, 2)
    else:
        images = np.empty(shape, dtype=x.dtype)
    return images


def conv2d(
    x: Array,
    w: PackedWeight,
    bias: Array | None = None,
    stride: IntPair = 1,
    padding: IntPair | str = 0,
    dilation: IntPair = 1,
    groups: int = 1,
    activation: str | None = None,
    residual: Array | None = None,
) -> Array:
    """``activation(conv2d(x, w) + bias + residual)`` with a packed weight.

    Parameters
    ----------
    x : [N, C, H, W] or [C, H, W], float32, bfloat16 or float16, contiguous or channels-last (planes, or
        pixels, may lie further apart: a slice of channels needs no copy). Upcast inside, a part at a time.
    w : packed weight, [out, C / groups, kh, kw].
    bias : [out], float32, or None.
    stride, dilation : int or pair (height, width).
    padding : int or pair (height, width) of zeros on each side, "valid", or "same" (stride 1).
    groups : as the weight was packed with.
    activation : None, "relu", "gelu" (erf), "gelu_tanh" or "silu".
    residual : what is added before the activation, in the same pass over memory; of the output's shape,
        dtype and memory layout; or None.

    Returns
    -------
    [N, out, Ho, Wo], or [out, Ho, Wo], of `x`'s kind, dtype and memory layout. The sum is in float32; a term
    with a zero weight is skipped, so ``0 * inf`` contributes nothing where a dense product gives NaN.

    Raises
    ------
    TypeError, ValueError : naming the argument, what was expected and what came.
    RuntimeError : grad mode is on and `x`, `bias` or `residual` asks for a gradient; pared's operations have
        none.
    """
    if isinstance(w, PackedWeight):
        # One call for everything: what Python does takes twenty times as long where a model has run since the
        # last, as it does in a loop.
        y: Array | None = _core.conv2d(
            x, w.packed, bias, stride, padding, dilation, groups, activation, residual
        )
        if y is not None:
            return y
    require_array(x, "x")
    if not isinstance(w, PackedWeight):
        known = ", ".join(f.weight.__name__ for f in FORMATS.values() if f.conv2d)
        raise TypeError(f"w: expected a packed weight ({known}), got {type(w).__name__}")
    if not FORMATS[w.kind].conv2d:
        raise ValueError(f"w: expected a format with a conv2d kernel, got {type(w).__name__}")
    shape = w.shape
    if len(shape) != 4:
        raise ValueError(
            f"w: expected a weight [out, in/groups, kh, kw], got shape {list(shape)}; use linear"
        )
    if integer(groups, "groups") != w.groups:
        raise ValueError(f"groups: expected {w.groups}, as the weight was packed with, got {groups}")
    if x.ndim not in (3, 4):
        raise ValueError(f"x: expected [N, C, H, W] or [C, H, W], got shape {list(x.shape)}")
    images: Any = x if x.ndim == 4 else x[None]
    n, _, height, width = images.shape
    f = _frame((height, width), shape[2:], stride, padding, dilation)
    out: Any = _empty_images(images, (n, shape[0], *f.out))
    added: Any = residual
    if residual is not None and x.ndim == 3:
        require_array(residual, "residual")
        if residual.ndim != 3:
            raise ValueError(f"residual: expected shape {list(out.shape[1:])}, got {list(residual.shape)}")
        added = residual[None]
    _core.conv2d(images, w.packed, bias, f.stride, f.padding, f.dilation, None, activation, added, out)
    result: Array = out if x.ndim == 4 else out[0]
    return result
