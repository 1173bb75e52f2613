"""Max pooling on plain arrays."""

from __future__ import annotations

from typing import Any

from pared import _core
from pared._types import Array
from pared.ops._arrays import empty_like_kind, refuse_grad, require_array
from pared.ops.conv import IntPair, int_pair


def max_pool2d(
    x: Array,
    kernel_size: IntPair,
    stride: IntPair | None = None,
    padding: IntPair = 0,
    dilation: IntPair = 1,
    ceil_mode: bool = False,
) -> Array:
    """The largest element of each window, as ``torch.nn.functional.max_pool2d``.

    Parameters
    ----------
    x : [N, C, H, W] or [C, H, W], float32, bfloat16 or float16, planes [H, W] contiguous (they may lie
        further apart).
    kernel_size, dilation : int or pair (height, width).
    stride : int or pair; None is `kernel_size`.
    padding : int or pair, of -infinity on each side; at most half of the dilated kernel.
    ceil_mode : also windows that reach beyond the padded input, where they begin within the input or the
        padding before it.

    Returns
    -------
    [N, C, Ho, Wo], or [C, Ho, Wo], contiguous, of `x`'s kind and dtype. A window with a NaN gives NaN.

    Raises
    ------
    TypeError, ValueError : naming the argument, what was expected and what came.
    RuntimeError : grad mode is on and `x` asks for a gradient; pared's operations have none.
    """
    require_array(x, "x")
    refuse_grad(x, "x")
    if x.ndim not in (3, 4):
        raise ValueError(f"x: expected [N, C, H, W] or [C, H, W], got shape {list(x.shape)}")
    if not isinstance(ceil_mode, bool):
        raise TypeError(f"ceil_mode: expected a bool, got {ceil_mode!r}")
    images: Any = x if x.ndim == 4 else x[None]
    kernel = int_pair(kernel_size, "kernel_size")
    window = (
        kernel,
        kernel if stride is None else int_pair(stride, "stride"),
        int_pair(padding, "padding", 0),
        int_pair(dilation, "dilation"),
        ceil_mode,
    )
    n, channels, height, width = images.shape
    size = _core.max_pool2d_output_size(height, width, *window)
    out: Any = empty_like_kind(images, (n, channels, *size))
    _core.max_pool2d(images, out, *window)
    result: Array = out if x.ndim == 4 else out[0]
    return result
