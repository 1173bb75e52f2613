"""The header of packed weights (csrc/formats/packed.h), read and written by a second implementation."""

from __future__ import annotations

import numpy as np

# csrc/formats/packed.h, version 1.
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
