"""Bank conflicts of the kernels' accesses to shared memory, counted in the emulator.

``python -m bench.gpu.banks``: runs every kernel of ``bench.gpu.smoke`` on its small problem. A line a kernel:
the turns that its accesses take over the fewest they could; below it the places in the source that take more,
with the worst instruction. Not counted: what the copy engine writes (bulk copies, tensor maps), what wgmma
reads, and lanes that add to the same word, which some atomics do one after the other.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from bench.gpu import smoke
from bench.gpu.measure import Machine, emulated_machine
from pared import _cuda


@dataclass
class Use:
    """Instructions of a warp at one place, and the turns that shared memory took for them."""

    instructions: int = 0
    taken: int = 0
    least: int = 0
    worst: int = 0

    def add(self, other: Use) -> None:
        self.instructions += other.instructions
        self.taken += other.taken
        self.least += other.least
        self.worst = max(self.worst, other.worst)

    @property
    def ways(self) -> float:
        return self.taken / self.least


Uses = dict[str, dict[tuple[str, str, int], Use]]  # kernel -> (place, what, bytes of a lane) -> use


def take(module: Any) -> Uses:
    """What has been counted since the last call."""
    rows = module.take_banks()
    lines = _lines(module.__file__, {offset for _, _, where, offset, *_ in rows if not where})
    uses: Uses = defaultdict(lambda: defaultdict(Use))
    for kernel, what, where, offset, nbytes, *counts in rows:
        uses[kernel][where or lines[offset], what, nbytes].add(Use(*counts))
    return uses


def _lines(path: str, offsets: Iterable[int]) -> dict[int, str]:
    """file:line of instructions: of the one before each, because what is noted is where a call returns."""
    offsets = sorted(offsets)
    command = shutil.which("addr2line")
    if command is None or not offsets:
        return {offset: hex(offset) for offset in offsets}
    addresses = "\n".join(hex(offset - 1) for offset in offsets)
    found = subprocess.run([command, "-e", path], input=addresses, capture_output=True, text=True, check=True)
    names = [line.split(" ")[0].rsplit("/", 1)[-1] for line in found.stdout.splitlines()]
    return dict(zip(offsets, names, strict=True))


def count(machine: Machine, wanted: Callable[[str], bool]) -> Uses:
    """Of the smoke checks whose name is wanted."""
    module = _cuda._emulated
    module.record_banks(True)
    try:
        for name, check in smoke.checks(machine):
            if wanted(name):
                check()
        return take(module)
    finally:
        module.record_banks(False)


def total(places: Iterable[Use]) -> Use:
    sum_of = Use()
    for use in places:
        sum_of.add(use)
    return sum_of


def table(uses: Uses) -> Iterable[str]:
    for kernel, places in sorted(uses.items()):
        whole = total(places.values())
        yield f"{kernel:<28} {whole.taken:>8} turns, {whole.ways:.2f} times the least, worst {whole.worst}"
        for (place, what, nbytes), use in sorted(places.items(), key=lambda i: i[1].least - i[1].taken):
            if use.taken > use.least:
                share = (use.taken - use.least) / whole.taken
                yield (
                    f"    {place:<26} {what:<8} {nbytes:>2} B  {use.instructions:>7} instructions, "
                    f"{use.ways:.2f} times, worst {use.worst}: {share:.0%} of the kernel's turns"
                )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench.gpu.banks", description=__doc__)
    parser.add_argument("--only", default="", help="checks whose name contains this")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print("\n".join(table(count(emulated_machine(accesses=True), lambda name: options.only in name))))


if __name__ == "__main__":
    sys.exit(main())
