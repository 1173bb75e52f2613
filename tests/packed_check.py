"""The header of packed weights (csrc/formats/packed.h), read and written by a second implementation."""

from __future__ import annotations

import numpy as np

# csrc/formats/packed.h, version 2.
HEADER = np.dtype(
    [
        ("magic", "S8"),
        *((name, "u2") for name in ("kind", "version")),
        *((name, "u1") for name in ("dtype", "entry_rows")),
        ("reserved", "2u1"),
        ("bytes", "u8"),
        *((name, "i8") for name in ("rows", "cols", "nnz", "entries")),
        *((name, "i4") for name in ("channels", "kh", "kw", "groups")),
        *((name, "u4") for name in ("tile", "block_k")),
        *((name, "u8") for name in ("starts_at", "counts_at", "values_at", "offsets_at", "checksum")),
    ]
)
_BFLOAT16 = 2  # csrc/core/dtype.h


def aligned_copy(packed: np.ndarray, extra: int = 0) -> np.ndarray:
    """A writable copy at a 64-byte boundary, `extra` bytes longer."""
    room = np.zeros(packed.size + extra + 64, np.uint8)
    at = -room.ctypes.data % 64
    out = room[at : at + packed.size + extra]
    out[: packed.size] = packed
    return out


def header(packed: np.ndarray) -> np.ndarray:
    return packed[: HEADER.itemsize].view(HEADER)[0]


def checksum(packed: np.ndarray) -> int:
    """Second implementation of the header's checksum."""
    data = packed.copy()
    data[: HEADER.itemsize].view(HEADER)[0]["checksum"] = 0
    value, mask = 0xCBF29CE484222325, (1 << 64) - 1
    for word in data.view(np.uint64).tolist():
        value = ((value ^ word) * 0x100000001B3) & mask
        value ^= value >> 29
    return value


def to_bfloat16(w: np.ndarray) -> np.ndarray:
    """float32 numbers cut to what bfloat16 holds; numpy has no such type."""
    return (w.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def bitmap_bfloat16(w: np.ndarray, like: np.ndarray) -> np.ndarray:
    """Second implementation of csrc/formats/bitmap.h for bfloat16: `w` [rows, cols] from `to_bfloat16`, and
    `like`, the packed bytes of the same weight in float32."""
    groups, vectors = -(-w.shape[0] // 16), -(-w.shape[1] // 8) * 4
    block, in_pass = 256, 32
    full = np.zeros((16 * groups, 2 * vectors), np.float32)
    full[: w.shape[0], : w.shape[1]] = np.where(np.abs(w) < np.finfo(np.float32).tiny, 0, w)
    # [group, vector, output, input of the pair]
    cells = full.reshape(groups, 16, vectors, 2).transpose(0, 2, 1, 3).reshape(groups, vectors, 32)
    starts, masks, values = [0], [], []
    for first in range(0, groups, in_pass):
        for begin in range(0, vectors, block):
            for g in range(first, min(first + in_pass, groups)):
                for lanes in cells[g, begin : begin + block]:
                    used = lanes != 0
                    masks.append(int(np.packbits(used, bitorder="little").view(np.uint32)[0]))
                    values.append((lanes[used].view(np.uint32) >> 16).astype(np.uint16))
                starts.append(sum(v.size for v in values))
    parts = [
        np.array(starts, np.uint32).view(np.uint8),
        np.array(masks, np.uint32).view(np.uint8),
        np.concatenate([np.zeros(0, np.uint16), *values]).view(np.uint8),
    ]
    h = header(like).copy()
    at = -(-HEADER.itemsize // 64) * 64
    for name, part, slack in zip(("starts_at", "counts_at", "values_at"), parts, (0, 0, 64), strict=True):
        h[name] = at
        at = -(-(at + part.size + slack) // 64) * 64
    h["dtype"], h["block_k"], h["bytes"] = _BFLOAT16, block, at
    out = aligned_copy(np.zeros(at, np.uint8))
    for name, part in zip(("starts_at", "counts_at", "values_at"), parts, strict=True):
        out[int(h[name]) : int(h[name]) + part.size] = part
    out[: HEADER.itemsize].view(HEADER)[0] = h
    header(out)["checksum"] = checksum(out)
    return out
