"""``python -m bench.pattern``: what pattern="auto" would choose, against measured times of pruned layers.

For each layer shape, sparsity and number of tokens: the pattern that the estimates choose, the fastest
kernel's measured time with each pattern, and how much longer the chosen one takes than the one that the rule
would choose by measured times. All patterns of a layer are timed in the same interleaved rounds.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import pared
from pared._timing import interleave
from pared.ops._formats import FORMATS
from pared.pruning.auto import Layer, candidates, cpu_seconds, decide

SHAPES = [(768, 768), (3072, 768), (768, 3072)]
FORMATS_OF = {"float32": ("csr", "bsr", "bitmap"), "int8": ("int8", "bitmap8", "bsr8")}


def calls(shape: tuple[int, int], zeros: float, tokens: int, precision: str) -> dict[str, Callable[[], Any]]:
    """A call by pattern and format."""
    torch.manual_seed(0)
    x, found = torch.randn(tokens, shape[1]), {}
    layer = Layer(nn.Linear, shape, 1, 4, {tokens: 1})
    for pattern in candidates(layer, zeros, "cpu", precision):
        module = nn.Linear(shape[1], shape[0])
        pared.prune(module, zeros, pattern=pattern)
        for name in FORMATS_OF[precision]:
            if name in ("bitmap", "bitmap8") and tokens > 16:
                continue
            w = FORMATS[name].weight.from_dense(module.weight)  # type: ignore[attr-defined]
            found[f"{pattern} {name}"] = lambda w=w: pared.ops.linear(x, w)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.pattern", description=__doc__)
    parser.add_argument("--precision", choices=tuple(FORMATS_OF), default="float32")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 128])
    parser.add_argument("--zeros", type=float, nargs="+", default=[0.5, 0.8, 0.9, 0.95])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    worst: list[float] = []
    print(f"{'layer':>10} {'zeros':>5} {'tokens':>6}  chosen, by measured times; measured (estimated) us")
    for shape in SHAPES:
        for zeros in options.zeros:
            for tokens in options.tokens:
                layer = Layer(nn.Linear, shape, 1, 4, {tokens: 1})
                timings = interleave(calls(shape, zeros, tokens, options.precision), budget=0.25)
                best: dict[str | None, float] = {}
                for name in timings.samples:
                    pattern = name.split()[0]
                    best[pattern] = min(best.get(pattern, math.inf), timings.median(name))
                best[None] = math.inf
                mine = decide("", layer, zeros, "cpu", options.precision)
                want = decide(
                    "", layer, zeros, "cpu", options.precision, lambda _, p, *__, best=best: best[p]
                )
                worst.append(best[mine.pattern] / best[want.pattern])
                estimated = {p: cpu_seconds(layer, p, zeros, options.precision) for p in best if p}
                figures = ", ".join(f"{p} {best[p] * 1e6:.0f} ({estimated[p] * 1e6:.0f})" for p in estimated)
                label = f"{shape[0]:>5}x{shape[1]:<4} {zeros:>5.0%} {tokens:>6}"
                print(f"{label}  {mine.pattern}, {want.pattern}; {figures}")
    mean = math.exp(sum(map(math.log, worst)) / len(worst))
    same = sum(w == 1.0 for w in worst)
    print(
        f"{same} of {len(worst)} as with measured times; {mean:.3f} times as long, at most {max(worst):.2f}"
    )


if __name__ == "__main__":
    main()
