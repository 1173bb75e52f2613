"""8-bit linear layers and products on CUDA devices: what is checked and allocated before a kernel runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from pared._cuda_weight import (
    KernelWeight,
    Place,
    address,
    dtype_name,
    float_dtypes,
    require_device,
    workspace,
)
from pared.ops._device import DeviceWeight

if TYPE_CHECKING:
    import torch

    from pared.ops.int8 import Activations, Int8

DYNAMIC: Activations = (0.0, 128, 1, 255)
MAX_COLS = 65793  # of quantized products, as on the CPU: no sum of bytes below 256 times int8 overflows
MAX_EXACT_COLS = 131071  # of gemm_s8: 128 * 128 * K stays below 2^31


@dataclass(frozen=True)
class DeviceInt8(KernelWeight):
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

    def joins(self, other: DeviceWeight) -> bool:
        return (
            isinstance(other, DeviceInt8)
            and (other.activations, other.cols) == (self.activations, self.cols)
            and other.q.device == self.q.device
        )

    def join(self, *others: DeviceWeight) -> tuple[DeviceWeight, list[DeviceWeight]]:
        import torch

        weights = [self, *(cast(DeviceInt8, w) for w in others)]
        sizes = [w.q.shape[0] for w in weights]
        q, scales = torch.cat([w.q for w in weights]), torch.cat([w.scales for w in weights])
        correction = None
        if self.correction is not None:  # by the zero point, which they share
            correction = torch.cat([cast("torch.Tensor", w.correction) for w in weights])
        corrections = [None] * len(sizes) if correction is None else torch.split(correction, sizes)
        parts = zip(torch.split(q, sizes), torch.split(scales, sizes), corrections, strict=True)
        whole = DeviceInt8(q, scales, correction, self.activations, self.cols)
        return whole, [DeviceInt8(*p, self.activations, self.cols) for p in parts]

    def _input_dtypes(self) -> tuple[torch.dtype, ...]:
        return float_dtypes()

    def _like(self) -> torch.Tensor:
        return self.q

    def _multiply(
        self, place: Place | None, rows: torch.Tensor, bias: torch.Tensor | None, activation: str | None
    ) -> torch.Tensor:
        """Without an activation the bits of the CPU's `Int8`."""
        import torch

        at = place or Place.of(rows)
        if self.cols > MAX_COLS:
            raise ValueError(f"w: expected at most {MAX_COLS} inputs, got {self.cols}")
        q, scales = quantize(at, rows, self.activations)
        out = torch.empty((rows.shape[0], self.shape[0]), dtype=rows.dtype, device=rows.device)
        _product(at, q, self.q, self.cols, scales, self, bias, activation or "", dtype_name(rows.dtype), out)
        return out


def quantize(at: Place, rows: torch.Tensor, activations: Activations) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of activations as int8, padded with zeros to 16 bytes, and their scales."""
    import torch

    tokens, cols = rows.shape
    q = torch.empty((tokens, -(-cols // 16) * 16), dtype=torch.int8, device=rows.device)
    scales = torch.empty(tokens, dtype=torch.float32, device=rows.device)
    at.kernels.quantize_rows(
        rows.data_ptr(),
        dtype_name(rows.dtype),
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
    tokens, outputs = a.shape[0], b.shape[0]
    if tokens == 0 or outputs == 0:
        return
    *_, needed = at.kernels.plan_int8(tokens, outputs, cols, at.kernels.multiprocessors(at.device))
    memory = workspace(needed, a)
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
        address(memory),
        at.device,
        at.stream,
    )
