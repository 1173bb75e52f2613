"""How a call's time grows with its tokens, 1 to 129, in every format: no step between neighbours above 1.5.

All token counts of a format run interleaved, so that neighbours are compared within a round. They go through
several weights in turn, as the layers of a model do: a processor learns the branches of one sparse weight by
heart, best for the counts whose kernel runs most often. The row of a format is its largest step: the time at
one more token over the time before. ``python -m bench.plots`` draws ``latency_tokens.svg`` from the file.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional

import pared
from bench.bench_blocks import block_pruned
from bench.bench_linear import THREADS, pruned
from pared._timing import interleave
from pared.ops._formats import FORMATS

# Every count up to two vectors and one, then around the edges of tiles.
COUNTS = [*range(1, 34), 47, 48, 49, 63, 64, 65, 95, 96, 97, 127, 128, 129]
BLOCKS = {"bsr": (4, 1), "bsr8": (1, 4)}
NO_ZEROS = ("nn.Linear", "dense", "int8", "int4")
MINE = [n for n, f in FORMATS.items() if "cpu" in f.devices]
CASES = [(name, s) for name in ("nn.Linear", *MINE) for s in ((0.0,) if name in NO_ZEROS else (0.5, 0.9))]
WEIGHTS = 8


def calls_of(name: str, out: int, inputs: int, sparsity: float) -> dict[int, Callable[[], Any]]:
    """One callable a token count; each goes round the weights."""
    bias = torch.randn(out)
    weights: list[Any] = []
    for seed in range(WEIGHTS):
        block = BLOCKS.get(name)
        torch.manual_seed(seed)
        w = block_pruned(out, inputs, sparsity, block) if block else pruned(out, inputs, sparsity, seed)
        weights.append(w if name == "nn.Linear" else FORMATS[name].weight.from_dense(w))
    linear: Callable[..., Any] = functional.linear if name == "nn.Linear" else pared.ops.linear

    def call_of(tokens: int) -> Callable[[], Any]:
        x, following = torch.randn(tokens, inputs), itertools.cycle(weights).__next__
        return lambda: linear(x, following(), bias)

    return {tokens: call_of(tokens) for tokens in COUNTS}


@THREADS
@pytest.mark.parametrize(("name", "sparsity"), CASES, ids=lambda v: v if isinstance(v, str) else f"{v:.0%}")
@pytest.mark.parametrize(
    ("out", "inputs"), [(768, 768), pytest.param(3072, 768, marks=pytest.mark.full)], ids="{}".format
)
def test_tokens(versus: Any, out: int, inputs: int, name: str, sparsity: float, threads: int) -> None:
    calls = {f"{t} tokens": call for t, call in calls_of(name, out, inputs, sparsity).items()}
    timings = interleave(calls, budget=1.0)
    steps = {t: timings.speedup(f"{t} tokens", f"{t + 1} tokens").value for t in COUNTS if t + 1 in COUNTS}
    worst = max(steps, key=steps.__getitem__)
    versus(
        {name: calls[name] for name in (f"{worst} tokens", f"{worst + 1} tokens")},
        timings=timings,
        suite="tokens, largest step to one more",
        case=f"{name} {out}x{inputs}, {worst} -> {worst + 1}",
        cell=f"{sparsity * 100:.0f} % zeros",
        target=f"{worst} tokens",
        rivals=(f"{worst + 1} tokens",),
        facts={
            "kernel": name,
            "out": out,
            "in": inputs,
            "sparsity": sparsity,
            "sweep": {t: timings.median(f"{t} tokens") for t in COUNTS},
            "step": steps[worst],
        },
    )
