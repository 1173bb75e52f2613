"""How long a kernel will take: a small model over this machine's ceilings.

A time is a sum of terms, each the time that one thing would take at its ceiling (multiply-adds, panels
packed, tiles stored, weights moved, ...) or a number of cycles (entries read, ends of loops, calls), times
a coefficient of the kernel: how far from the ceiling it is. The ceilings are the machine's
(`pared._machine`); the coefficients were fitted to measurements by ``python -m bench.estimate fit`` and are
the same everywhere. The table of errors that goes with them is in ARCHITECTURE.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from pared._machine import ceilings

__all__ = ["COEFFICIENTS", "Facts", "Work", "estimate", "kernel_of", "terms"]

# The layout of the panels (csrc/formats/panel.h) and of the token blocks (csrc/ops).
_GROUP = 16  # positions in a vector, and rows in a row group
_ACCUMULATORS = 64 * 1024  # of one pass over the rows
_MOST_VECTORS = 8  # of a tile
_BATCH = 16  # tokens that share an expanded vector
_TOKENS = 6  # of the dense int8 micro-kernel
# Of quantized tokens: bytes of a block, where a weight is read and where it is expanded for each; tokens.
_BLOCK_BYTES, _EXPANDED_BLOCK_BYTES, _BLOCK_TOKENS, _INT4_TOKENS = 192 * 1024, 512 * 1024, 192, 96
# Elements from which a convolution's K blocks are deeper, and the units of one where they are strips
# (csrc/formats/csr.cc).
_DEEP = 1 << 20
_STRIP_UNITS, _DEEP_STRIP_UNITS = 150, 200
# Work below which the operations do not wake a second thread.
_PANEL_WORK, _EXPAND_WORK, _INT8_WORK, _INT4_WORK = 1 << 19, 1 << 15, 1 << 22, 1 << 19


def _ceil(a: float, b: float) -> int:
    return math.ceil(a / b)


@dataclass(frozen=True)
class Work:
    """What a packed weight makes a kernel do.

    Attributes
    ----------
    rows, cols : of the matrix; of a grouped convolution, the block-diagonal one.
    nnz : non-zeros.
    entries, entry_rows : of a panel format: what shares an offset, and its rows (1 or 4).
    nbytes : of the packed weight.
    taps : of a convolution; 0 for a linear weight.
    tile, block_k : positions and units of a block of a panel format.
    """

    rows: int
    cols: int
    nnz: int
    nbytes: int
    entries: int = 0
    entry_rows: int = 1
    taps: int = 0
    tile: int = 128
    block_k: int = 80


def _panel_bytes(rows: int, units: int, entries: int, entry_rows: int, block_k: int) -> int:
    groups, blocks = _ceil(rows, _GROUP), _ceil(units, block_k)
    return entries * (4 * entry_rows + 2) + groups * (2 * blocks * _GROUP // entry_rows + 4 * (blocks + 1))


@dataclass(frozen=True)
class Facts:
    """A dense weight, as far as its packed forms depend on it.

    Attributes
    ----------
    rows, cols : of the matrix; of a grouped convolution, the block-diagonal one.
    cells : elements of the dense weight.
    nnz : non-zeros.
    quads : blocks of four outputs by one input that hold any.
    words, word_quads : blocks of 1x4 and of 4x4; of a convolution, by four channels at one tap.
    taps : of a convolution; 0 for a linear weight.
    kernel_rows : of a convolution.
    element : bytes of a non-zero in a bitmap: 2 of a bfloat16 weight, else 4.
    """

    rows: int
    cols: int
    cells: int
    nnz: int
    quads: int
    words: int
    word_quads: int
    taps: int = 0
    kernel_rows: int = 0
    element: int = 4

    def work(self, kind: str) -> Work:
        """What the weight would make a kernel do, packed in a format with one packing."""
        rows, cols, nnz = self.rows, self.cols, self.nnz
        whole = _ceil(rows, _GROUP) * _GROUP * cols
        if kind in ("csr", "bsr", "dense"):
            entries = nnz if kind == "csr" else self.quads
            height = 1 if kind == "csr" else 4
            share = nnz / max(1, rows * cols)
            if self.taps > 0:
                deep = rows * cols >= _DEEP and share < 0.3
                tiling = (64, 256) if share < 0.04 else (128, 128 if deep or share < 0.14 else 80)
            else:
                tiling = (64, 128 if share >= 0.14 else 160 if share >= 0.06 else 256)
            if self.kernel_rows > 1 and self.taps <= 255:  # whole channels
                units = _DEEP_STRIP_UNITS if rows * cols >= _DEEP else _STRIP_UNITS
                tiling = (128, max(1, units // self.taps) * self.taps)
            if height == 4:
                wide = (64, 160 if share >= 0.4 else 192 if share >= 0.15 else 256)
                tiling = wide if self.taps == 0 else (96, 96)
            tile, block_k = tiling
            nbytes = _panel_bytes(rows, cols, entries, height, block_k)
            return Work(rows, cols, nnz, nbytes, entries, height, self.taps, tile, block_k)
        if kind == "bsr8":
            height = 4 if 28 * self.word_quads <= 8 * self.words else 1
            entries = self.word_quads if height == 4 else self.words
            tile, block_k = 64, 192
            if height == 1 and entries >= 0.15 * rows * _ceil(cols, 4):
                tile, block_k = 128, 64
            nbytes = _panel_bytes(rows, _ceil(cols, 4), entries, height, block_k)
            return Work(rows, cols, nnz, nbytes, entries, height, self.taps, tile, block_k)
        nbytes = {
            "bitmap": self.element * nnz + whole // 8,
            "bitmap8": nnz + whole // 8,
            "int8": whole,
            "int4": whole * 9 // 16,
        }[kind]
        return Work(rows, cols, nnz, nbytes, taps=self.taps)


# Seconds of each term for `n` positions: a kernel's terms and coefficients go together, in order.
Terms = tuple[float, ...]


def _threads(work: float, least: int, threads: int) -> int:
    return max(1, min(threads, int(work / least)))


# What memory gives to several threads grows less than their number.
_MEMORY_SHARE = 0.7
# Of the second and the last level, what a weight may find of itself when its turn comes again.
_KEPT = (0.5, 1 / 16)


class _Rates:
    """The ceilings of `parts` threads together."""

    def __init__(self, parts: int) -> None:
        c = ceilings()
        self.parts = parts
        self.fma, self.panel, self.dot8 = c.fma * parts, c.panel * parts, c.dot8 * parts
        self.pack, self.store, self.expand = c.pack * parts, c.store * parts, c.expand * parts
        self.l1_load, self.l1_store = c.levels[0].load * parts, c.levels[0].store * parts
        self.cycle = 1.0 / c.clock  # of a thread
        # A call, and waking other threads, in units of 5000 cycles.
        unit = 5000 * self.cycle
        self.fixed: Terms = (unit, unit if parts > 1 else 0.0)

    def move(self, nbytes: float) -> float:
        """Seconds to move something that lies where `nbytes` fit."""
        c = ceilings()
        level = c.level(nbytes)
        shared = level is c.levels[-1]
        rate = level.load * float(self.parts ** (_MEMORY_SHARE if shared else 1.0))
        return nbytes / rate

    def weight(self, nbytes: int, times: int) -> Terms:
        """Seconds to read a weight the first time, from where the other weights have left it, and the other
        times. Of a large one some comes from the second level, some from the last one, and the rest from
        memory.
        """
        levels = ceilings().levels
        outer = [
            max(0.0, nbytes - share * level.size) for level, share in zip(levels[1:], _KEPT, strict=False)
        ]
        last = outer[1] / (levels[3].load * self.parts**_MEMORY_SHARE)
        first = (nbytes / (levels[1].load * self.parts), outer[0] / (levels[2].load * self.parts), last)
        return (*first, (times - 1) * self.move(nbytes))


def _busy_lanes(n: int, entry_rows: int) -> int:
    """Positions that a panel product multiplies for `n` of them: the last vector of 16 is halved where that
    is enough, and quads take up to three positions with their rows in the lanes.
    """
    rest = n % _GROUP
    half = _GROUP // 2
    if rest == 0 or rest > half:
        return n - rest + (_GROUP if rest else 0)
    return n - rest + (min(4 * rest, half) if entry_rows > 1 else half)


def _panel(w: Work, n: int, threads: int, units: int, flops: float) -> tuple[_Rates, Terms]:
    """What every panel product does. `flops`: operations of an entry's row and position."""
    vectors = _ceil(n, _GROUP)
    full = w.tile // _GROUP
    tiles = _ceil(vectors, full)
    if w.entry_rows == 1 and full < _MOST_VECTORS and vectors % full == 1:  # goes with the last full tile
        tiles = max(1, tiles - 1)
    blocks = max(1, _ceil(units, w.block_k))
    groups = _ceil(w.rows, _GROUP)
    work = (w.entries * w.entry_rows + (4 + blocks) * _GROUP * groups) * vectors * _GROUP
    parts = _threads(work, _PANEL_WORK, threads)
    c = _Rates(parts)
    passes = _ceil(groups, max(1, _ACCUMULATORS // (_ceil(vectors, tiles) * _GROUP * _GROUP)))
    # Threads that share a tile pack it each for themselves.
    copies = passes * max(1.0, parts / tiles)
    positions = _busy_lanes(n, w.entry_rows)
    # What no vector unit makes faster is counted in cycles.
    cycle = c.cycle / c.parts
    ends = w.rows / w.entry_rows * blocks  # of loops: a row and K block each
    return (
        c,
        (
            w.entries * w.entry_rows * positions * flops,
            w.entries * tiles * cycle,
            ends * tiles * cycle,
            w.rows * blocks * positions * 4 / c.l1_load,
            units * positions * copies / c.pack,
            w.rows * positions / c.store,
            *c.weight(w.nbytes, tiles),
            c.move(4.0 * n * w.cols / max(1, w.taps)),
            c.move(4.0 * n * w.rows),
            *c.fixed,
        ),
    )


def _panel_f32(w: Work, n: int, threads: int) -> Terms:
    c, t = _panel(w, n, threads, w.cols, 2.0)
    return (t[0] / (c.panel if w.entry_rows == 1 else c.fma), *t[1:])


def _panel_s8(w: Work, n: int, threads: int) -> Terms:
    c, t = _panel(w, n, threads, _ceil(w.cols, 4), 8.0)
    return (t[0] / c.dot8, *t[1:], 4.0 * n * w.cols / c.l1_load)


def _bitmap(w: Work, n: int, threads: int) -> Terms:
    vectors = _ceil(w.rows, _GROUP) * w.cols
    batches = _ceil(n, _BATCH)
    parts = _threads(vectors * (4 * batches + n) / 5, _EXPAND_WORK, threads)
    c = _Rates(parts)
    return (
        batches * vectors / c.expand,
        *c.weight(w.nbytes, batches),
        vectors * n * 2.0 * _GROUP / c.fma,
        4.0 * n * (w.rows + w.cols) / c.l1_store,
        *c.fixed,
    )


def _blocks_of_tokens(w: Work, n: int, nbytes: int = _BLOCK_BYTES) -> int:
    return _ceil(n, min(max(nbytes // max(64, w.cols), _TOKENS), _BLOCK_TOKENS))


def _int8(w: Work, n: int, threads: int) -> Terms:
    vectors = _ceil(w.rows, _GROUP) * _ceil(w.cols, 4)
    parts = _threads(max(n, 4) * 64.0 * vectors, _INT8_WORK, threads)
    c = _Rates(parts)
    by_tokens = n >= 32 * parts
    return (
        vectors * n * 128.0 / c.dot8,
        vectors * 64.0 * _ceil(n, _TOKENS) / c.l1_load,
        *c.weight(w.nbytes, _blocks_of_tokens(w, n)),
        4.0 * n * w.cols / c.l1_load * (1 if by_tokens else parts),
        4.0 * n * w.rows / c.l1_store,
        *c.fixed,
    )


def _bitmap8_few(w: Work, n: int, threads: int) -> Terms:
    vectors = _ceil(w.rows, _GROUP) * _ceil(w.cols, 4)
    parts = _threads(vectors * (4 + n) / 5, _EXPAND_WORK, threads)
    c = _Rates(parts)
    return (
        vectors / c.expand,
        *c.weight(w.nbytes, 1)[:3],
        vectors * n * 128.0 / c.dot8,
        4.0 * n * w.cols / c.l1_load * parts,
        4.0 * n * w.rows / c.l1_store,
        *c.fixed,
    )


def _bitmap8_many(w: Work, n: int, threads: int) -> Terms:
    vectors = _ceil(w.rows, _GROUP) * _ceil(w.cols, 4)
    blocks = _blocks_of_tokens(w, n, _EXPANDED_BLOCK_BYTES)
    parts = _threads(vectors * (4 * blocks + n) / 5, _EXPAND_WORK, threads)
    c = _Rates(parts)
    return (
        blocks * vectors / c.expand,
        *c.weight(w.nbytes, blocks),
        vectors * n * 128.0 / c.dot8,
        vectors * 64.0 * _ceil(n, _TOKENS) / c.l1_load,
        4.0 * n * w.cols / c.l1_load * parts,
        4.0 * n * w.rows / c.l1_store,
        *c.fixed,
    )


def _int4(w: Work, n: int, threads: int) -> Terms:
    blocks = _ceil(n, min(max(_BLOCK_BYTES // max(1, w.cols), _TOKENS), _INT4_TOKENS))
    parts = _threads(w.nbytes * _ceil(n, 4), _INT4_WORK, threads)
    c = _Rates(parts)
    return (
        *c.weight(w.nbytes, blocks),
        2.0 * w.rows * w.cols * n / c.dot8,
        w.nbytes * _ceil(n, _TOKENS) / c.l1_load,
        # Quantizing the tokens: one thread does it where they are few.
        4.0 * n * w.cols / c.l1_load * (1 if n >= 32 * parts else parts),
        4.0 * n * w.rows / c.l1_store,
        *c.fixed,
    )


_TERMS: dict[str, Callable[[Work, int, int], Terms]] = {
    "csr": _panel_f32,
    "csr conv": _panel_f32,
    "quads": _panel_f32,
    "quads conv": _panel_f32,
    "words": _panel_s8,
    "words conv": _panel_s8,
    "word quads": _panel_s8,
    "word quads conv": _panel_s8,
    "bitmap": _bitmap,
    "int8": _int8,
    "int8 conv": _int8,
    "bitmap8 few": _bitmap8_few,
    "bitmap8 many": _bitmap8_many,
    "int4": _int4,
}

# Fitted by `python -m bench.estimate fit`; see there. Those in cycles were fitted in multiply-adds of that
# processor, 0.55 cycles each.
COEFFICIENTS: dict[str, Terms] = {
    "bitmap": (0.489, 0.0, 0.0761, 0.585, 0.356, 0.961, 1.56, 0.532, 3.09),
    "bitmap8 few": (0.704, 0.331, 0.835, 0.0, 0.834, 4.52, 1.34, 0.942, 7.79),
    "bitmap8 many": (0.478, 0.148, 3.45, 0.0, 0.182, 1.09, 0.0, 12.3, 0.0, 0.0, 6.13),
    "csr": (0.925, 0.477, 7.01, 6.12, 1.25, 0.0674, 0.742, 0.212, 0.114, 1.77, 0.0, 1.45, 0.735, 3.97),
    "csr conv": (1.4, 0.0, 6.07, 3.86, 0.753, 0.0, 0.0, 0.0, 0.0, 2.15, 0.0, 1.91, 0.0, 11.1),
    "int4": (0.0, 0.555, 0.0, 0.231, 1.2, 2.43, 2.76, 0.0, 0.674, 2.1),
    "int8": (0.547, 2.79, 0.0, 0.0, 2.01, 0.734, 4.65, 1.71, 0.437, 2.19),
    "int8 conv": (1.17, 0.0, 0.0, 0.915, 0.0, 1.21, 2.32, 7.17, 0.0, 10.2),
    "quads": (0.723, 1.59, 3.85, 8.1, 1.03, 0.0, 0.0, 0.844, 0.204, 2.6, 0.0848, 0.0716, 1.42, 4.33),
    "quads conv": (0.955, 0.0, 0.0, 3.94, 0.954, 0.0, 0.0, 0.0, 1.21, 4.12, 0.596, 2.43, 0.0, 12),
    "word quads": (
        0.68,
        1.98,
        0.0,
        2.23,
        2.16,
        0.908,
        0.397,
        0.452,
        0.0,
        1.53,
        0.273,
        0.376,
        0.691,
        2.77,
        5.18,
    ),
    "word quads conv": (0.999, 0.0, 145.0, 0.0, 1.17, 0.148, 1.11, 0.0, 0.0, 3.28, 3.45, 1.77, 0.0, 9.8, 0.0),
    "words": (0.933, 0.58, 6.18, 5.57, 1.62, 0.706, 2.65, 0.158, 3.72, 5.98, 0.443, 0.943, 0.876, 4.7, 5.23),
    "words conv": (0.878, 0.624, 27.7, 6.5, 0.832, 1.14, 0.0, 0.0, 0.0, 17.9, 3.46, 0.0, 0.0, 13.6, 0.0),
}


def kernel_of(kind: str, w: Work, n: int) -> str:
    """The row of `COEFFICIENTS` for a format (`PackedWeight.kind`) and a number of positions."""
    if kind == "bitmap8":
        return "bitmap8 few" if n <= _BATCH else "bitmap8 many"
    if kind in ("bitmap", "int4"):
        return kind
    word = {"csr": "csr", "bsr": "csr", "dense": "quads", "bsr8": "words", "int8": "int8"}[kind]
    if w.entry_rows > 1:
        word = {"csr": "quads", "words": "word quads"}.get(word, word)
    return f"{word} conv" if w.taps else word


def terms(kernel: str, w: Work, n: int, threads: int) -> Terms:
    """Seconds of each of a kernel's terms, before the coefficients."""
    return _TERMS[kernel](w, n, threads)


def estimate(kind: str, w: Work, n: int, threads: int) -> float:
    """Seconds of one call with `n` positions on that many threads."""
    if n == 0 or w.rows == 0:
        return 0.0
    kernel = kernel_of(kind, w, n)
    seconds = _seconds(kernel, w, n, threads)
    if kernel == "bitmap8 many":  # fitted apart from the other kernel: more tokens do not take less
        seconds = max(seconds, _seconds("bitmap8 few", w, _BATCH, threads))
    return seconds


def _seconds(kernel: str, w: Work, n: int, threads: int) -> float:
    return sum(a * t for a, t in zip(COEFFICIENTS[kernel], terms(kernel, w, n, threads), strict=True))
