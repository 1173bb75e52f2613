"""The accelerated ``nn.Conv2d`` and ``nn.Conv1d``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from typing_extensions import Self

from pared import _core
from pared._cuda_conv import check_geometry, pointwise
from pared._cuda_conv import conv2d as device_conv2d
from pared.nn._base import ACTIVATIONS, PackedModule, pack, quantized_parts
from pared.nn._fold import can_fold, fold, unfold_weight
from pared.ops._arrays import integer, word
from pared.ops._device import DeviceWeight
from pared.ops._formats import FORMATS
from pared.ops._library import conv2d_device_op, conv2d_op, empty_images, grad_error, images
from pared.ops.conv import IntPair, int_pair, resolve_padding
from pared.ops.packed import PackedWeight

_MODES = ("zeros", "reflect", "replicate", "circular")
_strided = torch.strided
_grad_enabled = torch.is_grad_enabled
_mode_depth = torch._C._len_torch_dispatch_stack
_tracing = torch._C._is_tracing


def _adds(out: Tensor, residual: Tensor) -> bool:
    """Whether the kernel adds `residual` to `out`."""
    return (
        type(residual) is Tensor
        and residual.shape == out.shape
        and residual.stride() == out.stride()
        and residual.dtype == out.dtype
        and residual.device == out.device
        and not (residual.requires_grad and _grad_enabled())
    )


def _finished(y: Tensor, residual: Tensor | None, activation: str) -> Tensor:
    """What a kernel did not do: `y` is complete where there is no residual."""
    if residual is None:
        return y
    y = y + residual
    return ACTIVATIONS[activation](y) if activation else y


class Conv2d(PackedModule):
    """``activation(conv2d(x, W) + bias)`` with a packed weight W [out_channels, in_channels / groups, kh,
    kw].

    Build it with `from_module`, or from a packed weight.

    Parameters
    ----------
    weight : packed weight, for example ``pared.ops.CSR.from_dense(w, groups=2)``.
    bias : [out_channels] of any float dtype, copied as float32; or None.
    stride, padding, dilation, padding_mode : as in ``nn.Conv2d``; the groups are the weight's.
    activation : None, "relu", "gelu" (erf), "gelu_tanh" or "silu".

    Attributes
    ----------
    in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode : as in
        ``nn.Conv2d``; see `PackedModule` for the others.
    """

    plain: ClassVar[type[nn.Module]] = nn.Conv2d
    # What undoes the folding of a batch normalisation, where there was one.
    fold_scale: Tensor
    fold_delta: Tensor
    fold_bias: Tensor | None

    def __init__(
        self,
        weight: PackedWeight,
        bias: Tensor | None = None,
        stride: IntPair = 1,
        padding: IntPair | str = 0,
        dilation: IntPair = 1,
        padding_mode: str = "zeros",
        activation: str | None = None,
    ) -> None:
        super().__init__(weight, bias, activation)
        if not FORMATS[self.format].conv2d:
            raise ValueError(f"weight: expected a format with a conv2d kernel, got {self.format}")
        if len(weight.shape) != 4:
            raise ValueError(
                f"weight: expected a weight [out, in/groups, kh, kw], got shape {list(weight.shape)}"
            )
        if word(padding_mode, "padding_mode") not in _MODES:
            raise ValueError(f"padding_mode: expected one of {', '.join(_MODES)}, got {padding_mode!r}")
        self.groups = weight.groups
        self.out_channels, self.in_channels = weight.shape[0], weight.shape[1] * self.groups
        # What the kernel is called with; the attributes are as torch's module has them.
        self._kernel = (weight.shape[2], weight.shape[3])
        self._stride, self._dilation = int_pair(stride, "stride"), int_pair(dilation, "dilation")
        self._pads = resolve_padding(padding, self._kernel, self._stride, self._dilation)
        self.kernel_size: tuple[int, ...] = self._kernel
        self.stride: tuple[int, ...] = self._stride
        self.dilation: tuple[int, ...] = self._dilation
        self.padding: str | tuple[int, ...] = (
            padding if isinstance(padding, str) else int_pair(padding, "padding", 0)
        )
        self.padding_mode = padding_mode

    @classmethod
    def from_module(
        cls,
        module: Any,
        *,
        format: str = "csr",
        activation: str | None = None,
        weight: PackedWeight | None = None,
        norm: nn.BatchNorm2d | None = None,
    ) -> Self:
        if not isinstance(cast(object, module), cls.plain):
            raise TypeError(f"module: expected nn.{cls.plain.__name__}, got {type(module).__name__}")
        dense: Tensor = module.weight
        bias: Tensor | None = module.bias
        undo: dict[str, Tensor | None] = {}
        if norm is not None:
            if not can_fold(module, norm):
                raise ValueError(
                    "norm: expected a float32 nn.BatchNorm2d with statistics for the channels of module, "
                    f"got {type(norm).__name__}"
                )
            dense, bias, undo = fold(module, norm)
            weight = None
            if FORMATS[format].precision != "float32":  # the weight's own bits are gone
                undo["fold_delta"] = torch.empty(0, dtype=torch.int8, device="cpu")
        new = cls(
            pack(format, dense if norm is None else dense.cpu(), module.groups) if weight is None else weight,
            bias,
            module.stride,
            module.padding,
            module.dilation,
            module.padding_mode,
            activation,
        )
        if norm is not None:  # folding gives float32 weights
            new.weight_dtype = module.weight.dtype
        for name, tensor in undo.items():
            new.register_buffer(name, tensor)
        new._requires_grad = (module.weight.requires_grad, getattr(module.bias, "requires_grad", True))
        return new

    @classmethod
    def from_quantized(
        cls,
        module: Any,
        *,
        activation_scale: float | None = None,
        activation_zero: int = 0,
        activation_dtype: str = "uint8",
    ) -> Self:
        weight, bias, activation = quantized_parts(
            module, cls.plain.__name__, activation_scale, activation_zero, activation_dtype
        )
        geometry = (module.stride, module.padding, module.dilation, module.padding_mode)
        return cls(weight, bias, *geometry, activation)

    def to_module(self) -> nn.Module:
        w, bias = torch.as_tensor(self.packed_weight().to_dense(), device=self._device()), self.bias
        if "fold_scale" in self._buffers:
            w = unfold_weight(w, self.fold_scale, self.fold_delta).to(self.weight_dtype)
            bias = self.fold_bias
        plain: Any = self.plain(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            bias is not None,
            self.padding_mode,
            device="meta",
        )
        plain.weight = nn.Parameter(w.reshape(self.weight_shape), self._requires_grad[0])
        if bias is not None:
            plain.bias = nn.Parameter(bias.to(w.dtype, copy=True), self._requires_grad[1])
        module: nn.Module = plain.eval()
        return module

    def forward(self, input: Tensor) -> Tensor:
        """`input` [N, C, H, W] or [C, H, W] to [N, out, Ho, Wo] or [out, Ho, Wo], in the input's dtype and
        layout.

        Raises
        ------
        RuntimeError : grad mode is on and the input, or the bias, requires a gradient.
        TypeError, ValueError : dtype, device or shape of the input.
        """
        return self._compute(input, None, self._act)

    def _compute(self, input: Tensor, residual: Tensor | None, activation: str) -> Tensor:
        """``activation(conv2d(input, W) + bias + residual)``, in one pass where the residual has the shape,
        dtype and memory layout of the output; "" is no activation."""
        x = input
        # A tracer has to see an operator; the dispatcher costs eager calls 6 us.
        traced = is_compiling() or type(x) is not Tensor or _mode_depth() > 0 or _tracing()
        if traced and not hasattr(type(x), "__torch_function__"):
            raise TypeError(f"x: expected a torch tensor, got {type(x).__name__}")
        if not traced:
            if x.layout is not _strided:
                raise TypeError(f"x: expected a strided (dense) tensor, got layout {x.layout}")
            bias = self._buffers["bias"]
            if (x.requires_grad or (bias is not None and bias.requires_grad)) and _grad_enabled():
                raise grad_error(f"pared.nn.{type(self).__name__}")
            if x.ndim not in (3, 4):
                raise ValueError(f"x: expected [N, C, H, W] or [C, H, W], got shape {list(x.shape)}")
        pads = self._pads
        if self.padding_mode != "zeros":
            top, bottom, left, right = pads
            x = nn.functional.pad(x, (left, right, top, bottom), mode=self.padding_mode)
            pads = (0, 0, 0, 0)
        if self._on_device is not None:
            run = self._traced_on_device if traced else self._forward_on_device
            return _finished(run(x, activation if residual is None else ""), residual, activation)
        if traced:
            y = self._traced(x, pads, activation if residual is None else "")
            return _finished(y, residual, activation)
        buffers = self._buffers
        if residual is None or (type(residual) is Tensor and not residual.requires_grad):
            packed, rest = buffers["packed"], (self._dilation, None, activation, residual)
            short: Tensor | None = _core.conv2d(x, packed, buffers["bias"], self._stride, pads, *rest)
            if short is not None:
                return short
        single = x.ndim == 3
        if single:
            x = x[None]
        x = images(x)
        n, _, height, width = x.shape
        kh, kw = self._kernel
        out_h, out_w = _core.conv2d_output_size(height, width, kh, kw, self._stride, pads, self._dilation)
        out = empty_images(x, (n, self.out_channels, out_h, out_w))
        added = residual if residual is not None and _adds(out, residual) else None
        act = activation if added is residual else ""
        _core.conv2d(
            x, buffers["packed"], buffers["bias"], self._stride, pads, self._dilation, None, act, added, out
        )
        y = out[0] if single else out
        return y if added is residual else _finished(y, residual, activation)

    def _device_weight(self, device: torch.device) -> DeviceWeight:
        weight = self.packed_weight()
        check_geometry(weight.shape, self.groups, self._pads)
        return pointwise(weight).to(device)

    def _forward_on_device(self, x: Tensor, activation: str) -> Tensor:
        weight, bias = self._on_device, self._buffers["bias"]
        assert weight is not None
        y = device_conv2d(x if x.ndim == 4 else x[None], weight, bias, self._stride, activation or None)
        return y if x.ndim == 4 else y[0]

    def _traced_on_device(self, x: Any, activation: str) -> Tensor:
        y: Tensor = conv2d_device_op(
            x,
            self._device_tensors,
            self.bias,
            self.out_channels,
            self._stride,
            self._device_layout,
            activation,
        )
        return y

    def _traced(self, x: Any, pads: tuple[int, int, int, int], activation: str) -> Tensor:
        y: Tensor = conv2d_op(
            x,
            self.packed,
            self.bias,
            self.out_channels,
            self._kernel,
            self._stride,
            pads,
            self._dilation,
            activation,
        )
        return y

    def extra_repr(self) -> str:
        parts = [
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        ]
        n = len(self.kernel_size)
        plain = {"padding": (0,) * n, "dilation": (1,) * n, "groups": 1, "padding_mode": "zeros"}
        parts += [f"{k}={getattr(self, k)}" for k, default in plain.items() if getattr(self, k) != default]
        if "fold_scale" in self._buffers:
            parts.append("batchnorm=True")
        return ", ".join([*parts, self._repr_tail()])


class Conv1d(Conv2d):
    """``activation(conv1d(x, W) + bias)`` with a packed weight W [out_channels, in_channels / groups, 1,
    taps]: a sequence is an image of height 1. Called with [N, C, L] or [C, L], it gives [N, out, Lo] or
    [out, Lo].

    Build it with `from_module`, or from a packed weight.

    Parameters
    ----------
    weight : packed weight, for example ``pared.ops.CSR.from_dense(w[:, :, None])``.
    bias : [out_channels] of any float dtype, copied as float32; or None.
    stride, padding, dilation, padding_mode : as in ``nn.Conv1d``; the groups are the weight's.
    activation : None, "relu", "gelu" (erf), "gelu_tanh" or "silu".

    Attributes
    ----------
    in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode : as in
        ``nn.Conv1d``; see `PackedModule` for the others. `weight_shape` has no height.
    """

    plain = nn.Conv1d

    def __init__(
        self,
        weight: PackedWeight,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | str = 0,
        dilation: int | Sequence[int] = 1,
        padding_mode: str = "zeros",
        activation: str | None = None,
    ) -> None:
        pads = padding if isinstance(padding, str) else (0, _single(padding, "padding", 0))
        strides, dilations = (1, _single(stride, "stride", 1)), (1, _single(dilation, "dilation", 1))
        super().__init__(weight, bias, strides, pads, dilations, padding_mode, activation)
        out, depth, height, taps = weight.shape
        if height != 1:
            raise ValueError(
                f"weight: expected a weight [out, in/groups, 1, taps], got shape {list(weight.shape)}"
            )
        self.weight_shape = (out, depth, taps)
        self.kernel_size, self.stride, self.dilation = (taps,), strides[1:], dilations[1:]
        self.padding = pads if isinstance(pads, str) else pads[1:]

    def stored(self) -> dict[str, Tensor]:
        tensors = super().stored()
        return {**tensors, "weight": tensors["weight"].reshape(self.weight_shape)}

    def _compute(self, input: Tensor, residual: Tensor | None, activation: str) -> Tensor:
        if not hasattr(type(input), "__torch_function__"):
            raise TypeError(f"x: expected a torch tensor, got {type(input).__name__}")
        if isinstance(input, Tensor) and not (
            input.ndim in (2, 3) and input.shape[-2] == self.in_channels and input.layout is _strided
        ):
            c, got = self.in_channels, f"shape {list(input.shape)} in layout {input.layout}"
            raise ValueError(f"x: expected a strided tensor [N, {c}, L] or [{c}, L], got {got}")
        try:
            image = input.unsqueeze(-2)
        except RuntimeError as e:  # of a storage that was freed
            raise TypeError(f"x: expected a tensor with memory of its own, got a Tensor without ({e})") from e
        rows = None if residual is None else residual.unsqueeze(-2)
        return super()._compute(image, rows, activation).squeeze(-2)


def _single(value: int | Sequence[int], name: str, least: int) -> int:
    """An int, or a sequence of one, as nn.Conv1d keeps it. Raises ``TypeError`` or ``ValueError``."""
    one = value[0] if isinstance(value, (tuple, list)) and len(value) == 1 else value
    return integer(one, name, least, 2**31 - 1)
