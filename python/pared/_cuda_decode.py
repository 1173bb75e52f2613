"""Weights for few tokens on CUDA devices: packing, and what is checked and allocated before a kernel runs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal, cast

from pared import _cuda
from pared._cuda_weight import KernelWeight, Place, address, dtype_name, require_device, workspace
from pared.ops._device import DeviceWeight

if TYPE_CHECKING:
    import torch

Format = Literal["bitmap16", "pairs16", "bitmap8", "dense8"]
BLOCK = 64  # outputs and columns of a block; csrc/cuda/decode_plan.h says what is in one
MASK_BYTES = BLOCK * BLOCK // 8
# Two reads of the packed weight. The dense way reads it, writes the dense one and reads that: with 50 % zeros
# in 16 bits the bytes of four and a half.
FEW_TOKENS = 64


@dataclass(frozen=True)
class DecodeWeight(KernelWeight):
    """A weight that is read once for few tokens, in a device's memory.

    Attributes
    ----------
    blocks : uint8, the blocks one after the other.
    offsets : int32, where they begin, in units of 16 bytes; one more than there are blocks.
    format : "bitmap16" (16-bit non-zeros), "pairs16" (16-bit pairs of columns that are not both zero),
        "bitmap8" (8-bit non-zeros) or "dense8" (all values, 8-bit).
    dtype : float16 or bfloat16, of activations and outputs.
    shape : (out, in).
    largest : bytes of the largest block.
    scales : float32 [out] of 8-bit values; None for 16-bit ones.
    few_tokens : up to so many tokens the packed weight is multiplied with, beyond it the dense one.
    """

    blocks: torch.Tensor
    offsets: torch.Tensor
    format: Format
    dtype: torch.dtype
    shape: tuple[int, int]
    largest: int
    scales: torch.Tensor | None
    few_tokens: int = FEW_TOKENS

    @classmethod
    def from_dense(
        cls, weight: torch.Tensor, mask: torch.Tensor | None = None, format: Format | None = None
    ) -> DecodeWeight:
        """The non-zeros of a float16 or bfloat16 weight [out, in], on its device; -0.0 counts as zero.

        `mask`, bool [out, in]: of those the ones to keep, as `pared.ops.topk_mask` gives it. `format`:
        "bitmap16" or "pairs16"; None for the one that should be faster, `faster_format`.

        Raises
        ------
        TypeError, ValueError : naming the argument, what was expected and what came.
        """
        import torch

        if not isinstance(weight, torch.Tensor) or weight.dtype not in (torch.float16, torch.bfloat16):
            got = weight.dtype if isinstance(weight, torch.Tensor) else type(weight).__name__
            raise TypeError(f"weight: expected dtype float16 or bfloat16, got {got}")
        if format not in (None, "bitmap16", "pairs16"):
            raise ValueError(f"format: expected 'bitmap16', 'pairs16' or None, got {format!r}")
        return cls._pack(weight.detach(), format, weight.dtype, None, mask)

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
        return cls._pack(q, format, dtype, scales.float().contiguous(), None)

    @classmethod
    def _pack(
        cls,
        w: torch.Tensor,
        format: Format | None,
        dtype: torch.dtype,
        scales: torch.Tensor | None,
        mask: torch.Tensor | None,
    ) -> DecodeWeight:
        import torch

        if w.ndim != 2:
            raise ValueError(f"weight: expected [out, in], got shape {list(w.shape)}")
        outputs, cols = w.shape
        if mask is not None:
            if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
                got = mask.dtype if isinstance(mask, torch.Tensor) else type(mask).__name__
                raise TypeError(f"mask: expected dtype bool, got {got}")
            if mask.shape != w.shape:
                raise ValueError(f"mask: expected [{outputs}, {cols}], got {list(mask.shape)}")
            require_device("mask", mask, w)
        format = format or faster_format(w, mask)
        pack = pack_on_device if _cuda.is_device_tensor(w) else pack_in_torch
        blocks, offsets, largest = pack(w, format, mask)
        return cls(blocks, offsets, format, dtype, (outputs, cols), largest, scales)

    def _operand(self) -> tuple[int, int, str, str, int, int, int]:
        blocks, offsets = self.blocks.data_ptr(), self.offsets.data_ptr()
        return blocks, offsets, self.format, dtype_name(self.dtype), *self.shape, self.largest

    def to_dense(self, *, place: Place | None = None) -> torch.Tensor:
        """The weight [out, in] in `dtype`, as one kernel writes it."""
        import torch

        at = place or Place.of(self.blocks)
        out = torch.empty(self.shape, dtype=self.dtype, device=self.blocks.device)
        at.kernels.decode_expand(self._operand(), address(self.scales), out.data_ptr(), at.device, at.stream)
        return out

    def joins(self, other: DeviceWeight) -> bool:
        """Block rows do not mix outputs of two weights."""
        return (
            isinstance(other, DecodeWeight)
            and (other.format, other.dtype, other.shape[1]) == (self.format, self.dtype, self.shape[1])
            and other.blocks.device == self.blocks.device
            and self.shape[0] % BLOCK == 0
        )

    def join(self, *others: DeviceWeight) -> tuple[DeviceWeight, list[DeviceWeight]]:
        import torch

        weights = [self, *(cast(DecodeWeight, w) for w in others)]
        offsets = [w.offsets.long() & 0xFFFFFFFF for w in weights]
        starts = [0, *accumulate(int(o[-1]) for o in offsets)]
        blocks = torch.cat([w.blocks for w in weights])
        moved = [o + start for o, start in zip(offsets, starts, strict=False)]
        whole = torch.cat([o[:-1] for o in moved] + [moved[-1][-1:]]).to(torch.int32)
        scales = None if self.scales is None else torch.cat([cast("torch.Tensor", w.scales) for w in weights])
        rows = [0, *accumulate(w.shape[0] for w in weights)]
        parts: list[DeviceWeight] = [
            dataclasses.replace(
                w,
                blocks=blocks[16 * starts[i] : 16 * starts[i + 1]],
                scales=None if scales is None else scales[rows[i] : rows[i + 1]],
            )
            for i, w in enumerate(weights)
        ]
        shape = (rows[-1], self.shape[1])
        largest, few = max(w.largest for w in weights), min(w.few_tokens for w in weights)
        joint = DecodeWeight(blocks, whole, self.format, self.dtype, shape, largest, scales, few)
        return joint, parts

    def _like(self) -> torch.Tensor:
        return self.blocks

    def _multiply(
        self,
        place: Place | None,
        rows: torch.Tensor,
        bias: torch.Tensor | None,
        activation: str | None,
        bulk: bool | None = None,
    ) -> torch.Tensor:
        """The number of tokens alone decides how, so that graphs hold it: up to `few_tokens` read the packed
        weight once for every 32 of them; more are multiplied with the dense weight, which exists for the
        time of the call. bulk: whether blocks come by sm_90's bulk copies; None where the device has them.
        """
        import torch

        at = place or Place.of(rows)
        outputs, cols = self.shape
        tokens = rows.shape[0]
        if tokens > self.few_tokens:
            dense = self.to_dense(place=at)
            y = torch.nn.functional.linear(rows, dense, None if bias is None else bias.to(rows.dtype))
            return _activate(y, activation)
        out = torch.empty((tokens, outputs), dtype=rows.dtype, device=rows.device)
        needed: int = at.kernels.decode_workspace(
            tokens,
            outputs,
            cols,
            self.largest,
            self.format,
            at.kernels.multiprocessors(at.device),
            at.kernels.shared_limit(at.device),
        )
        memory = workspace(needed, rows)
        at.kernels.decode_product(
            self._operand(),
            rows.data_ptr(),
            tokens,
            rows.stride(0),
            address(self.scales),
            address(bias),
            activation or "",
            out.data_ptr(),
            outputs,
            address(memory),
            needed,
            at.kernels.bulk_copies(at.device) if bulk is None else bulk,
            at.device,
            at.stream,
        )
        return out


def faster_format(w: torch.Tensor, mask: torch.Tensor | None = None) -> Format:
    """Of a 16-bit weight [out, in]. Pairs cost more bytes and fewer instructions: they are worth it where at
    most a third of them are there, which is 82 % zeros and more at random. Waits for the count.
    """
    import torch

    kept = w != 0 if mask is None else (w != 0) & mask
    cols = w.shape[1]
    odd = kept[:, 1::2]
    pairs = torch.count_nonzero(kept[:, : cols - cols % 2 : 2] | odd) + torch.count_nonzero(
        kept[:, cols - cols % 2 :]
    )
    return "pairs16" if 6 * int(pairs) <= w.numel() else "bitmap16"


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


Packed = tuple["torch.Tensor", "torch.Tensor", int]  # blocks, offsets, bytes of the largest


def _offsets(units: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Where blocks of these sizes (int64, in 16 bytes) begin, int32 that the kernels read unsigned; and their
    sum. Waits for it.
    """
    import torch

    ends = torch.zeros(units.numel() + 1, dtype=torch.int64, device=units.device)
    torch.cumsum(units, 0, out=ends[1:])
    total = int(ends[-1])
    if total >= 1 << 32:
        raise ValueError(f"weight: expected less than 64 GiB when packed, got {total * 16} bytes")
    return ends.to(torch.int32), total


