"""What weights on CUDA devices share: the place where a kernel runs, the checks before it, the call."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pared import _cuda
from pared.ops._arrays import refuse_grad
from pared.ops._device import DeviceWeight

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Place:
    """Where a kernel runs: the extension module, its device's index and a stream."""

    kernels: Any
    device: int
    stream: int

    @classmethod
    def of(cls, x: torch.Tensor) -> Place:
        """`x`'s device and torch's current stream there. Raises ``RuntimeError`` as `pared._cuda.kernels`."""
        return cls(*_cuda.place_of(x))


class KernelWeight(DeviceWeight):
    """A weight in a device's memory whose products pared's kernels compute, or torch's."""

    if TYPE_CHECKING:  # a field of most formats, whose default this would become

        @property
        def shape(self) -> tuple[int, int]:
            """(out, in)."""

        @property
        def dtype(self) -> torch.dtype:
            """Of the values; a format that quantizes activations has none."""

    def linear(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
        activation: str | None = None,
        *,
        place: Place | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """``activation(x @ w.T + bias)``; see `pared.ops.linear`.

        Parameters
        ----------
        x : [..., in] of a dtype that the format takes, on the weight's device, last axis contiguous.
        bias : [out], float32, on the same device, or None.
        activation : None, "relu", "gelu", "gelu_tanh" or "silu".
        place : the device and stream; None for `x`'s and torch's current one.
        options : for tests and tuning; see the format's `_multiply`.

        Returns
        -------
        [..., out], of `x`'s dtype.

        Raises
        ------
        TypeError, ValueError : naming the argument, what was expected and what came.
        RuntimeError : `x` or `bias` asks for a gradient; the CUDA part is missing or cannot run on the
            device.
        """
        outputs = self.shape[0]
        rows = checked_rows(x, self._input_dtypes(), self.shape, bias, self._like())
        if rows.shape[0] == 0 or outputs == 0:
            return x.new_empty((*x.shape[:-1], outputs))
        y = self._multiply(place, rows, bias, activation, **options)
        return y.view(*x.shape[:-1], outputs)

    def _input_dtypes(self) -> tuple[torch.dtype, ...]:
        """Of the activations that it takes: its values' own, unless it quantizes them."""
        return (self.dtype,)

    @abstractmethod
    def _like(self) -> torch.Tensor:
        """One of its tensors, for the device."""

    @abstractmethod
    def _multiply(
        self, place: Place | None, rows: torch.Tensor, bias: torch.Tensor | None, activation: str | None
    ) -> torch.Tensor:
        """[tokens, out], contiguous, for `rows` [tokens, in] of which there are some; all is checked."""


def float_dtypes() -> tuple[torch.dtype, ...]:
    """Those of activations that are quantized."""
    import torch

    return torch.float32, torch.float16, torch.bfloat16


def dtype_name(dtype: torch.dtype) -> str:
    """As the kernels call it."""
    return str(dtype).removeprefix("torch.")


def address(t: torch.Tensor | None) -> int:
    """Of its memory; 0 for None."""
    return 0 if t is None else t.data_ptr()


def workspace(nbytes: int, like: torch.Tensor) -> torch.Tensor | None:
    """So many bytes from torch's allocator, on the device of `like`; None for none."""
    import torch

    return torch.empty(nbytes, dtype=torch.uint8, device=like.device) if nbytes else None


def checked_rows(
    x: torch.Tensor,
    dtypes: Sequence[torch.dtype],
    shape: tuple[int, int],
    bias: torch.Tensor | None,
    like: torch.Tensor,
) -> torch.Tensor:
    """`x` as [tokens, in], once it and `bias` fit a weight of `shape` on the device of `like`."""
    import torch

    outputs, cols = shape
    if not isinstance(x, torch.Tensor) or x.dtype not in dtypes:
        names = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        got = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
        raise TypeError(f"x: expected dtype {names}, got {got}")
    if x.ndim < 1 or x.shape[-1] != cols:
        raise ValueError(f"x: expected shape [..., {cols}], got {list(x.shape)}")
    require_device("x", x, like)
    rows = rows_of(x)
    check_bias(bias, outputs, like)
    refuse_grad(x, "x")
    refuse_grad(bias, "bias")
    return rows


def check_bias(bias: torch.Tensor | None, outputs: int, like: torch.Tensor) -> None:
    """Throws unless `bias` is None or float32 [outputs] on the device of `like`."""
    import torch

    if bias is None:
        return
    if not isinstance(bias, torch.Tensor) or bias.dtype != torch.float32:
        got = bias.dtype if isinstance(bias, torch.Tensor) else type(bias).__name__
        raise TypeError(f"bias: expected a float32 tensor, got {got}")
    if bias.shape != (outputs,) or not bias.is_contiguous():
        raise ValueError(f"bias: expected contiguous [{outputs}], got {list(bias.shape)}")
    require_device("bias", bias, like)


def require_device(name: str, t: torch.Tensor, like: torch.Tensor) -> None:
    """Throws unless `t` is on the device of `like`."""
    if t.device != like.device:
        raise ValueError(f"{name}: expected a tensor on {like.device}, got one on {t.device}")


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """`x` as [tokens, in] without a copy. ``ValueError`` where its strides do not allow that."""
    if x.ndim == 2 and (x.stride(1) == 1 or x.shape[1] <= 1):
        return x
    if x.is_contiguous():
        return x.reshape(x.numel() // x.shape[-1] if x.shape[-1] else x[..., :0].numel(), x.shape[-1])
    if x.stride(-1) == 1:
        try:
            return x.view(-1, x.shape[-1])
        except RuntimeError:
            pass
    raise ValueError(
        f"x: expected rows that are contiguous and evenly spaced, got strides {tuple(x.stride())}; "
        "call .contiguous()"
    )
