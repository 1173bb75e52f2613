"""This machine's ceilings, and the least time that they allow a kernel: ``python -m bench.roofline``.

The model of the limits is in `pared._limits`.
"""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table

from pared import _core
from pared._limits import conv_int8_limit, conv_limit, expand_limit, int8_limit, linear_limit
from pared._machine import Ceilings, measure

__all__ = [
    "Ceilings",
    "conv_int8_limit",
    "conv_limit",
    "expand_limit",
    "int8_limit",
    "linear_limit",
    "measure",
]


def print_ceilings(console: Console, ceilings: list[Ceilings]) -> None:
    table = Table("", *(f"{c.threads} thread{'s' if c.threads > 1 else ''}" for c in ceilings))
    table.add_row("cycles of a core, GHz", *(f"{c.clock * 1e-9:.2f}" for c in ceilings))
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
