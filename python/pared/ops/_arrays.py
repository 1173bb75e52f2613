"""Numpy arrays and torch tensors behind one set of helpers; torch is used only when the caller loaded it."""

from __future__ import annotations

import operator
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


def integer(x: object, name: str, least: int = -(2**63), most: int = 2**63 - 1) -> int:
    """`x` as an int, for what the extension takes as one. Raises ``TypeError`` or ``ValueError``."""
    try:
        if isinstance(x, bool):
            raise TypeError
        value = operator.index(x)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name}: expected an integer, got {type(x).__name__}") from None
    if not least <= value <= most:
        wanted = f"at least {least}" if value < least else f"at most {most}"
        raise ValueError(f"{name}: expected an integer of {wanted}, got {value}")
    return value


def check_scipy_dtype(matrix: Any) -> None:
    """Raise ``TypeError`` for values that are not packed as they are: scipy's own default is float64."""
    if matrix.dtype not in (np.float32, np.float16):
        raise TypeError(
            f"matrix: expected dtype float32 or float16, got {matrix.dtype}; call .astype(numpy.float32)"
        )


def number(x: object, name: str) -> float:
    """`x` as a float. Raises ``TypeError`` unless it is a real number."""
    try:
        if isinstance(x, (bool, str, bytes)):
            raise TypeError
        return float(x)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected a number, got {type(x).__name__}") from None
    except OverflowError:
        raise ValueError(f"{name}: expected a number that a float holds, got {x!r:.20}...") from None


def word(x: object, name: str) -> str:
    """`x` if it is a string, whose value the extension checks. Raises ``TypeError``."""
    if not isinstance(x, str):
        raise TypeError(f"{name}: expected a string, got {type(x).__name__}")
    return x if x.isascii() else ascii(x)


def activation_name(x: object) -> str:
    """An activation as the extension takes it: None is ``""``."""
    return "" if x is None else word(x, "activation")


def dtype_of_kind(x: Any, name: str) -> Any:
    """The dtype of that name in `x`'s library."""
    if is_torch(x):
        import torch

        return getattr(torch, name)
    return np.dtype(name)


def empty_like_kind(x: Any, shape: tuple[int, ...], dtype: Any = None) -> Array:
    """An uninitialised array of `x`'s kind (and device), with `x`'s dtype unless given."""
    if is_torch(x):
        import torch

        return torch.empty(shape, dtype=x.dtype if dtype is None else dtype, device=x.device)
    return np.empty(shape, dtype=x.dtype if dtype is None else dtype)


def channels_last(x: torch.Tensor) -> bool:
    """Whether convolutions take [N, C, H, W] pixel by pixel: channels are neighbours, planes not whole."""
    if x.is_contiguous():
        return False
    _, channels, _, width = x.shape
    _, c, h, w = x.stride()
    return c == 1 and w != 1 and w >= channels and h == width * w


def empty_images(x: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """An uninitialised [N, C, H, W] in `x`'s dtype and layout, on its device."""
    if not channels_last(x):
        return x.new_empty(shape)
    import torch

    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def refuse_grad(x: Any, name: str) -> None:
    """Raise ``RuntimeError`` when autograd would need a gradient through an operation that has none."""
    if is_torch(x) and x.requires_grad:
        import torch

        if torch.is_grad_enabled():
            raise RuntimeError(
                f"{name}: expected a tensor that needs no gradient, got requires_grad=True; pared's "
                "operations are for inference: call under torch.no_grad() or detach()"
            )