def pack_on_device(w: torch.Tensor, format: Format, mask: torch.Tensor | None) -> Packed:
    """By kernels, where the weight is; waits once, for the size."""
    import torch

    outputs, cols = w.shape
    at = Place.of(w)
    w = w if w.stride(1) == 1 or cols <= 1 else w.contiguous()
    mask = None if mask is None else mask.contiguous()
    stride = w.stride(0) if outputs > 1 else cols
    operand = (w.data_ptr(), outputs, cols, stride, format, 0 if mask is None else mask.data_ptr())
    count = -(-outputs // BLOCK) * -(-cols // BLOCK)
    if format == "dense8":
        units = torch.full((count,), BLOCK * BLOCK // 16, dtype=torch.int64, device=w.device)
        most = torch.full((), BLOCK * BLOCK // 16 if count else 0, dtype=torch.int64, device=w.device)
    else:
        units = torch.empty(count, dtype=torch.int64, device=w.device)
        most = torch.zeros((), dtype=torch.int64, device=w.device)
        if count:
            at.kernels.decode_pack_sizes(operand, units.data_ptr(), most.data_ptr(), at.device, at.stream)
    offsets, total = _offsets(units)
    blocks = torch.empty(total * 16, dtype=torch.uint8, device=w.device)
    if count:
        at.kernels.decode_pack(operand, offsets.data_ptr(), blocks.data_ptr(), at.device, at.stream)
    return blocks, offsets, int(most) * 16


def pack_in_torch(w: torch.Tensor, format: Format, mask: torch.Tensor | None) -> Packed:
    """By torch's operations, on any device: the same bytes."""
    import torch

    outputs, cols = w.shape
    w = w if mask is None else torch.where(mask, w, 0)
    order = _fragment_order(w.device)
    packs = {"dense8": _pack_dense, "pairs16": _pack_pairs, "bitmap16": _pack_bitmap, "bitmap8": _pack_bitmap}
    sizes, parts = [], []
    for first in range(0, outputs, BLOCK):  # a row of blocks at a time bounds the memory
        rows = w[first : first + BLOCK]
        padded = torch.zeros(BLOCK, -(-cols // BLOCK) * BLOCK, dtype=w.dtype, device=w.device)
        padded[: rows.shape[0], :cols] = rows
        values = padded.view(BLOCK, -1, BLOCK).transpose(0, 1).reshape(-1, BLOCK * BLOCK)[:, order]
        size, part = packs[format](values)
        sizes.append(size)
        parts.append(part)
    size = torch.cat(sizes) if sizes else torch.zeros(0, dtype=torch.int64, device=w.device)
    offsets, _ = _offsets(size // 16)
    blocks = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.uint8, device=w.device)
    return blocks, offsets, int(size.max()) if size.numel() else 0


def _fragment_order(device: torch.device) -> torch.Tensor:
    """Place in a block [64 outputs, 64 columns] of each value, fragments r-major, by lane, register, half."""
    import torch

    axes = (torch.arange(n, device="cpu") for n in (4, 4, 8, 4, 4, 2))
    r, s, g, t, i, j = torch.meshgrid(*axes, indexing="ij")
    output = 16 * r + g + 8 * (i % 2)
    column = 16 * t + 4 * s + 2 * (i // 2) + j
    return (output * BLOCK + column).reshape(-1).to(device)


def _pack_bitmap(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sizes in bytes, and blocks, of values [blocks, 4096] in fragment order."""
    import torch

    count = values.shape[0]
    item = values.element_size()
    present = values != 0
    # [r, s / 2, s % 2, lane, register, value]: a byte for each of s / 2, value, a bit for s % 2, register.
    bits = present.view(count, 4, 2, 2, 32, 4, 2).permute(0, 4, 1, 2, 6, 3, 5).reshape(-1, 8).to(torch.uint8)
    bits <<= torch.arange(8, dtype=torch.uint8, device=values.device)
    masks = bits.sum(-1, dtype=torch.uint8).view(count, MASK_BYTES)
    if item == 1:
        return _behind_masks(masks, present, values, 16)

    def registers_apart(t: torch.Tensor) -> torch.Tensor:  # 0 and 1 of all lanes, then 2 and 3
        return t.view(count, 16, 32, 2, 4).transpose(2, 3).reshape(count, BLOCK * BLOCK)

    return _behind_masks(masks, registers_apart(present), registers_apart(values.view(torch.int16)), 32)


def _pack_pairs(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for pairs of values."""
    import torch

    count = values.shape[0]
    values = torch.where(values == 0, 0, values)  # -0.0
    words = values.contiguous().view(torch.int32)
    present = words != 0
    # [r / 2, r % 2, s / 2, s % 2, lane, register]: a byte for each r % 2, s / 2, a bit for s % 2, register.
    bits = present.view(count, 2, 2, 2, 2, 32, 4).permute(0, 5, 1, 2, 3, 4, 6).reshape(-1, 8).to(torch.uint8)
    bits <<= torch.arange(8, dtype=torch.uint8, device=values.device)
    return _behind_masks(bits.sum(-1, dtype=torch.uint8).view(count, MASK_BYTES // 2), present, words, 16)


def _behind_masks(
    masks: torch.Tensor, present: torch.Tensor, values: torch.Tensor, parts: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sizes and blocks: masks, where `parts` of the values begin, those of [blocks, n] that are present."""
    import torch

    count, item = values.shape[0], values.element_size()
    header = masks.shape[1] + 2 * parts
    of_parts = present.view(count, parts, present.shape[1] // parts).sum(-1)
    starts = ((torch.cumsum(of_parts, 1) - of_parts) * item).to(torch.int16).view(torch.uint8)
    found = of_parts.sum(-1)
    size = header + (found * item + 15) // 16 * 16
    begin = torch.cumsum(size, 0) - size
    out = torch.zeros(int(size.sum()), dtype=torch.uint8, device=values.device)
    columns = torch.arange(header, device=values.device)
    out[(begin[:, None] + columns).reshape(-1)] = torch.cat([masks, starts], 1).reshape(-1)
    # Value n of a block goes to place n behind its header.
    rank = torch.arange(int(found.sum()), device=values.device)
    rank -= torch.repeat_interleave(torch.cumsum(found, 0) - found, found)
    at = torch.repeat_interleave((begin + header) // item, found) + rank
    out.view(values.dtype)[at] = values[present]
    return size, out


def _pack_dense(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for all values, int8."""
    import torch

    count = values.shape[0]
    parts = values.view(count, 4, 2, 2, 32, 8).permute(0, 1, 2, 4, 3, 5)
    size = torch.full((count,), BLOCK * BLOCK, device=values.device)
    return size, parts.reshape(-1).view(torch.uint8)
