"""This machine's ceilings, and the least time that they allow a kernel: ``python -m bench.roofline``.

Model of a panel product: ``t_nnz + t_io``. Each non-zero is a multiply-add with a memory operand for every
position (and a broadcast for every eight vectors), at the rate that the same loop reaches on a panel in L1;
where rows share the loaded vectors, at up to the rate of multiply-adds in registers.
Input and output move once: the input is loaded, transposed into the panel and stored there; the output is
stored; at the rates of the cache level that holds them. The weight streams beside the multiply-adds.
"""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table

from pared import _core
from pared._machine import Ceilings, measure


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
    return _int8_limit(c, 2.0 * tokens * out * inputs, 4.0 * tokens * inputs, 4.0 * tokens * out)


def conv_int8_limit(
    c: Ceilings, products: float, channels: int, pixels: int, filters: int, outputs: int
) -> float:
    """The same for a convolution of float32 images of `pixels` each to `outputs` each."""
    return _int8_limit(c, 2.0 * products, 4.0 * channels * pixels, 4.0 * filters * outputs)


def _int8_limit(c: Ceilings, work: float, x: float, y: float) -> float:
    level = c.level(x / c.threads)
    t_io = x / level.load + x / c.levels[0].load + x / 4 / c.levels[0].store
    return work / c.dot8 + t_io + y / c.level(y / c.threads).store


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
