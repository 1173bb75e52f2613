"""Numpy arrays and torch tensors behind one set of helpers; torch is used only when the caller loaded it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np

from pared._types import Array

if TYPE_CHECKING:
    import torch


def is_torch(x: object) -> TypeGuard[torch.Tensor]:
    """Whether `x` is a torch tensor. Never imports torch: who holds a tensor has imported it."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def require_array(x: object, name: str) -> None:
    """Raise ``TypeError`` unless `x` is a numpy array or a torch tensor."""
    if not (isinstance(x, np.ndarray) or is_torch(x)):
        raise TypeError(f"{name}: expected a numpy array or a torch tensor, got {type(x).__name__}")


def empty_like_kind(x: Any, shape: tuple[int, ...], dtype: Any = None) -> Array:
    """An uninitialised array of `x`'s kind (and device), with `x`'s dtype unless given."""
    if is_torch(x):
        import torch

        return torch.empty(shape, dtype=x.dtype if dtype is None else dtype, device=x.device)
    return np.empty(shape, dtype=x.dtype if dtype is None else dtype)


def refuse_grad(x: Any, name: str) -> None:
    """Raise ``RuntimeError`` when autograd would need a gradient through an operation that has none."""
    if is_torch(x) and x.requires_grad:
        import torch

        if torch.is_grad_enabled():
            raise RuntimeError(
                f"{name}: expected a tensor that needs no gradient, got requires_grad=True; pared's "
                "operations are for inference: call under torch.no_grad() or detach()"
            )
