"""Unstructured sparse linear weights on CUDA devices: packing, shares of equal work, and what is checked
before a kernel runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pared._cuda_weight import KernelWeight, Place, address, dtype_name, float_dtypes, workspace

if TYPE_CHECKING:
    import torch

# csrc/cuda/csr_plan.h
FOUR = 4  # entries that are loaded together
GROUP, WARPS = 64, 16  # rows whose order balances warps; warps of a block of threads
THREADS = 32 * WARPS
INDEX_SLOTS = 1 << 16
BANKS = 8  # of 16 bytes in shared memory: the activations of a column at eight tokens of 16 bits
SUMS = 128  # rows times warps that share one, of an item
ITEMS_PER_MULTIPROCESSOR = 4
MOST_FOURS = (1 << 32) - (1 << 14)  # kernels count them in 32 bits, and some steps ahead


def work_items(row_fours: NDArray[np.int64], multiprocessors: int) -> NDArray[np.int32]:
    """Items ``(first row, end, lanes of a row)`` for rows of so many fours, the heaviest first.

    Items hold whole consecutive rows of about equal work. A row costs at least one step of a few lanes, so
    that many empty rows are work as well.
    """
    n = row_fours.size
    if n == 0:
        return np.zeros((0, 3), np.int32)
    cost = np.maximum(row_fours, 4)
    total = int(cost.sum())
    share = max(64, -(-total // max(1, ITEMS_PER_MULTIPROCESSOR * multiprocessors)))
    # A row belongs to the share in which its middle lies.
    number = (np.cumsum(cost) - (cost + 1) // 2) // share
    cuts = np.flatnonzero(np.diff(number)) + 1
    begin = np.concatenate([[0], cuts])
    end = np.concatenate([cuts, [n]])
    parts = -(-(end - begin) // SUMS)
    item = np.repeat(np.arange(begin.size), parts)
    part = np.arange(item.size) - np.repeat(np.cumsum(parts) - parts, parts)
    size = (end - begin)[item]
    first = begin[item] + size * part // parts[item]
    last = begin[item] + size * (part + 1) // parts[item]
    sums = np.concatenate([[0], np.cumsum(row_fours)])
    work = sums[last] - sums[first]
    rows = last - first
    # Lanes take four fours each of an average row, which are loaded together, as long as all threads have a
    # row.
    wanted = np.maximum(work / np.maximum(1, rows) / 4, THREADS / np.maximum(1, rows) / 2)
    lanes = 2 ** np.clip(np.ceil(np.log2(np.maximum(wanted, 1))), 2, np.log2(THREADS)).astype(np.int64)
    # Sums of a row that several warps share take a place each.
    while (too_many := rows * np.maximum(1, lanes // 32) > SUMS).any():
        lanes[too_many] //= 2
    items = np.stack([first, last, lanes], axis=1).astype(np.int32)
    return np.ascontiguousarray(items[np.argsort(-work, kind="stable")])


def row_order(row_fours: NDArray[np.int64]) -> NDArray[np.int32]:
    """The rows of each group of 64, dealt to 16 warps by length so that their shares are about equal; -1
    behind the last row."""
    n = row_fours.size
    groups = -(-n // GROUP)
    padded = np.full(groups * GROUP, -1, np.int64)
    padded[:n] = row_fours
    by_length = np.argsort(-padded.reshape(groups, GROUP), axis=1, kind="stable")
    # The longest 16 in order, the next 16 backwards, and so on.
    rank = np.arange(GROUP).reshape(GROUP // WARPS, WARPS)
    rank[1::2] = rank[1::2, ::-1].copy()
    order = by_length[:, rank.T.reshape(-1)] + GROUP * np.arange(groups)[:, None]
    return np.where(order < n, order, -1).astype(np.int32).reshape(-1)


def _places(segment: torch.Tensor, bank: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """Where entries lie among the fours, so that those which neighbouring lanes take at a time are in as many
    banks as can be: value j of four f asks for bank ``(f + 2 j) % BANKS``.

    Parameters
    ----------
    segment, bank : [n], int64, of each entry, ordered by segment.
    starts : [segments + 1], int64, in fours.

    Returns
    -------
    [n], int64, without a place twice; what a bank has too many of takes what others leave.
    """
    import torch

    def rank(group: torch.Tensor) -> torch.Tensor:
        """The entries before each in its group; groups are consecutive."""
        at = torch.arange(group.numel(), device=group.device)
        first = torch.ones_like(group, dtype=torch.bool)
        first[1:] = group[1:] != group[:-1]
        return at - at[first][torch.cumsum(first, 0) - 1]

    size = starts.diff()
    by_bank = torch.argsort(segment * BANKS + bank, stable=True)
    segment, bank = segment[by_bank], bank[by_bank]
    number = rank(segment * BANKS + bank)
    begin, length = starts[segment], size[segment]
    # Of each segment's places, those of value 0 of all fours first, then those of value 1, ...
    place = torch.full_like(segment, -1)
    left = number.clone()
    for j in range(FOUR):
        first = (bank - 2 * j - begin) % BANKS
        count = (length - first + BANKS - 1).clamp(min=0) // BANKS
        here = (left >= 0) & (left < count)
        place[here] = (j * length + first + BANKS * left)[here]
        left -= count
    place = torch.where(place < 0, place, FOUR * begin + place)
    # The others: one of each bank, then the second of each, ...
    over = (place < 0).nonzero()[:, 0]
    over = over[torch.argsort((segment * INDEX_SLOTS + number)[over], stable=True)]
    free = torch.ones(FOUR * int(starts[-1]), dtype=torch.bool, device=place.device)
    free[place[place >= 0]] = False
    before = torch.cumsum(free, 0) - free.to(torch.int64)
    place[over] = free.nonzero()[:, 0][before[FOUR * begin[over]] + rank(segment[over])]
    within = place - FOUR * begin
    to = torch.empty_like(place)
    to[by_bank] = FOUR * (begin + within % length) + within // length
    return to


@dataclass(frozen=True)
class DeviceCSR(KernelWeight):
    """An unstructured sparse weight in a device's memory; csrc/cuda/csr_plan.h has the layout.

    Attributes
    ----------
    values : [fours + 1, 4], float32, float16 or bfloat16.
    columns : [fours + 1, 4], slots as int16 (uint16 in the kernels).
    starts : [out * blocks + 1], int32 (uint32), in fours.
    items, order : who does what; see `work_items`, `row_order`.
    block_cols : columns of a block.
    shape : (out, in).
    nnz : non-zeros.
    """

    values: torch.Tensor
    columns: torch.Tensor
    starts: torch.Tensor
    items: torch.Tensor
    order: torch.Tensor
    block_cols: int
    shape: tuple[int, int]
    nnz: int

    @classmethod
    def from_entries(
        cls,
        rows: torch.Tensor,
        cols: torch.Tensor,
        values: torch.Tensor,
        shape: tuple[int, int],
        *,
        place: Place | None = None,
    ) -> DeviceCSR:
        """Pack entries ordered by row, then column, on their device.

        Parameters
        ----------
        rows, cols : [n], int64.
        values : [n], float32, float16 or bfloat16.
        shape : (out, in).
        place : the device; None for that of `values`.
        """
        import torch

        at = place or Place.of(values)
        k, device = at.kernels, values.device
        outputs, inputs = shape
        block_cols: int = k.csr_block_cols(max(1, inputs), k.shared_limit(at.device))
        slots = block_cols + 1
        blocks, per_range = -(-inputs // block_cols), INDEX_SLOTS // slots
        block = cols // block_cols
        segment = rows * blocks + block
        count = torch.bincount(segment, minlength=outputs * blocks)
        fours = (count + FOUR - 1) // FOUR
        starts = torch.zeros(outputs * blocks + 1, dtype=torch.int64, device=device)
        torch.cumsum(fours, 0, out=starts[1:])
        total = int(starts[-1])
        if total >= MOST_FOURS:
            raise ValueError(f"weight: expected fewer than 2**34 - 2**16 non-zeros, got {values.numel()}")
        row_fours = (
            (starts[blocks::blocks] - starts[:-1:blocks]).cpu().numpy() if blocks else np.zeros(outputs)
        )
        # Padding points to the slot of zeros behind its block's columns.
        of_four = torch.repeat_interleave(torch.arange(outputs * blocks, device=device), fours)
        pads = of_four % max(1, blocks) % per_range * slots + block_cols
        slot = torch.full((total + 1, FOUR), block_cols, dtype=torch.int64, device=device)
        slot[:total] = pads[:, None]
        packed = torch.zeros((total + 1) * FOUR, dtype=values.dtype, device=device)
        own = block % per_range * slots + cols - block * block_cols
        to = _places(segment, own % BANKS, starts)
        packed[to] = values
        slot.view(-1)[to] = own
        numbers = row_fours.astype(np.int64)
        return cls(
            packed.view(-1, FOUR),
            slot.to(torch.int16),
            starts.to(torch.int32),
            torch.from_numpy(work_items(numbers, k.multiprocessors(at.device))).to(device),
            torch.from_numpy(row_order(numbers)).to(device),
            block_cols,
            (outputs, inputs),
            values.numel(),
        )

    @classmethod
    def from_dense(cls, weight: torch.Tensor, *, place: Place | None = None) -> DeviceCSR:
        """The non-zeros of a weight [out, in], on its device; -0.0 is a zero.

        Raises
        ------
        TypeError, ValueError : another dtype than float32, float16 or bfloat16, or not two dimensions.
        """
        _check_dtype("weight", weight)
        if weight.ndim != 2:
            raise ValueError(f"weight: expected [out, in], got shape {list(weight.shape)}")
        w = weight.detach()
        rows, cols = (w != 0).nonzero(as_tuple=True)
        return cls.from_entries(rows, cols, w[rows, cols], (w.shape[0], w.shape[1]), place=place)

    @classmethod
    def from_csr(cls, weight: torch.Tensor, *, place: Place | None = None) -> DeviceCSR:
        """Take over a ``torch.sparse_csr`` matrix of float32, float16 or bfloat16.

        Raises
        ------
        TypeError : another layout or dtype.
        """
        import torch

        if not isinstance(weight, torch.Tensor) or weight.layout != torch.sparse_csr or weight.ndim != 2:
            got = weight.layout if isinstance(weight, torch.Tensor) else type(weight).__name__
            raise TypeError(f"weight: expected a torch.sparse_csr matrix, got {got}")
        values = weight.values().detach()
        _check_dtype("weight", values)
        counts = weight.crow_indices().diff()
        rows = torch.repeat_interleave(torch.arange(counts.numel(), device=values.device), counts)
        kept = values != 0
        cols, shape = weight.col_indices().long(), (weight.shape[0], weight.shape[1])
        return cls.from_entries(rows[kept], cols[kept], values[kept], shape, place=place)

    @property
    def dtype(self) -> torch.dtype:
        """Of the values and of the activations."""
        return self.values.dtype

    @property
    def sparsity(self) -> float:
        """Share of zeros, 0 to 1."""
        total = self.shape[0] * self.shape[1]
        return 1.0 - self.nnz / total if total else 0.0

    def to_dense(self) -> torch.Tensor:
        """The weight [out, in]."""
        import torch

        (outputs, inputs), slots = self.shape, self.block_cols + 1
        blocks, per_range = -(-inputs // self.block_cols), INDEX_SLOTS // slots
        out = torch.zeros(outputs, inputs, dtype=self.dtype, device=self.device)
        fours = self.starts.long().bitwise_and(0xFFFFFFFF).diff()
        segment = torch.repeat_interleave(torch.arange(fours.numel(), device=self.device), fours)[:, None]
        slot = self.columns[:-1].long().bitwise_and(0xFFFF)
        block = segment % max(1, blocks)
        col = block * self.block_cols + slot - block % per_range * slots
        real = slot % slots != self.block_cols
        out[(segment // max(1, blocks)).expand_as(col)[real], col[real]] = self.values[:-1][real]
        return out

    def _like(self) -> torch.Tensor:
        return self.values

    def _multiply(
        self,
        place: Place | None,
        rows: torch.Tensor,
        bias: torch.Tensor | None,
        activation: str | None,
        few: int = -1,
    ) -> torch.Tensor:
        """few: tokens up to which the weight is read once for each eight of them; more share panels of
        activations. Below 0: a choice by size."""
        import torch

        at = place or Place.of(rows)
        outputs, cols = self.shape
        tokens = rows.shape[0]
        out = torch.empty((tokens, outputs), dtype=rows.dtype, device=rows.device)
        count = self.items.shape[0]
        plan = at.kernels.plan_csr(
            tokens,
            outputs,
            cols,
            self.block_cols,
            rows.element_size(),
            count,
            at.kernels.multiprocessors(at.device),
            at.kernels.shared_limit(at.device),
            few,
        )
        needed: int = plan["workspace_bytes"]
        memory = workspace(needed, rows)
        at.kernels.csr_product(
            (
                self.values.data_ptr(),
                self.columns.data_ptr(),
                self.starts.data_ptr(),
                dtype_name(self.dtype),
                self.block_cols,
                outputs,
                cols,
                self.items.data_ptr(),
                count,
                self.order.data_ptr(),
            ),
            rows.data_ptr(),
            tokens,
            rows.stride(0),
            address(bias),
            activation or "",
            out.data_ptr(),
            outputs,
            address(memory),
            needed,
            few,
            at.device,
            at.stream,
        )
        return out


def _check_dtype(name: str, t: Any) -> None:
    import torch

    if not isinstance(t, torch.Tensor) or t.dtype not in float_dtypes():
        got = t.dtype if isinstance(t, torch.Tensor) else type(t).__name__
        raise TypeError(f"{name}: expected dtype float32, float16 or bfloat16, got {got}")
