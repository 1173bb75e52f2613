"""What a call takes on cores that other processes keep busy: ``python -m bench.contention``.

A layer in 8 bits with masks, one token, 40 weights in turn, two threads: beside processes that only compute,
and with the fall-back to one thread (``csrc/core/backoff.h``) off, on, and with one thread from the start.
Means: what counts here are the few calls that wait for milliseconds.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from rich.console import Console
from rich.table import Table

from pared import _core, ops

CALLS = 4000
BESIDE = (0, 1, 2, 4)


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """Beside so many processes that never wait."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        time.sleep(0.3)  # until they run
        yield
    finally:
        for p in others:
            p.kill()
            p.wait()


def mean_us(x: torch.Tensor, weights: list[ops.Bitmap8], threads: int, backoff: bool) -> float:
    """Microseconds a call on average."""
    torch.set_num_threads(threads)
    _core.set_parallel_backoff(backoff)
    samples = []
    for i in range(CALLS):
        begin = time.perf_counter()
        ops.linear(x, weights[i % len(weights)])
        samples.append(time.perf_counter() - begin)
    return 1e6 * statistics.fmean(samples)


def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 1024)
    weights = []
    for _ in range(40):
        w = torch.randn(2816, 1024)
        weights.append(ops.Bitmap8.from_dense(w * (torch.rand_like(w) < 0.5)))
    table = Table(
        "busy processes", "two threads", "with the fall-back", "one thread", title="us a call, mean"
    )
    for n in BESIDE:
        with busy(n):
            times = [mean_us(x, weights, *how) for how in ((2, False), (2, True), (1, False))]
        table.add_row(str(n), *(f"{t:.0f}" for t in times))
    _core.set_parallel_backoff(True)
    Console().print(table)
    print(f"{_core.cpu_brand()}, {_core.isa()}")


if __name__ == "__main__":
    main()
