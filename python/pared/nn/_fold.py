"""Batch normalisation folded into the convolution before it, exactly reversible."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from pared.nn._fused import adopt, check_module

__all__ = ["FoldedBatchNorm2d", "can_fold", "fold", "unfold_weight"]


class FoldedBatchNorm2d(nn.BatchNorm2d):
    """A batch normalisation that the accelerated convolution before it computes: an identity.

    Its parameters and statistics stay where they were, in the state dict too; `pared.restore` puts it to work
    again.

    Attributes
    ----------
    layer : the accelerated convolution.
    """

    layer: nn.Module

    @classmethod
    def from_module(cls, module: nn.BatchNorm2d, layer: nn.Module) -> Self:
        """Of the same tensors as `module`; ``TypeError`` for another type."""
        if not isinstance(module, nn.BatchNorm2d):
            raise TypeError(f"module: expected nn.BatchNorm2d, got {type(module).__name__}")
        check_module(layer, "layer")
        new = cls.__new__(cls)
        adopt(new, module)
        # Past nn.Module's own registration: it is no child.
        object.__setattr__(new, "layer", layer)
        return new

    def to_module(self) -> nn.BatchNorm2d:
        """The plain module again, of the same tensors."""
        new = nn.BatchNorm2d.__new__(nn.BatchNorm2d)
        adopt(new, self)
        vars(new).pop("layer")
        return new.eval()

    def forward(self, input: Tensor) -> Tensor:
        return input

    def train(self, mode: bool = True) -> Self:
        """Does nothing: it is folded with the statistics that it has."""
        return self

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, folded into the layer before"  # type: ignore[no-untyped-call]


def can_fold(layer: nn.Module, norm: nn.Module) -> bool:
    """Whether `norm`, in eval mode, is a fixed scale and shift of each output channel of `layer`."""
    return (
        type(layer) is nn.Conv2d
        and type(norm) is nn.BatchNorm2d
        and norm.running_mean is not None
        and norm.running_var is not None
        and norm.num_features == layer.out_channels
        and norm.running_mean.dtype == torch.float32
    )


def fold(layer: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor, dict[str, Tensor | None]]:
    """The weight and bias of ``norm(layer(x))`` in float32, and what `unfold_weight` needs to undo that.

    ``w' = w * s`` with ``s = gamma / sqrt(var + eps)``, and ``b' = (b - mean) * s + beta``, in float64.
    Dividing by s again gives w up to a few units in the last place: their number is kept, a byte a non-zero.

    Raises
    ------
    ValueError : a channel whose scale is zero or not finite, or weights that leave float32's normal range.
    """
    assert norm.running_mean is not None  # can_fold has looked
    assert norm.running_var is not None
    mean, var = norm.running_mean.double(), norm.running_var.double()
    gamma = torch.ones_like(mean) if norm.weight is None else norm.weight.detach().double()
    beta = torch.zeros_like(mean) if norm.bias is None else norm.bias.detach().double()
    scale = gamma / torch.sqrt(var + norm.eps)
    bias = mean.new_zeros(()) if layer.bias is None else layer.bias.detach().double()
    shifted = (bias - mean) * scale + beta
    if not (bool(scale.isfinite().all()) and bool((scale != 0).all()) and bool(shifted.isfinite().all())):
        raise ValueError("norm: expected finite scales other than zero, got a channel that is switched off")
    plain = layer.weight.detach().float()
    plain = torch.where(plain.abs() < torch.finfo(torch.float32).tiny, 0.0, plain)  # as packing does
    folded = (plain.double() * scale.reshape(-1, 1, 1, 1)).float()
    stored = plain != 0
    size = folded[stored].abs()
    if not (bool((size >= torch.finfo(torch.float32).tiny).all()) and bool(size.isfinite().all())):
        raise ValueError("norm: expected scaled weights in float32's normal range, got some outside")
    delta = _bits(plain[stored]) - _bits(_divide(folded, scale)[stored])
    if delta.numel() and int(delta.abs().max()) > 127:
        raise ValueError("norm: expected a scaling that can be undone, got one that loses bits")
    undo = {
        "fold_scale": scale,
        "fold_delta": delta.to(torch.int8),
        "fold_bias": None if layer.bias is None else layer.bias.detach().float(),
    }
    return folded, shifted.float(), undo


def unfold_weight(folded: Tensor, scale: Tensor, delta: Tensor) -> Tensor:
    """The weight that `fold` was given, in float32, bit for bit; rounded where `folded` was (no `delta`)."""
    weight = _divide(folded, scale)
    if not delta.numel():
        return weight
    stored = folded != 0
    weight[stored] = (_bits(weight[stored]) + delta).view(torch.float32)
    return weight


def _divide(folded: Tensor, scale: Tensor) -> Tensor:
    return (folded.double() / scale.reshape(-1, 1, 1, 1)).float()


def _bits(x: Tensor) -> Any:
    return x.view(torch.int32)
