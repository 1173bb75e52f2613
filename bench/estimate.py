"""The model of times behind ``weight.estimate`` and `pared.accelerate`'s choice of what to time.

::

    python -m bench.estimate measure OUT.json --threads 1   # every format over shapes, densities, tokens
    python -m bench.estimate measure OUT.json --only int4   # one format
    python -m bench.estimate fit OUT.json ...               # coefficients, for pared/ops/_estimate.py
    python -m bench.estimate check OUT.json ...             # errors of the model, and of the choice

`check` asks, for every layer that was measured: of the formats that accelerate would time, how much slower is
the fastest than the fastest of all?
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import pared
from pared import _core
from pared._select import facts_of, shortlist
from pared._timing import interleave
from pared.ops import _estimate
from pared.ops._estimate import Facts
from pared.ops._formats import FORMATS

# BERT-base and MiniLM: attention, both halves of the feed-forward part.
LINEAR = ((768, 768), (3072, 768), (768, 3072), (384, 384), (1536, 384), (384, 1536))
TOKENS = (1, 4, 8, 16, 32, 64, 128, 384)
# ResNet-50: out, in, kernel, stride, side of the image.
CONVOLUTIONS = (
    (64, 64, 3, 1, 56),
    (256, 64, 1, 1, 56),
    (64, 256, 1, 1, 56),
    (128, 128, 3, 1, 28),
    (512, 128, 1, 1, 28),
    (128, 256, 3, 2, 56),
    (256, 256, 3, 1, 14),
    (1024, 256, 1, 1, 14),
    (512, 512, 3, 1, 7),
    (2048, 512, 1, 1, 7),
)
DENSITIES = (1.0, 0.5, 0.3, 0.2, 0.1, 0.05)
BLOCKS = ((1, 1), (4, 1), (1, 4), (4, 4))
# Seconds for one layer's formats.
_BUDGET = 0.02


@dataclass(frozen=True)
class Sample:
    """One layer with some positions: the seconds of each format."""

    layer: str
    block: str
    density: float
    positions: int
    threads: int
    facts: Facts
    seconds: dict[str, float]


@dataclass(frozen=True)
class Layer:
    """A layer to measure: its weight, and its inputs by their positions."""

    name: str
    shape: tuple[int, ...]
    inputs: tuple[tuple[int, tuple[int, ...]], ...]
    stride: int = 1

    @property
    def linear(self) -> bool:
        return len(self.shape) == 2


def layers() -> list[Layer]:
    found = [Layer(f"{o}x{i}", (o, i), tuple((n, (n, i)) for n in TOKENS)) for o, i in LINEAR]
    for o, i, k, s, side in CONVOLUTIONS:
        inputs = tuple((b * (side // s) ** 2, (b, i, side, side)) for b in (1, 4))
        found.append(Layer(f"{o}x{i}x{k}x{k} {side}/{s}", (o, i, k, k), inputs, s))
    return found


def weight_of(layer: Layer, density: float, block: tuple[int, int], seed: int) -> torch.Tensor:
    """A random weight whose zeros come in blocks."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(layer.shape, generator=g)
    w += 0.01 * torch.sign(w)
    rows, cols = layer.shape[0], layer.shape[1]
    taps = layer.shape[2:] or ()
    keep = torch.rand((-(-rows // block[0]), -(-cols // block[1]), *taps), generator=g) < density
    keep = keep.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[:rows, :cols]
    return w * keep


def cases(seed: int) -> Iterator[tuple[Layer, float, tuple[int, int]]]:
    every = [
        (layer, d, b) for layer in layers() for d in DENSITIES for b in (BLOCKS if d < 1 else BLOCKS[:1])
    ]
    random.Random(seed).shuffle(every)  # a run that is cut short has seen something of everything
    return iter(every)


def calls_of(
    layer: Layer, weight: torch.Tensor, x: torch.Tensor, only: str | None
) -> dict[str, Callable[[], object]]:
    calls: dict[str, Callable[[], object]] = {}
    padding = layer.shape[-1] // 2
    for f in FORMATS.values():
        if f.combines or f.name != (only or f.name) or "cpu" not in f.devices:
            continue
        if not layer.linear and not f.conv2d:
            continue
        packed = _packed(f.name, weight)
        if layer.linear:
            out = torch.empty(*x.shape[:-1], layer.shape[0])
            calls[f.name] = lambda p=packed, y=out: _core.linear(x, p, None, None, y)
        else:
            side = x.shape[-1] // layer.stride
            out = torch.empty(x.shape[0], layer.shape[0], side, side)
            geometry = ((layer.stride,) * 2, (padding,) * 4, (1, 1))
            calls[f.name] = lambda p=packed, y=out, g=geometry: _core.conv2d(
                x, p, None, *g, None, None, None, y
            )
    return calls


_last: dict[str, Any] = {}


def _packed(name: str, weight: torch.Tensor) -> Any:
    """Packed once for all numbers of positions of a weight."""
    if _last.get("weight") is not weight:
        _last.clear()
        _last["weight"] = weight
    if name not in _last:
        _last[name] = torch.as_tensor(FORMATS[name].weight.from_dense(weight).packed)
    return _last[name]


def measure(threads: int, seconds: float, seed: int, only: str | None) -> list[Sample]:
    torch.set_num_threads(threads)
    end = time.monotonic() + seconds
    found = []
    g = torch.Generator().manual_seed(seed)
    for layer, density, block in cases(seed):
        weight = weight_of(layer, density, block, seed)
        facts = facts_of(weight)
        for n, shape in layer.inputs:
            if time.monotonic() > end:
                return found
            x = torch.randn(shape, generator=g)
            calls = calls_of(layer, weight, x, only)
            if not calls:
                continue
            t = interleave(calls, budget=_BUDGET, min_rounds=3, max_rounds=60, warmup=1, seed=seed)
            name = f"{block[0]}x{block[1]}"
            medians = {k: t.median(k) for k in t.samples}
            found.append(Sample(layer.name, name, density, n, threads, facts, medians))
    return found


def read(paths: Sequence[str]) -> list[Sample]:
    found = []
    for path in paths:
        for s in json.loads(Path(path).read_text()):
            found.append(Sample(**{**s, "facts": Facts(**s["facts"])}))
    return found


def rows_by_kernel(samples: Sequence[Sample]) -> dict[str, list[tuple[_estimate.Terms, float, str]]]:
    """Kernel -> (terms, seconds, format) of every measurement."""
    found = defaultdict(list)
    for s in samples:
        for kind, seconds in s.seconds.items():
            if kind.startswith("bitmap") and s.density == 1.0:
                continue
            w = s.facts.work(kind)
            kernel = _estimate.kernel_of(kind, w, s.positions)
            found[kernel].append((_estimate.terms(kernel, w, s.positions, s.threads), seconds, kind))
    return found


def fit(samples: Sequence[Sample], console: Console) -> None:
    """Coefficients that are not negative, with the least sum of squared relative errors."""
    from scipy.optimize import nnls

    console.print("COEFFICIENTS: dict[str, Terms] = {")
    for kernel, rows in sorted(rows_by_kernel(samples).items()):
        a = np.array([t for t, _, _ in rows])
        b = np.array([s for _, s, _ in rows])
        weight = 1.0 / b
        for _ in range(20):  # towards the least absolute relative error: disturbed samples count less
            x, _ = nnls(a * weight[:, None], b * weight)
            error = np.abs(a @ x / b - 1.0)
            weight = 1.0 / b / np.sqrt(np.maximum(error, 0.02))
        text = ", ".join(f"{v:.3g}" if v else "0.0" for v in x)
        console.print(f'    "{kernel}": ({text}),  # {np.median(error):.0%}, {np.quantile(error, 0.9):.0%}')
    console.print("}")


def check(samples: Sequence[Sample], console: Console) -> int:
    table = Table("kernel", "measured", "median error", "90 % within")
    for kernel, rows in sorted(rows_by_kernel(samples).items()):
        x = _estimate.COEFFICIENTS[kernel]
        error = [abs(np.dot(t, x) / s - 1) for t, s, _ in rows]
        table.add_row(kernel, str(len(rows)), f"{np.median(error):.0%}", f"{np.quantile(error, 0.9):.0%}")
    console.print(table)
    worst = 0.0
    table = Table(
        "precision", "positions", "layers", "timed of", "lost: mean", "99 %", "most", "winner missed"
    )
    for precision in ("float32", "int8"):
        groups: dict[tuple[int, int], list[tuple[int, int, float]]] = defaultdict(list)
        for s in samples:
            few = s.positions if s.positions < 32 else 32
            choice = _choice(s, precision)
            if choice:
                groups[s.threads, few].append(choice)
        for (threads, n), found in sorted(groups.items()):
            lost = np.array([x[2] for x in found])
            worst = max(worst, float(lost.max()))
            table.add_row(
                f"{precision}, {threads} thread(s)",
                str(n) if n < 32 else "32 and more",
                str(len(found)),
                f"{np.mean([x[0] for x in found]):.1f} of {np.mean([x[1] for x in found]):.1f}",
                f"{lost.mean():.2%}",
                f"{np.quantile(lost, 0.99):.1%}",
                f"{lost.max():.1%}",
                f"{np.mean(lost > 0.03):.1%}",
            )
    console.print(table)
    console.print(f"most that a choice lost: {worst:.1%}")
    return 0


def _choice(s: Sample, precision: str) -> tuple[int, int, float] | None:
    """Formats timed, formats that could be, how much slower the fastest of the first is; None without any."""
    known = [n for n in s.seconds if precision != "float32" or FORMATS[n].precision == "float32"]
    # Where a row has no zeros at all a mask is no help, and accelerate does not try one.
    known = [n for n in known if n != "int4" and not (n.startswith("bitmap") and s.density == 1.0)]
    if not known:
        return None
    chosen = shortlist(known, s.facts, {s.positions: 1}, s.threads)
    # Two names of one kernel differ by noise alone.
    known = [n for n in known if not chosen.passed_over.get(n, "").startswith("the same")]
    best = min(s.seconds[n] for n in known)
    return len(chosen.timed), len(known), min(s.seconds[n] for n in chosen.timed) / best - 1


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("measure", "fit", "check"))
    parser.add_argument("files", nargs="+")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=50.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=[f.name for f in FORMATS.values() if not f.combines])
    given = parser.parse_args(argv)
    console = Console(width=140)
    if given.what == "measure":
        found = measure(given.threads, given.seconds, given.seed, given.only)
        Path(given.files[0]).write_text(json.dumps([asdict(s) for s in found]))
        console.print(f"{len(found)} layers on {_core.cpu_brand()}, {pared.isa()}, {given.threads} thread(s)")
        return 0
    return (fit if given.what == "fit" else check)(read(given.files), console) or 0


if __name__ == "__main__":
    sys.exit(main())
