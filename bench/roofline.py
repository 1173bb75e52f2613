"""This machine's ceilings, and the least time that they allow a kernel: ``python -m bench.roofline``.

Model of a panel product: ``t_nnz + t_io``. Each non-zero is a multiply-add with a memory operand for every
position (and a broadcast for every eight vectors), at the rate that the same loop reaches on a panel in L1;
where rows share the loaded vectors, at up to the rate of multiply-adds in registers.
Input and output move once: the input is loaded, transposed into the panel and stored there; the output is
stored; at the rates of the cache level that holds them. The weight streams beside the multiply-adds.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

import pared
from pared import _core
from pared._timing import interleave, last_level_cache

# Seconds of one sample: long against the clock and the start of a thread, short against other processes.
_SAMPLE = 4e-3
_SAMPLES = 7


def _cache(index: str, default: int) -> int:
    file = Path(f"/sys/devices/system/cpu/cpu0/cache/{index}/size")
    text = file.read_text().strip() if file.exists() else ""
    return int(text[:-1]) << 10 if text.endswith("K") else default


@dataclass(frozen=True)
class Level:
    """A level of the memory hierarchy, with the rates in bytes a second of all threads together."""

    name: str
    size: int  # what one thread can count on
    load: float
    store: float


@dataclass(frozen=True)
class Ceilings:
    """Rates of `threads` threads together."""

    threads: int
    isa: str
    fma: float  # FLOP/s, operands in registers
    panel: float  # FLOP/s, one operand from a panel in L1, a broadcast for every eight vectors
    dot8: float  # OP/s, byte products in registers
    levels: tuple[Level, ...]
    pack: float  # elements/s that the package packs into panels
    store: float  # elements/s that it stores from accumulators
    expand: float  # masked vectors/s (16 outputs by one input) that it expands and multiplies with one token

    def level(self, nbytes: float) -> Level:
        """The innermost level whose size holds `nbytes`."""
        return next((level for level in self.levels if nbytes <= level.size), self.levels[-1])


def _rate(probe: str, nbytes: int, threads: int) -> float:
    """Elements a second, the best of several samples: a ceiling is what is possible, not what is usual."""
    repeats = 1
    while True:
        seconds, elements, _ = _core.machine_probe(probe, nbytes, repeats, threads)
        if seconds >= _SAMPLE / 4 or repeats > 1 << 24:
            break
        repeats *= 4
    repeats = max(1, round(repeats * _SAMPLE / seconds))
    best = 0.0
    for _ in range(_SAMPLES):
        seconds, elements, _ = _core.machine_probe(probe, nbytes, repeats, threads)
        best = max(best, elements / seconds)
    return best


def _kernel_rates() -> tuple[float, float, float]:
    """Elements a second that packing and storing reach, and vectors that expansion does, through weights with
    nothing else to do.
    """
    tokens, width = 384, 768  # a power of two would put every row of the output into the same cache sets
    x = np.ones((tokens, width), np.float32)
    # One non-zero in every K block of one row: everything is packed, next to nothing multiplied or stored.
    touch = np.zeros((1, width), np.float32)
    touch[0, ::16] = 1.0
    packing = pared.ops.CSR.from_dense(touch)
    storing = pared.ops.CSR.from_dense(np.zeros((width, 16), np.float32))
    narrow = x[:, :16]
    # Masks that fit L1, and no values to load: the expansions are all that is left.
    side = 512
    empty = pared.ops.Bitmap.from_dense(np.zeros((side, side), np.float32))
    one = np.ones((1, side), np.float32)
    t = interleave(
        {
            "pack": lambda: pared.ops.linear(x, packing),
            "store": lambda: pared.ops.linear(narrow, storing),
            "expand": lambda: pared.ops.linear(one, empty),
        },
        budget=0.1,
    )
    expand = side * side / 16 / t.best("expand")
    return x.size / t.best("pack"), tokens * width / t.best("store"), expand


def _width() -> int:
    """Floats in a vector of the level in force."""
    return {"scalar": 1, "avx2": 8}.get(pared.isa(), 16)


@lru_cache(maxsize=8)
def measure(threads: int = 1) -> Ceilings:
    """Measure the ceilings; about a second. Torch's thread count is left as it is."""
    l1, l2 = _cache("index0", 32 << 10), _cache("index2", 1 << 20)
    l3 = last_level_cache() // threads
    sizes = (("L1", l1), ("L2", l2), ("L3", l3), ("memory", 1 << 62))
    levels = []
    for name, size in sizes:
        # Two thirds of a level: the rest belongs to stacks, code and other processes.
        nbytes = 4 * last_level_cache() // threads if name == "memory" else size * 2 // 3
        rates = (4 * _rate(probe, nbytes, threads) for probe in ("load", "store"))
        levels.append(Level(name, size, *rates))
    pack, store, expand = _kernel_rates()
    return Ceilings(
        threads=threads,
        isa=pared.isa(),
        fma=2 * _rate("fma", 4096, threads),
        panel=2 * _rate("panel", l1 * 2 // 3, threads),
        # A vector of the probe's floats stands for 64 byte products.
        dot8=2 * 64 / _width() * _rate("dot8", 4096, threads),
        levels=tuple(levels),
        pack=pack,
        store=store,
        expand=expand * threads,
    )


def linear_limit(
    c: Ceilings, out: int, inputs: int, tokens: int, nnz: int, shared: int = 1, itemsize: int = 4
) -> float:
    """The least seconds that the ceilings allow ``[tokens, inputs] x [out, inputs]^T`` with `nnz` non-zeros.

    `shared` rows use each vector that was loaded: 1 for unstructured weights, 4 for blocks of four rows.
    """
    t_nnz = 2.0 * nnz * tokens / min(c.fma, shared * c.panel)
    x, y = float(itemsize * tokens * inputs), float(itemsize * tokens * out)
    panel = 4.0 * tokens * inputs
    t_io = x / c.level(x / c.threads).load + panel / c.levels[0].store + y / c.level(y / c.threads).store
    return t_nnz + t_io


def int8_limit(c: Ceilings, out: int, inputs: int, tokens: int) -> float:
    """The least seconds for the dense int8 product of float32 tokens, quantized on the way in.

    The products at the rate of registers; the input read twice (for its largest magnitudes, and to round) and
    its bytes written; the output stored. The weight streams beside the products.
    """
    x, y = 4.0 * tokens * inputs, 4.0 * tokens * out
    level = c.level(x / c.threads)
    t_io = x / level.load + x / c.levels[0].load + x / 4 / c.levels[0].store
    return 2.0 * tokens * out * inputs / c.dot8 + t_io + y / c.level(y / c.threads).store


def expand_limit(
    c: Ceilings, out: int, inputs: int, tokens: int, nbytes: int, cold: bool, itemsize: int = 4
) -> float:
    """The least seconds for few tokens against a bitmap weight of `nbytes`: the slowest of three things that
    overlap. The weight moves once; every vector (64 bytes when expanded) is expanded once; every token has
    its multiply-adds with it, zeros included.
    """
    level = c.levels[-1] if cold else c.level(nbytes / c.threads)
    vectors = out * inputs * itemsize / 64
    products = 2.0 * out * inputs * tokens / (c.fma if itemsize == 4 else c.dot8)
    return max(nbytes / level.load, vectors / c.expand, products)


def print_ceilings(console: Console, ceilings: list[Ceilings]) -> None:
    table = Table("", *(f"{c.threads} thread{'s' if c.threads > 1 else ''}" for c in ceilings))
    table.add_row("multiply-add, registers, GFLOP/s", *(f"{c.fma * 1e-9:.0f}" for c in ceilings))
    table.add_row("multiply-add, panel in L1, GFLOP/s", *(f"{c.panel * 1e-9:.0f}" for c in ceilings))
    table.add_row("byte products, registers, GOP/s", *(f"{c.dot8 * 1e-9:.0f}" for c in ceilings))
    table.add_row("masked vectors expanded, G/s", *(f"{c.expand * 1e-9:.2f}" for c in ceilings))
    for i, level in enumerate(ceilings[0].levels):
        rates = (f"{c.levels[i].load * 1e-9:.0f} / {c.levels[i].store * 1e-9:.0f}" for c in ceilings)
        table.add_row(f"{level.name} load / store, GB/s", *rates)
    table.add_row("panel packed, GB/s of input", *(f"{4e-9 * c.pack:.0f}" for c in ceilings))
    table.add_row("tile stored, GB/s of output", *(f"{4e-9 * c.store:.0f}" for c in ceilings))
    console.print(f"{_core.cpu_brand()}, {ceilings[0].isa}")
    console.print(table)


def main() -> int:
    import torch

    found = []
    for threads in dict.fromkeys((1, torch.get_num_threads())):
        torch.set_num_threads(threads)
        found.append(measure(threads))
    print_ceilings(Console(), found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
