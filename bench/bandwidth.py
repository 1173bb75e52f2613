"""What share of the memory's rate each format reaches with few tokens: ``python -m bench.bandwidth``.

A call for few tokens reads its weight once and does little with it, so the rate at which bytes can be read
is its limit. Weights go round copies that together exceed the last-level cache twice over. An entry is the
packed weight's bytes over the median time of a call, in percent of the rate at which a plain loop reads
memory in huge pages, where weights lie too, with as many threads. That loop does not fetch ahead, so entries
may exceed 100. `--warm` calls one weight again and again instead, against the cache level that holds it.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from pared import _core, ops
from pared._timing import interleave, last_level_cache, rotate

TOKENS = (1, 2, 4, 8)
SHAPES = ("768x768", "3072x768", "4096x4096", "11008x4096")


@dataclass(frozen=True)
class Case:
    """How a weight is packed, and the share of zeros it is shown with."""

    pack: Callable[[torch.Tensor], Any]
    zeros: float = 0.0
    block: tuple[int, int] = (1, 1)


CASES = {
    "int8": Case(ops.Int8.from_dense),
    "int4": Case(ops.Int4.from_dense),
    "bitmap": Case(ops.Bitmap.from_dense, 0.5),
    "bitmap bf16": Case(lambda w: ops.Bitmap.from_dense(w.bfloat16()), 0.5),
    "bitmap8": Case(ops.Bitmap8.from_dense, 0.5),
    "bsr8 1x4": Case(lambda w: ops.BSRInt8.from_dense(w, block=(1, 4)), 0.8, (1, 4)),
    "bsr8 4x4": Case(lambda w: ops.BSRInt8.from_dense(w, block=(4, 4)), 0.8, (4, 4)),
    "csr": Case(ops.CSR.from_dense, 0.9),
    "bsr 4x1": Case(lambda w: ops.BSR.from_dense(w, block=(4, 1)), 0.8, (4, 1)),
    "dense": Case(ops.Dense.from_dense),
}


def read_rate(nbytes: int, threads: int) -> float:
    """Bytes a second that a loop of plain loads reads from so many bytes in huge pages."""
    repeats = max(1, (32 << 20) // nbytes)
    seconds, floats, _ = _core.machine_probe("load", nbytes // threads, repeats, threads, huge_pages=True)
    return 4 * floats / seconds


def shares(case: Case, out: int, inputs: int, threads: int, warm: bool, budget: float) -> list[float]:
    """Of each number of `TOKENS`, with torch's thread count as it is."""
    torch.manual_seed(0)
    rows, columns = case.block
    kept = torch.rand(out // rows, inputs // columns) >= case.zeros
    mask = kept.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    weight = case.pack(torch.randn(out, inputs) * mask)

    def call_of(w: Any, x: torch.Tensor) -> Callable[[], Any]:
        return lambda: ops.linear(x, w)

    def calls_of(tokens: int) -> Callable[[], Any]:
        x = torch.randn(tokens, inputs)
        return call_of(weight, x) if warm else rotate(lambda i: call_of(copies[i], x), weight.nbytes)

    copies = [weight]
    if not warm:
        count = max(2, -(-2 * last_level_cache() // weight.nbytes))
        copies += [copy.deepcopy(weight) for _ in range(count - 1)]
    memory = weight.nbytes if warm else 2 * last_level_cache()
    rates = [read_rate(memory, threads)]
    timings = interleave({str(t): calls_of(t) for t in TOKENS}, budget=budget, min_rounds=5, min_sample=2e-3)
    rates.append(read_rate(memory, threads))
    rate = statistics.fmean(rates)
    return [weight.nbytes / timings.median(str(t)) / rate for t in TOKENS]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="OUTxIN")
    parser.add_argument("--formats", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--warm", action="store_true", help="one weight again and again")
    parser.add_argument("--budget", type=float, default=0.4, help="seconds an entry of the table")
    given = parser.parse_args(argv)
    console = Console()
    _core.set_parallel_backoff(False)
    for threads in given.threads:
        torch.set_num_threads(threads)
        rate = read_rate(2 * last_level_cache(), threads)
        table = Table("", "zeros", *given.shapes)
        table.title = (
            f"% of the rate of plain loads with {', '.join(map(str, TOKENS))} tokens, {threads} "
            f"thread{'s' if threads > 1 else ''}; from memory {rate * 1e-9:.1f} GB/s"
        )
        for name in given.formats:
            case = CASES[name]
            cells = []
            for shape in given.shapes:
                out, inputs = map(int, shape.split("x"))
                found = shares(case, out, inputs, threads, given.warm, given.budget)
                cells.append(" ".join(f"{100 * s:.0f}" for s in found))
            table.add_row(name, f"{100 * case.zeros:.0f} %", *cells)
        console.print(table)
    _core.set_parallel_backoff(True)
    console.print(f"{_core.cpu_brand()}, {_core.isa()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
