"""Block-sparse linear weights on CUDA devices: packing, the list of work, and what is checked before a kernel
runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from torch.utils.weak import WeakIdKeyDictionary

from pared import _cuda
from pared._cuda_int8 import DYNAMIC, quantize
from pared._cuda_weight import (
    KernelWeight,
    Place,
    address,
    dtype_name,
    float_dtypes,
    require_device,
    workspace,
)

if TYPE_CHECKING:
    import torch

ROWS = (16, 32, 64, 128)
FEW_TOKENS, MANY_TOKENS = 16, 128  # rows of the two tiles; csrc/cuda/block_sparse.h


def work_items(counts: Sequence[int] | NDArray[np.int64], most: int) -> tuple[NDArray[np.int32], int]:
    """Items of at most `most` blocks for rows with these counts of blocks, and the slots that they need.

    A row without blocks has an item: its outputs are the bias. Parts of a row differ by one block at most.
    Largest first, so that what is left for the end is small.
    """
    n = np.asarray(counts, np.int64)
    first = np.cumsum(n) - n
    parts = np.maximum(1, -(-n // max(1, most)))
    row = np.repeat(np.arange(n.size), parts)
    part = np.arange(row.size) - np.repeat(np.cumsum(parts) - parts, parts)
    begin = first[row] + n[row] * part // parts[row]
    end = first[row] + n[row] * (part + 1) // parts[row]
    slots = np.where(parts > 1, parts, 0)
    slot = (np.cumsum(slots) - slots)[row]
    items = np.stack([row, begin, end, part, parts[row], slot], axis=1).astype(np.int32)
    order = np.argsort(begin - end, kind="stable")
    return np.ascontiguousarray(items[order]), int(slots.sum())


# Lists of work by the size of their items, of each weight by its columns: a weight that an operator puts
# together from its parts finds them again.
_items: WeakIdKeyDictionary = WeakIdKeyDictionary()


@dataclass(frozen=True)
class DeviceBlocks(KernelWeight):
    """A weight of blocks in a device's memory.

    Attributes
    ----------
    values : [blocks, R, C], float16, bfloat16 or int8.
    columns : [blocks], int32, the block's column, by rows of blocks.
    counts : blocks of each row of blocks, on the CPU.
    shape : (out, in).
    scales : float32 [out] of int8 values, else None.
    """

    values: torch.Tensor
    columns: torch.Tensor
    counts: tuple[int, ...]
    shape: tuple[int, int]
    scales: torch.Tensor | None

    @classmethod
    def from_dense(
        cls, weight: torch.Tensor, block: tuple[int, int], scales: torch.Tensor | None = None
    ) -> DeviceBlocks:
        """The blocks with a non-zero of a weight [out, in], on its device.

        Parameters
        ----------
        weight : float16 or bfloat16; or int8 with `scales`, float32 [out].
        block : outputs by inputs: 16, 32, 64 or 128 by a multiple of 16 bytes. Blocks may stand out of the
            matrix.

        Raises
        ------
        TypeError, ValueError : naming the argument, what was expected and what came.
        """
        import torch

        floats = (torch.float16, torch.bfloat16)
        wanted = (torch.int8,) if scales is not None else floats
        if not isinstance(weight, torch.Tensor) or weight.dtype not in wanted:
            got = weight.dtype if isinstance(weight, torch.Tensor) else type(weight).__name__
            names = "int8 with scales" if scales is not None else "float16 or bfloat16, or int8 with scales"
            raise TypeError(f"weight: expected dtype {names}, got {got}")
        if weight.ndim != 2:
            raise ValueError(f"weight: expected [out, in], got shape {list(weight.shape)}")
        r, c = block
        if r not in ROWS or c < 1 or c * weight.element_size() % 16:
            raise ValueError(
                f"block: expected 16, 32, 64 or 128 rows and columns of a multiple of 16 bytes, got {r}x{c}"
            )
        outputs, cols = weight.shape
        if scales is not None:
            if scales.shape != (outputs,):
                raise ValueError(f"scales: expected [{outputs}], got {list(scales.shape)}")
            require_device("scales", scales, weight)
            scales = scales.float().contiguous()
        rows, across = -(-outputs // r), -(-cols // c)
        padded = weight.detach()
        if (rows * r, across * c) != (outputs, cols):
            padded = torch.zeros(rows * r, across * c, dtype=weight.dtype, device=weight.device)
            padded[:outputs, :cols] = weight.detach()
        blocks = padded.view(rows, r, across, c).transpose(1, 2)
        kept = (blocks != 0).any(-1).any(-1)
        columns = kept.nonzero()[:, 1].to(torch.int32)
        counts = tuple(kept.sum(1).tolist())
        return cls(blocks[kept].contiguous(), columns, counts, (outputs, cols), scales)

    @classmethod
    def found_in(cls, weight: torch.Tensor, scales: torch.Tensor | None = None) -> DeviceBlocks:
        """`from_dense` with the largest square blocks that store at most 5 % more than those of 16 x 16."""
        found = cls.from_dense(weight, (16, 16), scales)
        least = found.values.numel()
        for size in ROWS[1:]:
            larger = cls.from_dense(weight, (size, size), scales)
            if larger.values.numel() <= 1.05 * least:
                found = larger
        return found

    @classmethod
    def from_bsr(cls, weight: torch.Tensor) -> DeviceBlocks:
        """Take over a ``torch.sparse_bsr`` tensor of float16 or bfloat16; the blocks keep their order.

        Raises
        ------
        TypeError, ValueError : another layout, dtype or size of block.
        """
        import torch

        if not isinstance(weight, torch.Tensor) or weight.layout != torch.sparse_bsr or weight.ndim != 2:
            got = weight.layout if isinstance(weight, torch.Tensor) else type(weight).__name__
            raise TypeError(f"weight: expected a torch.sparse_bsr matrix, got {got}")
        values = weight.values().detach()
        _, r, c = values.shape
        if values.dtype not in (torch.float16, torch.bfloat16):
            raise TypeError(f"weight: expected dtype float16 or bfloat16, got {values.dtype}")
        if r not in ROWS or c * values.element_size() % 16:
            raise ValueError(
                f"weight: expected blocks of 16, 32, 64 or 128 rows and a multiple of 16 bytes, got {r}x{c}"
            )
        counts = tuple(weight.crow_indices().diff().tolist())
        shape = (weight.shape[0], weight.shape[1])
        return cls(values.contiguous(), weight.col_indices().to(torch.int32), counts, shape, None)

    @property
    def block(self) -> tuple[int, int]:
        """Outputs and inputs of a block."""
        return self.values.shape[1], self.values.shape[2]

    def to_dense(self) -> torch.Tensor:
        """The weight [out, in] as it was given: int8 without its scales."""
        import torch

        (r, c), (outputs, cols) = self.block, self.shape
        rows, across = -(-outputs // r), -(-cols // c)
        out = torch.zeros(rows, across, r, c, dtype=self.values.dtype, device=self.device)
        counts = torch.tensor(self.counts, device=self.device)
        row = torch.repeat_interleave(torch.arange(rows, device=self.device), counts)
        out[row, self.columns.long()] = self.values
        return out.transpose(1, 2).reshape(rows * r, across * c)[:outputs, :cols].contiguous()

    def items(self, most: int) -> tuple[torch.Tensor, int]:
        """`work_items` on the device. The first call for a size copies them there and waits: ``RuntimeError``
        while a CUDA graph is captured."""
        import torch

        known = _items.get(self.columns)  # type: ignore[no-untyped-call]
        if known is None:
            known = _items[self.columns] = {}
        found: tuple[torch.Tensor, int] | None = known.get(most)
        if found is None:
            if _cuda.capturing():
                raise RuntimeError(
                    "w: expected a product of as many tokens before a CUDA graph is captured: the first one "
                    "copies the weight's list of work to its device, and waits"
                )
            items, slots = work_items(self.counts, most)
            found = known[most] = torch.from_numpy(items).to(self.device), slots
        return found

    def _input_dtypes(self) -> tuple[torch.dtype, ...]:
        return float_dtypes() if self.scales is not None else (self.values.dtype,)

    def _like(self) -> torch.Tensor:
        return self.values

    def _multiply(
        self,
        place: Place | None,
        rows: torch.Tensor,
        bias: torch.Tensor | None,
        activation: str | None,
        most: int | None = None,
    ) -> torch.Tensor:
        """Activations of int8 weights are quantized by token. most: blocks an item of work; None for a
        choice by size."""
        import torch

        at = place or Place.of(rows)
        outputs, cols = self.shape
        tokens, dtype = rows.shape[0], rows.dtype
        out = torch.empty((tokens, outputs), dtype=dtype, device=rows.device)
        scales = None
        if self.scales is not None:
            rows, scales = quantize(at, rows, DYNAMIC)
        elif rows.data_ptr() % 16 or (tokens > 1 and rows.stride(0) % 8):
            rows = torch.nn.functional.pad(rows, (0, -cols % 8)).contiguous()
        if most is None:
            most = blocks_per_item(
                sum(self.counts), len(self.counts), tokens, at.kernels.multiprocessors(at.device)
            )
        items, slots = self.items(most)
        needed = at.kernels.block_sparse_workspace(tokens, slots, self.block[0])
        memory = workspace(needed, rows)
        at.kernels.block_sparse_product(
            (
                self.values.data_ptr(),
                self.columns.data_ptr(),
                dtype_name(self.values.dtype),
                *self.block,
                outputs,
                cols,
                self.values.shape[0],
            ),
            items.data_ptr(),
            items.shape[0],
            slots,
            rows.data_ptr(),
            tokens,
            rows.stride(0) if cols and tokens > 1 else 0,  # torch gives one row, or empty ones, any stride
            address(scales),
            address(self.scales),
            address(bias),
            activation or "",
            dtype_name(dtype),
            out.data_ptr(),
            outputs,
            address(memory),
            at.device,
            at.stream,
        )
        return out


def blocks_per_item(blocks: int, rows: int, tokens: int, multiprocessors: int) -> int:
    """How many blocks an item should have: two items a multiprocessor, but not fewer than four blocks.

    A power of two, so that few lists exist; without splits where the rows alone are enough items.
    """
    tile = FEW_TOKENS if tokens <= FEW_TOKENS else MANY_TOKENS
    tiles = -(-tokens // tile)
    wanted = max(1, 2 * multiprocessors // tiles)
    average = blocks / max(1, rows)
    if rows >= wanted and tiles > 1:
        wanted = rows  # rows far above the average are split all the same
    target = max(4.0, blocks / wanted, average if tiles > 1 else 0.0)
    return int(2 ** np.ceil(np.log2(target)))
