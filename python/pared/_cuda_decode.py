"""Weights for few tokens on CUDA devices: packing, and what is checked and allocated before a kernel runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pared._cuda_int8 import Place, checked_rows, require_device
from pared.ops._device import DeviceWeight

if TYPE_CHECKING:
    import torch

Format = Literal["bitmap16", "bitmap8", "dense8"]
BLOCK = 64  # outputs and columns of a block; csrc/cuda/decode_plan.h says what is in one
MASK_BYTES = BLOCK * BLOCK // 8


@dataclass(frozen=True)
class DecodeWeight(DeviceWeight):
    """A weight that is read once for few tokens, in a device's memory.

    Attributes
    ----------
    blocks : uint8, the blocks one after the other.
    offsets : int32, where they begin, in units of 16 bytes; one more than there are blocks.
    format : "bitmap16" (16-bit non-zeros), "bitmap8" (8-bit non-zeros) or "dense8" (all values, 8-bit).
    dtype : float16 or bfloat16, of activations and outputs.
    shape : (out, in).
    largest : bytes of the largest block.
    scales : float32 [out] of 8-bit values; None for "bitmap16".
    """

    blocks: torch.Tensor
    offsets: torch.Tensor
    format: Format
    dtype: torch.dtype
    shape: tuple[int, int]
    largest: int
    scales: torch.Tensor | None

    @classmethod
    def from_dense(cls, weight: torch.Tensor) -> DecodeWeight:
        """The non-zeros of a float16 or bfloat16 weight [out, in], on its device; -0.0 counts as zero.

        Raises
        ------
        TypeError, ValueError : naming the argument, what was expected and what came.
        """
        import torch

        if not isinstance(weight, torch.Tensor) or weight.dtype not in (torch.float16, torch.bfloat16):
            got = weight.dtype if isinstance(weight, torch.Tensor) else type(weight).__name__
            raise TypeError(f"weight: expected dtype float16 or bfloat16, got {got}")
        return cls._pack(weight.detach(), "bitmap16", weight.dtype, None)

    @classmethod
    def from_quantized(
        cls, q: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype, format: Format = "dense8"
    ) -> DecodeWeight:
        """An int8 weight [out, in] with a scale an output, on its device; nothing is rounded again.

        Raises
        ------
        TypeError, ValueError : naming the argument, what was expected and what came.
        """
        import torch

        if not isinstance(q, torch.Tensor) or q.dtype != torch.int8:
            got = q.dtype if isinstance(q, torch.Tensor) else type(q).__name__
            raise TypeError(f"q: expected dtype int8, got {got}")
        if format not in ("bitmap8", "dense8"):
            raise ValueError(f"format: expected 'bitmap8' or 'dense8', got {format!r}")
        if dtype not in (torch.float16, torch.bfloat16):
            raise TypeError(f"dtype: expected float16 or bfloat16, got {dtype}")
        if q.ndim == 2 and scales.shape != q.shape[:1]:
            raise ValueError(f"scales: expected [{q.shape[0]}], got {list(scales.shape)}")
        require_device("scales", scales, q)
        return cls._pack(q, format, dtype, scales.float().contiguous())

    @classmethod
    def _pack(
        cls, w: torch.Tensor, format: Format, dtype: torch.dtype, scales: torch.Tensor | None
    ) -> DecodeWeight:
        import torch

        if w.ndim != 2:
            raise ValueError(f"weight: expected [out, in], got shape {list(w.shape)}")
        outputs, cols = w.shape
        order = _fragment_order(w.device)
        sizes, parts = [], []
        for first in range(0, outputs, BLOCK):  # a row of blocks at a time bounds the memory
            rows = w[first : first + BLOCK]
            padded = torch.zeros(BLOCK, -(-cols // BLOCK) * BLOCK, dtype=w.dtype, device=w.device)
            padded[: rows.shape[0], :cols] = rows
            values = padded.view(BLOCK, -1, BLOCK).transpose(0, 1).reshape(-1, BLOCK * BLOCK)[:, order]
            size, part = _pack_dense(values) if format == "dense8" else _pack_bitmap(values)
            sizes.append(size)
            parts.append(part)
        size = torch.cat(sizes) if sizes else torch.zeros(0, dtype=torch.int64, device=w.device)
        units = torch.zeros(size.numel() + 1, dtype=torch.int64, device=w.device)
        torch.cumsum(size // 16, 0, out=units[1:])
        if int(units[-1]) >= 1 << 32:
            raise ValueError(
                f"weight: expected less than 64 GiB when packed, got {int(units[-1]) * 16} bytes"
            )
        # The kernels read them unsigned.
        offsets = units.to(torch.int32)
        blocks = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.uint8, device=w.device)
        largest = int(size.max()) if size.numel() else 0
        return cls(blocks, offsets, format, dtype, (outputs, cols), largest, scales)

    @property
    def device(self) -> torch.device:
        return self.blocks.device

    def linear(
        self, x: torch.Tensor, bias: torch.Tensor | None = None, activation: str | None = None
    ) -> torch.Tensor:
        return linear(x, self, bias, activation)

    @property
    def nbytes(self) -> int:
        """Bytes of device memory."""
        return (
            self.blocks.numel()
            + 4 * self.offsets.numel()
            + (4 * self.shape[0] if self.format != "bitmap16" else 0)
        )

    def _parts(self) -> tuple[int, int, str, str, int, int, int]:
        dtype = str(self.dtype).removeprefix("torch.")
        blocks, offsets = self.blocks.data_ptr(), self.offsets.data_ptr()
        return blocks, offsets, self.format, dtype, *self.shape, self.largest

    def to_dense(self, *, place: Place | None = None) -> torch.Tensor:
        """The weight [out, in] in `dtype`, as one kernel writes it."""
        import torch

        at = place or Place.of(self.blocks)
        out = torch.empty(self.shape, dtype=self.dtype, device=self.blocks.device)
        scales = 0 if self.scales is None else self.scales.data_ptr()
        at.kernels.decode_expand(self._parts(), scales, out.data_ptr(), at.device, at.stream)
        return out


def linear(
    x: torch.Tensor,
    w: DecodeWeight,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    *,
    place: Place | None = None,
    bulk: bool | None = None,
) -> torch.Tensor:
    """``activation(x @ w.T + bias)``: one read of the packed weight for up to 32 tokens.

    More tokens are multiplied with the dense weight, which exists for the time of the call.

    Parameters
    ----------
    x : [..., in] in the weight's dtype and on its device, last axis contiguous.
    bias : [out], float32, on the same device, or None.
    activation : None, "relu", "gelu", "gelu_tanh" or "silu".
    place : the device and stream; None for `x`'s and torch's current one.
    bulk : whether blocks come by sm_90's bulk copies; None where the device has them.

    Raises
    ------
    TypeError, ValueError : naming the argument, what was expected and what came.
    RuntimeError : `x` or `bias` asks for a gradient; the CUDA part is missing or cannot run on the device.
    """
    import torch

    outputs, cols = w.shape
    rows = checked_rows(x, (w.dtype,), w.shape, bias, w.blocks)
    at = place or Place.of(x)
    tokens = rows.shape[0]
    if tokens > at.kernels.DECODE_MAX_TOKENS:
        y = torch.nn.functional.linear(x, w.to_dense(place=at), None if bias is None else bias.to(x.dtype))
        return _activate(y, activation)
    out = torch.empty((*x.shape[:-1], outputs), dtype=x.dtype, device=x.device)
    if tokens == 0 or outputs == 0:
        return out
    *_, needed = at.kernels.plan_decode(
        tokens,
        outputs,
        cols,
        w.largest,
        at.kernels.multiprocessors(at.device),
        at.kernels.shared_limit(at.device),
    )
    workspace = torch.empty(needed, dtype=torch.uint8, device=x.device) if needed else None

    def address(t: torch.Tensor | None) -> int:
        return 0 if t is None else t.data_ptr()

    at.kernels.decode_product(
        w._parts(),
        rows.data_ptr(),
        tokens,
        rows.stride(0),
        address(w.scales),
        address(bias),
        activation or "",
        out.data_ptr(),
        outputs,
        address(workspace),
        at.kernels.bulk_copies(at.device) if bulk is None else bulk,
        at.device,
        at.stream,
    )
    return out


def _activate(y: torch.Tensor, activation: str | None) -> torch.Tensor:
    import torch.nn.functional as f

    functions: dict[str, Any] = {
        "": lambda t: t,
        "relu": f.relu,
        "gelu": f.gelu,
        "gelu_tanh": lambda t: f.gelu(t, approximate="tanh"),
        "silu": f.silu,
    }
    if (activation or "") not in functions:
        names = ", ".join(n for n in functions if n)
        raise ValueError(f"activation: expected one of {names} or None, got {activation!r}")
    result: torch.Tensor = functions[activation or ""](y)
    return result


def _fragment_order(device: torch.device) -> torch.Tensor:
    """Place in a block [64 outputs, 64 columns] of each value, fragments r-major, by lane, register, half."""
    import torch

    r, s, g, t, i, j = torch.meshgrid(*(torch.arange(n) for n in (4, 4, 8, 4, 4, 2)), indexing="ij")
    output = 16 * r + g + 8 * (i % 2)
    column = 16 * t + 4 * s + 2 * (i // 2) + j
    return (output * BLOCK + column).reshape(-1).to(device)


def _pack_bitmap(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sizes in bytes, and blocks, of values [blocks, 4096] in fragment order."""
    import torch

    count = values.shape[0]
    item = values.element_size()
    present = values != 0
    bits = present.view(count, 4, 4, 32, 8).to(torch.uint8) << torch.arange(
        8, dtype=torch.uint8, device=values.device
    )
    masks = bits.sum(-1, dtype=torch.uint8).permute(0, 3, 1, 2).reshape(count, MASK_BYTES)
    found = present.sum(-1)
    size = MASK_BYTES + (found * item + 15) // 16 * 16
    begin = torch.cumsum(size, 0) - size
    out = torch.zeros(int(size.sum()), dtype=torch.uint8, device=values.device)
    columns = torch.arange(MASK_BYTES, device=values.device)
    out[(begin[:, None] + columns).reshape(-1)] = masks.reshape(-1)
    # Value n of a block goes to place n behind its masks.
    rank = torch.arange(int(found.sum()), device=values.device)
    rank -= torch.repeat_interleave(torch.cumsum(found, 0) - found, found)
    at = torch.repeat_interleave((begin + MASK_BYTES) // item, found) + rank
    as_integers = torch.int16 if item == 2 else torch.int8
    out.view(as_integers)[at] = values[present].view(as_integers)
    return size, out


def _pack_dense(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for all values, int8."""
    import torch

    count = values.shape[0]
    parts = values.view(count, 4, 2, 2, 32, 8).permute(0, 1, 2, 4, 3, 5)
    size = torch.full((count,), BLOCK * BLOCK, device=values.device)
    return size, parts.reshape(-1).view(torch.uint8)
