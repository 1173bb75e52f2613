"""8-bit linear layers and products on CUDA devices: what is checked and allocated before a kernel runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pared import _cuda
from pared.ops._arrays import refuse_grad
from pared.ops._device import DeviceWeight

if TYPE_CHECKING:
    import torch

    from pared.ops.int8 import Activations, Int8

DYNAMIC: Activations = (0.0, 128, 1, 255)
MAX_COLS = 65793  # of quantized products, as on the CPU: no sum of bytes below 256 times int8 overflows
MAX_EXACT_COLS = 131071  # of gemm_s8: 128 * 128 * K stays below 2^31


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


@dataclass(frozen=True)
class DeviceInt8(DeviceWeight):
    """A `pared.ops.Int8` weight in a device's memory: rows of bytes, padded with zeros to 16.

    Attributes
    ----------
    q : [out, in rounded up to 16], int8.
    scales : [out], float32.
    correction : [out], int32, what the input's zero point adds to the sums; None where that is nothing.
    activations : (scale, zero, low, high) of the input, zero as of uint8; scale 0 is dynamic by token.
    cols : number of inputs.
    """

    q: torch.Tensor
    scales: torch.Tensor
    correction: torch.Tensor | None
    activations: Activations
    cols: int

    @classmethod
    def from_int8(cls, w: Int8, device: torch.device | str) -> DeviceInt8:
        """Copies a packed CPU weight to `device`; nothing is rounded again."""
        import numpy as np
        import torch

        q, scales = w.to_quantized()
        rows, cols = q.shape
        padded = np.zeros((rows, -(-cols // 16) * 16), np.int8)
        padded[:, :cols] = q
        activations = w.activations or DYNAMIC
        # Bytes are stored with 128 subtracted, so that a zero point of 128 needs nothing.
        offset = 128 - activations[1]
        sums = q.sum(axis=1, dtype=np.int32) * np.int32(offset) if offset else None
        return cls(
            torch.from_numpy(padded).to(device),
            torch.from_numpy(scales).to(device),
            None if sums is None else torch.from_numpy(sums).to(device),
            activations,
            cols,
        )

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.q.shape[0], self.cols

    def linear(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
        activation: str | None = None,
        *,
        place: Place | None = None,
    ) -> torch.Tensor:
        """``activation(x @ w.T + bias)``; see `pared.ops.linear`.

        Parameters
        ----------
        x : [..., in], float32, bfloat16 or float16, last axis contiguous, on the weight's device.
        bias : [out], float32, on the same device, or None.
        activation : None, "relu", "gelu", "gelu_tanh" or "silu".
        place : the device and stream; None for `x`'s and torch's current one.

        Returns
        -------
        [..., out], of `x`'s dtype. Without an activation the bits of the CPU's `Int8`.

        Raises
        ------
        TypeError, ValueError : naming the argument, what was expected and what came.
        RuntimeError : `x` or `bias` asks for a gradient; the CUDA part is missing or cannot run on the
            device.
        """
        import torch

        if self.cols > MAX_COLS:
            raise ValueError(f"w: expected at most {MAX_COLS} inputs, got {self.cols}")
        rows = checked_rows(x, (torch.float32, torch.float16, torch.bfloat16), self.shape, bias, self.q)
        outputs = self.shape[0]
        at = place or Place.of(x)
        dtype = str(x.dtype).removeprefix("torch.")
        q, scales = quantize(at, rows, self.activations)
        out = torch.empty((*x.shape[:-1], outputs), dtype=x.dtype, device=x.device)
        _product(at, q, self.q, self.cols, scales, self, bias, activation or "", dtype, out)
        return out


def quantize(at: Place, rows: torch.Tensor, activations: Activations) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of activations as int8, padded with zeros to 16 bytes, and their scales."""
    import torch

    tokens, cols = rows.shape
    q = torch.empty((tokens, -(-cols // 16) * 16), dtype=torch.int8, device=rows.device)
    scales = torch.empty(tokens, dtype=torch.float32, device=rows.device)
    at.kernels.quantize_rows(
        rows.data_ptr(),
        str(rows.dtype).removeprefix("torch."),
        tokens,
        cols,
        rows.stride(0),
        activations,
        q.data_ptr(),
        q.shape[1],
        scales.data_ptr(),
        at.device,
        at.stream,
    )
    return q, scales


def gemm_s8(a: torch.Tensor, b: torch.Tensor, *, place: Place | None = None) -> torch.Tensor:
    """``a @ b.T`` of int8 matrices, exact in int32; see `pared.ops.gemm_s8`.

    Raises
    ------
    TypeError, ValueError : naming the argument, what was expected and what came.
    """
    import torch

    for name, t in (("a", a), ("b", b)):
        if not isinstance(t, torch.Tensor) or t.dtype != torch.int8:
            got = t.dtype if isinstance(t, torch.Tensor) else type(t).__name__
            raise TypeError(f"{name}: expected dtype int8, got {got}")
        if t.ndim != 2:
            raise ValueError(f"{name}: expected two dimensions, got shape {list(t.shape)}")
    cols = a.shape[1]
    if b.shape[1] != cols:
        raise ValueError(f"b: expected [N, {cols}], got {list(b.shape)}")
    if cols > MAX_EXACT_COLS:
        raise ValueError(f"a: expected at most {MAX_EXACT_COLS} columns, got {cols}")
    require_device("b", b, a)
    at = place or Place.of(a)
    out = torch.empty((a.shape[0], b.shape[0]), dtype=torch.int32, device=a.device)
    _product(at, _aligned(at, a), _aligned(at, b), cols, None, None, None, "", "", out)
    return out


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


def _aligned(at: Place, t: torch.Tensor) -> torch.Tensor:
    """An int8 matrix with rows at multiples of 16 bytes and zeros behind them: `t` itself where it is one."""
    import torch

    rows, cols = t.shape
    align: int = at.kernels.INT8_ALIGN
    row, column = t.stride()
    if column == 1 and row >= cols and not (cols % align or row % align or t.data_ptr() % align):
        return t
    padded = torch.empty((rows, -(-cols // align) * align), dtype=torch.int8, device=t.device)
    at.kernels.pad_rows(
        t.data_ptr(),
        rows,
        cols,
        t.stride(0),
        t.stride(1),
        padded.data_ptr(),
        padded.shape[1],
        at.device,
        at.stream,
    )
    return padded


def _product(
    at: Place,
    a: torch.Tensor,
    b: torch.Tensor,
    cols: int,
    x_scales: torch.Tensor | None,
    w: DeviceInt8 | None,
    bias: torch.Tensor | None,
    activation: str,
    dtype: str,
    out: torch.Tensor,
) -> None:
    """The product of padded rows of bytes into `out`, whose rows lie one after the other."""
    import torch

    tokens, outputs = a.shape[0], b.shape[0]
    if tokens == 0 or outputs == 0:
        return
    *_, needed = at.kernels.plan_int8(tokens, outputs, cols, at.kernels.multiprocessors(at.device))
    workspace = torch.empty(needed, dtype=torch.uint8, device=a.device) if needed else None

    def address(t: torch.Tensor | None) -> int:
        return 0 if t is None else t.data_ptr()

    at.kernels.int8_product(
        a.data_ptr(),
        b.data_ptr(),
        tokens,
        outputs,
        cols,
        # torch gives matrices without elements or of one row any stride
        max(a.stride(0), a.shape[1]) if cols else 0,
        max(b.stride(0), b.shape[1]) if cols else 0,
        address(x_scales),
        address(w.scales if w else None),
        address(w.correction if w else None),
        address(bias),
        activation,
        dtype,
        out.data_ptr(),
        outputs,
        address(workspace),
        at.device,
        at.stream,
    )
