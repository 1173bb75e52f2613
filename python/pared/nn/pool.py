"""The accelerated ``nn.MaxPool2d``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from typing_extensions import Self

from pared import _core
from pared.nn._fused import adopt
from pared.ops.conv import int_pair

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_mode_depth = torch._C._len_torch_dispatch_stack
_tracing = torch._C._is_tracing


class MaxPool2d(nn.MaxPool2d):
    """``nn.MaxPool2d`` whose windows over contiguous planes pared's kernel computes.

    Everything else is torch's: channels-last memory, which its kernel is fast for, devices, gradients,
    tracers. Build it with `from_module`.
    """

    @classmethod
    def from_module(cls, module: nn.MaxPool2d) -> Self:
        """Raises ``TypeError`` for another module, ``ValueError`` for one that returns indices."""
        if type(module) is not nn.MaxPool2d:
            raise TypeError(f"module: expected nn.MaxPool2d, got {type(module).__name__}")
        if module.return_indices:
            raise ValueError("module: expected one that returns values alone, got return_indices=True")
        new = cls.__new__(cls)
        adopt(new, module)
        return new.eval()

    def to_module(self) -> nn.MaxPool2d:
        """The plain module again."""
        new = nn.MaxPool2d.__new__(nn.MaxPool2d)
        adopt(new, self)
        return new.eval()

    def forward(self, input: Tensor) -> Any:
        """`input` [N, C, H, W] or [C, H, W]."""
        if is_compiling() or not self._fits(input):
            return super().forward(input)
        x = input if input.ndim == 4 else input[None]
        window = (
            int_pair(self.kernel_size, "kernel_size"),
            int_pair(self.stride, "stride"),
            int_pair(self.padding, "padding", 0),
            int_pair(self.dilation, "dilation"),
            self.ceil_mode,
        )
        n, channels, height, width = x.shape
        out = x.new_empty((n, channels, *_core.max_pool2d_output_size(height, width, *window)))
        _core.max_pool2d(x, out, *window)
        return out if input.ndim == 4 else out[0]

    def _fits(self, x: Any) -> bool:
        """Whether the kernel takes it."""
        return (
            type(x) is Tensor
            and x.device.type == "cpu"
            and x.dtype in _DTYPES
            and x.ndim in (3, 4)
            and x.is_contiguous()
            and x.numel() > 0
            and not (x.requires_grad and torch.is_grad_enabled())
            and not (_mode_depth() or _tracing())
            and not self.return_indices
        )
