"""Convolutions on CUDA devices: 1x1 on channels-last images is the linear product, pixels are its tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from pared.ops._arrays import channels_last
from pared.ops.packed import PackedWeight

if TYPE_CHECKING:
    import torch

    from pared.ops._device import DeviceWeight


def check_geometry(weight_shape: tuple[int, ...], groups: int, padding: tuple[int, ...]) -> None:
    """Raise ``ValueError`` unless a convolution is a linear product of pixels; its stride may be any."""
    kernel = list(weight_shape[2:])
    if kernel != [1, 1] or groups != 1 or any(padding):
        raise ValueError(
            "device: expected a convolution of kernel 1x1, without padding and groups, for CUDA, got kernel "
            f"{kernel[0]}x{kernel[1]}, padding {padding}, {groups} group(s)"
        )


def pointwise(w: PackedWeight) -> PackedWeight:
    """The linear weight [out, in] of a 1x1 convolution's, in the same format; nothing is rounded again."""
    from pared.ops.int8 import QuantizedWeight

    shape = w.shape[:2]
    if isinstance(w, QuantizedWeight):
        q, scales = w.to_quantized()
        return type(w).from_parts(np.ascontiguousarray(q.reshape(shape)), scales, w.dtype, w.activations)
    dense: Any = w.to_dense()
    packed: PackedWeight = type(w).from_dense(dense.reshape(shape))
    return packed


def conv2d(
    x: torch.Tensor,
    w: DeviceWeight,
    bias: torch.Tensor | None,
    stride: tuple[int, int],
    activation: str | None,
) -> torch.Tensor:
    """``activation(conv2d(x, W) + bias)`` with kernels of 1x1.

    Parameters
    ----------
    x : [N, C, H, W] on the weight's device; channels-last images are read where they are, unless the stride
        leaves pixels out. Planes are turned to channels-last before, and the result back.
    w : [out, C] on `x`'s device.

    Returns
    -------
    [N, out, Ho, Wo], in `x`'s dtype and layout, as on the CPU: planes where it has both.

    Notes
    -----
    8-bit weights quantize each pixel's channels with a scale of their own, where the CPU's `Int8` convolution
    has one for an image: outputs of the two differ within the rounding to 8 bits, and a device's are the
    closer ones.

    Raises
    ------
    ValueError : an image on another device.
    """
    if x.device != w.device:
        raise ValueError(f"x: expected a tensor on {w.device}, got one on {x.device}")
    seen = x if stride == (1, 1) else x[:, :, :: stride[0], :: stride[1]]
    pixels = seen.permute(0, 2, 3, 1)
    if not pixels.is_contiguous():
        pixels = pixels.contiguous()
    y: torch.Tensor = w.linear(pixels, bias, activation).permute(0, 3, 1, 2)
    return y if channels_last(x) else x.new_empty(y.shape).copy_(y)
