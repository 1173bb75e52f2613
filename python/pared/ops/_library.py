"""``torch.library`` operators, for torch.compile, torch.export and every other tracer.

In eager mode the modules of `pared.nn` call the extension directly: a call through the dispatcher costs 6 us
more.

A packed weight is one 64-byte-aligned uint8 tensor with a checked header, so an exported program that meets a
build of another version, or a buffer that is not a packed weight, fails with a clear ``ValueError``. What is
behind the header is checked when a tensor is first seen, and again when it has been written to since.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from pared import _core
from pared._cuda_conv import conv2d as pointwise_conv2d
from pared.ops._arrays import channels_last, empty_images
from pared.ops._device import DeviceWeight
from pared.ops._formats import Format, format_of

__all__ = [
    "aligned",
    "attention_op",
    "conv2d_op",
    "empty_images",
    "foldable",
    "grad_error",
    "images",
    "layer_norm_op",
    "linear_device_op",
    "linear_op",
]

# Kept for the life of the process: torch drops the registrations with the Library object.
_LIB: Any = torch.library.Library("pared", "DEF")  # type: ignore[no-untyped-call]


def foldable(x: Tensor) -> Tensor:
    """`x` itself where the kernels can read it (unit last stride, leading axes that fold), else a copy."""
    if x.is_contiguous() or (x.ndim == 2 and x.stride(1) == 1):
        return x
    return x.contiguous()


def aligned(packed: Tensor) -> Tensor:
    """`packed` itself where it is 64-byte aligned, else a copy, which is: torch aligns what it allocates."""
    return packed.clone() if packed.data_ptr() % 64 else packed


def grad_error(what: str) -> RuntimeError:
    """The error for an input that asks for a gradient."""
    return RuntimeError(
        f"{what}: expected an input that needs no gradient, got requires_grad=True; accelerated layers are "
        "for inference: call under torch.no_grad() or detach the input, or train the plain model that "
        "pared.restore gives"
    )


# Weights that have been checked as a whole -> what they were then, and their format. Entries end with their
# tensor: one that is later made in the same memory is checked again.
_seen: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _checked(packed: Tensor) -> tuple[Tensor, Format]:
    """`packed`, aligned, and its format, every invariant of it checked; raises ``ValueError``."""
    # Inference tensors do not count what is written to them.
    version = -1 if packed.is_inference() else packed._version
    stamp = (packed.data_ptr(), packed.numel(), version)
    known = _seen.get(packed)  # type: ignore[no-untyped-call]
    if known is None or known[0] != stamp:
        known = stamp, format_of(packed)
        known[1].weight(aligned(packed))
        _seen[packed] = known
    return aligned(packed), known[1]


def _define(
    schema: str,
    kernel: Callable[..., Tensor],
    fake: Callable[..., Tensor],
    keys: tuple[str, ...] = ("CPU",),
) -> Any:
    """Register an operator: its kernel for the dispatch keys of some devices, its shape function, an autograd
    kernel that refuses gradients."""
    name = _LIB.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
    qualified = f"pared::{schema.partition('(')[0]}"
    op = getattr(torch.ops.pared, schema.partition("(")[0]).default

    def autograd(*args: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            raise grad_error(qualified)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    for key in keys:
        _LIB.impl(name, kernel, key)
    _LIB.impl(name, autograd, "Autograd")
    torch.library.register_fake(qualified, fake, lib=_LIB)
    return op


def _linear(x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, activation: str) -> Tensor:
    weight, _ = _checked(packed)
    # Of the size that a trace has promised, which the kernel checks.
    out = x.new_empty((*x.shape[:-1], out_features))
    return _core.linear(foldable(x), weight, bias, activation, out)  # type: ignore[no-any-return]


def _linear_fake(
    x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, activation: str
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


linear_op = _define(
    "linear(Tensor x, Tensor packed, Tensor? bias, int out_features, str activation) -> Tensor",
    _linear,
    _linear_fake,
)


def _linear_device(
    x: Tensor, weight: list[Tensor], bias: Tensor | None, out_features: int, layout: str, activation: str
) -> Tensor:
    w = DeviceWeight.from_parts(layout, weight)
    return w.linear(foldable(x), bias, activation or None)


def _linear_device_fake(
    x: Tensor, weight: list[Tensor], bias: Tensor | None, out_features: int, layout: str, activation: str
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


# `weight` and `layout` are what DeviceWeight.parts gives. On the CPU it says which device it expected.
linear_device_op = _define(
    "linear_device(Tensor x, Tensor[] weight, Tensor? bias, int out_features, str layout, str activation) "
    "-> Tensor",
    _linear_device,
    _linear_device_fake,
    ("CUDA", "CPU"),
)


def _conv2d_device(
    x: Tensor,
    weight: list[Tensor],
    bias: Tensor | None,
    out_channels: int,
    stride: list[int],
    layout: str,
    activation: str,
) -> Tensor:
    w = DeviceWeight.from_parts(layout, weight)
    batch = x if x.ndim == 4 else x[None]
    y = pointwise_conv2d(batch, w, bias, (stride[0], stride[1]), activation or None)
    return y if x.ndim == 4 else y[0]


def _conv2d_device_fake(
    x: Tensor,
    weight: list[Tensor],
    bias: Tensor | None,
    out_channels: int,
    stride: list[int],
    layout: str,
    activation: str,
) -> Tensor:
    if x.ndim not in (3, 4):
        raise ValueError(f"x: expected [N, C, H, W] or [C, H, W], got shape {list(x.shape)}")
    batch = x if x.ndim == 4 else x[None]
    size = [-(-batch.shape[2 + i] // stride[i]) for i in (0, 1)]
    out = empty_images(batch, (batch.shape[0], out_channels, *size))
    return out if x.ndim == 4 else out[0]


# A 1x1 convolution without padding and groups; stride: height, width. Otherwise as linear_device.
conv2d_device_op = _define(
    "conv2d_device(Tensor x, Tensor[] weight, Tensor? bias, int out_channels, int[2] stride, str layout, "
    "str activation) -> Tensor",
    _conv2d_device,
    _conv2d_device_fake,
    ("CUDA", "CPU"),
)


def images(x: Tensor) -> Tensor:
    """`x` [N, C, H, W] itself where the convolution reads it (whole planes, or pixels), else a copy."""
    if x.is_contiguous() or channels_last(x) or (x.stride(3) == 1 and x.stride(2) == x.shape[3]):
        return x
    return x.contiguous()


def _conv2d(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    out_channels: int,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    activation: str,
    residual: Tensor | None = None,
) -> Tensor:
    weight, format = _checked(packed)
    if not format.conv2d:
        raise ValueError(f"packed: expected a format with a conv2d kernel, got {format.name}")
    batch = x if x.ndim == 4 else x[None]
    out = _conv2d_fake(batch, packed, bias, out_channels, kernel_size, stride, padding, dilation, activation)
    added = residual if residual is None or residual.ndim == 4 else residual[None]
    if added is not None and added.shape == out.shape and added.stride() != out.stride():
        added = torch.empty_like(out).copy_(added)
    window = (tuple(stride), tuple(padding), tuple(dilation))
    _core.conv2d(images(batch), weight, bias, *window, None, activation, added, out)
    return out if x.ndim == 4 else out[0]


def _conv2d_fake(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    out_channels: int,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    activation: str,
    residual: Tensor | None = None,
) -> Tensor:
    if x.ndim not in (3, 4):
        raise ValueError(f"x: expected [N, C, H, W] or [C, H, W], got shape {list(x.shape)}")
    batch = images(x if x.ndim == 4 else x[None])
    size = [
        (batch.shape[2 + i] + padding[2 * i] + padding[2 * i + 1] - dilation[i] * (kernel_size[i] - 1) - 1)
        // stride[i]
        + 1
        for i in (0, 1)
    ]
    out = empty_images(batch, (batch.shape[0], out_channels, *size))
    return out if x.ndim == 4 else out[0]


# stride, dilation: height, width; padding: top, bottom, left, right.
conv2d_op = _define(
    "conv2d(Tensor x, Tensor packed, Tensor? bias, int out_channels, int[2] kernel_size, int[2] stride, "
    "int[4] padding, int[2] dilation, str activation, Tensor? residual=None) -> Tensor",
    _conv2d,
    _conv2d_fake,
)


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, is_causal: bool) -> Tensor:
    out = _attention_fake(q, k, v, mask, scale, is_causal)
    _core.attention(q, k, v, mask, out.transpose(1, 2), scale, is_causal)
    return out


def _attention_fake(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, is_causal: bool
) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3]))


# [batch, heads, positions, features] to [batch, positions, heads, features], as `pared.ops.attention`.
attention_op = _define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, bool is_causal) -> Tensor",
    _attention,
    _attention_fake,
)


def _layer_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    out = x.new_empty(x.shape)
    added = None if residual is None else foldable(residual)
    _core.layer_norm(foldable(x), added, weight, bias, out, eps)
    return out


def _layer_norm_fake(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    return x.new_empty(x.shape)


# Of x + residual, over the last axis, as `pared.ops.layer_norm`.
layer_norm_op = _define(
    "layer_norm(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps) -> Tensor",
    _layer_norm,
    _layer_norm_fake,
)
