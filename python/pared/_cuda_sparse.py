"""Unstructured sparse linear weights on CUDA devices: packing, shares of equal work, and what is checked
before a kernel runs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from pared._cuda_weight import KernelWeight, Place, address, dtype_name, float_dtypes, workspace
from pared.ops._device import DeviceWeight

if TYPE_CHECKING:
    import torch

# csrc/cuda/csr_plan.h
FOUR = 4  # entries that are loaded together
GROUP, WARPS = 64, 16  # rows whose order balances warps; warps of a block of threads
THREADS = 32 * WARPS
INDEX_SLOTS = 1 << 16
REACH, LAST_REACH = 31, 63  # slots that the first two and the last step of a near four span
BANKS = 8  # of 16 bytes in shared memory: the activations of a column at eight tokens of 16 bits
SUMS = 128  # rows times warps that share one, of an item
ITEMS_PER_MULTIPROCESSOR = 4
MOST_FOURS = (1 << 32) - (1 << 14)  # kernels count them in 32 bits, and some steps ahead
# Bytes of a column's activations, and tokens, between which near columns cost more in bank conflicts of the
# product of few tokens than they save in bytes: by the conflicts counted in the emulator, not by measurement.
NEAR_BYTES, GATHER_TOKENS = 8, 32


def work_items(row_fours: NDArray[np.int64], multiprocessors: int, ahead: int = 4) -> NDArray[np.int32]:
    """Items ``(first row, end, lanes of a row)`` for rows of so many fours, the heaviest first.

    A lane loads `ahead` fours together. Items hold whole consecutive rows of about equal work. A row costs
    at least one step of a few lanes, so that many empty rows are work as well.
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
    # Lanes take `ahead` fours each of an average row, as long as all threads have a row.
    wanted = np.maximum(work / np.maximum(1, rows) / ahead, THREADS / np.maximum(1, rows) / 2)
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


def _slots(block_cols: int) -> int:
    """Of a panel of so many columns; csr_plan.h says why they are more."""
    return block_cols + -(-block_cols // REACH)


def _near_words(slot: torch.Tensor, first: torch.Tensor, slots: int) -> torch.Tensor:
    """Near columns, [fours] int32.

    Parameters
    ----------
    slot : [fours, 4], within the block, -1 where a four has no more entries; they get the next slot of zeros
        here.
    first : [fours], slot 0 of the block in its range.
    """
    import torch

    for j in range(1, FOUR):
        zeros = (slot[:, j - 1] | REACH).clamp(max=slots - 1)
        slot[:, j] = torch.where(slot[:, j] < 0, zeros, slot[:, j])
    a, b, c = slot.diff(dim=1).unbind(1)
    word = slot[:, 0] + first | a << 16 | (c & 7) << 21 | b << 24 | c >> 3 << 29
    return word.to(torch.int32)


def _near_positions(segment: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
    """The position, 0 to 3, of each entry in its four, where fours are filled one after the other and end
    where the next entry is beyond reach.

    Parameters
    ----------
    segment, slot : [n], int64, of each entry, ordered by segment, then slot.

    Returns
    -------
    [n], int64; a segment begins with 0.
    """
    import torch

    # An entry turns the position of the one before into its own: a map of four states, two bits each. All
    # prefixes of the maps' compositions, in as many steps as the longest segment's length has bits.
    step = slot.diff(prepend=slot[:1])
    maps = torch.zeros_like(step, dtype=torch.uint8)
    for position, reach in enumerate((REACH, REACH, LAST_REACH)):
        maps |= (step <= reach).to(torch.uint8) * (position + 1 << 2 * position)
    begins = torch.ones_like(segment, dtype=torch.bool)
    begins[1:] = segment[1:] != segment[:-1]
    maps[begins] = 0
    longest = int(torch.bincount(torch.cumsum(begins, 0)).max()) if segment.numel() else 0
    distance = 1
    while distance < longest:
        earlier, later = maps[:-distance], maps[distance:]
        both = torch.zeros_like(later)
        for position in range(FOUR):
            between = earlier >> 2 * position & 3
            both |= (later >> 2 * between & 3) << 2 * position
        maps = torch.cat([maps[:distance], both])
        distance *= 2
    return (maps & 3).long()


@dataclass(frozen=True)
class DeviceCSR(KernelWeight):
    """An unstructured sparse weight in a device's memory; csrc/cuda/csr_plan.h has the layout.

    Attributes
    ----------
    values : [fours + 1, 4], float32, float16 or bfloat16.
    columns : wide: [fours + 1, 4], int16; near: [fours + 1], int32 (unsigned in the kernels).
    starts : [out * blocks + 1], int32 (uint32), in fours.
    items, order : who does what; see `work_items`, `row_order`.
    near : which way the columns are kept.
    block_cols : columns of a block.
    shape : (out, in).
    nnz : non-zeros.
    """

    values: torch.Tensor
    columns: torch.Tensor
    starts: torch.Tensor
    items: torch.Tensor
    order: torch.Tensor
    near: bool
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
        near: bool | None = None,
        place: Place | None = None,
    ) -> DeviceCSR:
        """Pack entries ordered by row, then column, on their device.

        Parameters
        ----------
        rows, cols : [n], int64.
        values : [n], float32, float16 or bfloat16.
        shape : (out, in).
        near : which way to keep the columns; None for that of fewer bytes.
        place : the device; None for that of `values`.
        """
        import torch

        at = place or Place.of(values)
        k, device, size = at.kernels, values.device, values.element_size()
        outputs, inputs = shape
        block_cols: int = k.csr_block_cols(max(1, inputs), k.shared_limit(at.device))
        slots = _slots(block_cols)
        blocks, per_range = -(-inputs // block_cols), INDEX_SLOTS // slots
        block = cols // block_cols
        within = cols - block * block_cols
        slot = within + within // REACH
        segment = rows * blocks + block
        fours = (torch.bincount(segment, minlength=outputs * blocks) + FOUR - 1) // FOUR
        if near is not False:
            position = _near_positions(segment, slot)
            others = torch.bincount(segment[position == 0], minlength=outputs * blocks)
            less = int(others.sum()) * (FOUR * size + 4) < int(fours.sum()) * (FOUR * size + 8)
            near = less if near is None else near
            fours = others if near else fours
        starts = torch.zeros(outputs * blocks + 1, dtype=torch.int64, device=device)
        torch.cumsum(fours, 0, out=starts[1:])
        total = int(starts[-1])
        if total >= MOST_FOURS:
            raise ValueError(f"weight: expected fewer than 2**34 - 2**16 non-zeros, got {values.numel()}")
        row_fours = (
            (starts[blocks::blocks] - starts[:-1:blocks]).cpu().numpy() if blocks else np.zeros(outputs)
        )
        if near:
            to = FOUR * (torch.cumsum(position == 0, 0) - 1) + position
        else:
            to = _places(segment, (block % per_range * slots + slot) % BANKS, starts)
        packed = torch.zeros((total + 1) * FOUR, dtype=values.dtype, device=device)
        packed[to] = values
        # What no entry takes points to a slot of zeros: the block's last, or the next one.
        of_four = torch.full((total + 1, FOUR), slots - 1, dtype=torch.int64, device=device)
        if near:
            of_four[:total] = -1
        of_four.view(-1)[to] = slot
        first = torch.zeros(total + 1, dtype=torch.int64, device=device)  # slot of the block, in its range
        each = torch.arange(outputs * blocks, device=device) % max(1, blocks) % per_range * slots
        first[:total] = torch.repeat_interleave(each, fours)
        numbers = row_fours.astype(np.int64)
        items = work_items(numbers, k.multiprocessors(at.device), ahead=8 if near and size == 2 else 4)
        return cls(
            packed.view(-1, FOUR),
            _near_words(of_four, first, slots) if near else (of_four + first[:, None]).to(torch.int16),
            starts.to(torch.int32),
            torch.from_numpy(items).to(device),
            torch.from_numpy(row_order(numbers)).to(device),
            bool(near),
            block_cols,
            (outputs, inputs),
            values.numel(),
        )

    @classmethod
    def from_dense(
        cls, weight: torch.Tensor, *, near: bool | None = None, place: Place | None = None
    ) -> DeviceCSR:
        """The non-zeros of a weight [out, in], on its device; -0.0 is a zero. See `from_entries`.

        Raises
        ------
        TypeError, ValueError : another dtype than float32, float16 or bfloat16, or not two dimensions.
        """
        _check_dtype("weight", weight)
        if weight.ndim != 2:
            raise ValueError(f"weight: expected [out, in], got shape {list(weight.shape)}")
        w = weight.detach()
        rows, cols = (w != 0).nonzero(as_tuple=True)
        shape = (w.shape[0], w.shape[1])
        return cls.from_entries(rows, cols, w[rows, cols], shape, near=near, place=place)

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

    def _entries(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows, columns, values, of what is stored but the padding, in the order of rows and columns."""
        import torch

        inputs, slots = self.shape[1], _slots(self.block_cols)
        blocks, per_range = -(-inputs // self.block_cols), INDEX_SLOTS // slots
        starts = self.starts.long().bitwise_and(0xFFFFFFFF)
        mine = slice(int(starts[0]), int(starts[-1]))  # others are a part of the same memory after a `join`
        if self.near:
            word = self.columns[mine].long().bitwise_and(0xFFFFFFFF)
            last = (word >> 21 & 7) + (word >> 29 << 3)
            slot = torch.stack([word & 0xFFFF, word >> 16 & 31, word >> 24 & 31, last], 1).cumsum(1)
        else:
            slot = self.columns[mine].long().bitwise_and(0xFFFF)
        fours = starts.diff()
        segment = torch.repeat_interleave(torch.arange(fours.numel(), device=self.device), fours)[:, None]
        block = segment % max(1, blocks)
        slot = slot - block % per_range * slots
        real = (slot % (REACH + 1) != REACH) & (slot != slots - 1)
        rows = (segment // max(1, blocks)).expand_as(slot)[real]
        cols = (block * self.block_cols + slot - slot // (REACH + 1))[real]
        order = torch.argsort(rows * inputs + cols)
        return rows[order], cols[order], self.values[mine][real][order]

    def to_dense(self) -> torch.Tensor:
        """The weight [out, in]."""
        import torch

        out = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        rows, cols, values = self._entries()
        out[rows, cols] = values
        return out

    def tuned(self, tokens: int) -> DeviceCSR:
        """This weight, its columns kept the way that suits calls of so many tokens."""
        many = tokens * self.values.element_size() > NEAR_BYTES and tokens <= GATHER_TOKENS
        if not (self.near and many):
            return self
        return DeviceCSR.from_entries(*self._entries(), self.shape, near=False)

    def joins(self, other: DeviceWeight) -> bool:
        return (
            isinstance(other, DeviceCSR)
            and (other.dtype, other.shape[1], other.near, other.block_cols)
            == (self.dtype, self.shape[1], self.near, self.block_cols)
            and other.values.device == self.values.device
        )

    def join(self, *others: DeviceWeight) -> tuple[DeviceWeight, list[DeviceWeight]]:
        import torch

        weights = [self, *(cast(DeviceCSR, w) for w in others)]
        entries = [w._entries() for w in weights]
        ends = np.cumsum([w.shape[0] for w in weights]).tolist()
        rows = torch.cat([e[0] + end - w.shape[0] for e, end, w in zip(entries, ends, weights, strict=True)])
        cols, values = (torch.cat([e[i] for e in entries]) for i in (1, 2))
        whole = DeviceCSR.from_entries(rows, cols, values, (ends[-1], self.shape[1]), near=self.near)
        blocks = -(-self.shape[1] // self.block_cols)
        parts: list[DeviceWeight] = []
        for w, end in zip(weights, ends, strict=True):
            starts = whole.starts[(end - w.shape[0]) * blocks : end * blocks + 1]
            parts.append(dataclasses.replace(w, values=whole.values, columns=whole.columns, starts=starts))
        return whole, parts

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
                self.near,
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
