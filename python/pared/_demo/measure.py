"""What every part of the demonstration and ``pared bench`` share: progress, file size, timing in turns."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

import pared
from pared._demo.results import Result, Variant
from pared._timing import Timings, interleave

Inputs = tuple[torch.Tensor, ...]

_COLUMNS = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
_SLICES = 5


@contextmanager
def bar(console: Console, label: str, total: int, *, live: bool = True) -> Iterator[Callable[..., None]]:
    """A progress bar that leaves one line behind: what was done, and in how many seconds.

    Yields a function that advances the bar, by one unless told. Not `live`, the bar is drawn only then: no
    thread redraws it meanwhile, beside what is being timed.
    """
    start = time.perf_counter()
    shown = console.is_terminal  # a log gets the closing line alone
    with Progress(
        *_COLUMNS, console=console, transient=True, auto_refresh=live, disable=not shown
    ) as progress:
        task = progress.add_task(label, total=total)

        def advance(n: int = 1) -> None:
            progress.update(task, advance=n, refresh=not live)

        yield advance
    console.print(f"  {label}: {time.perf_counter() - start:.1f} s", highlight=False)


def time_in_turns(
    console: Console, label: str, calls: Mapping[str, Callable[[], object]], seconds: float
) -> Timings:
    """`pared._timing.interleave` over about `seconds`, in slices between which a progress bar moves."""
    parts: list[Timings] = []
    with torch.inference_mode(), bar(console, label, _SLICES, live=False) as advance:
        for i in range(_SLICES):
            parts.append(interleave(calls, budget=seconds / _SLICES, min_rounds=4, seed=i))
            advance()
    samples = {name: np.concatenate([p.samples[name] for p in parts]) for name in calls}
    return Timings(samples, parts[0].inner)


@dataclass(frozen=True)
class Candidate:
    """A pruned model before and after acceleration, and how good the accelerated one is."""

    name: str
    pruned: nn.Module
    fast: nn.Module
    metrics: dict[str, float]


def weights(model: nn.Module) -> tuple[int, int]:
    """``(all, non-zero)`` parameters."""
    ps = list(model.parameters())
    return sum(p.numel() for p in ps), sum(int(torch.count_nonzero(p)) for p in ps)


def file_bytes(model: nn.Module) -> int:
    """Size of the file that `pared.save` writes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pared"
        pared.save(model, path)
        return path.stat().st_size


def accelerate(console: Console, label: str, model: nn.Module, inputs: Inputs, verbose: bool) -> nn.Module:
    """`pared.accelerate` with its time stated and, when `verbose`, its report."""
    start = time.perf_counter()
    fast: nn.Module = pared.accelerate(model, inputs)
    console.print(f"  {label}: accelerated in {time.perf_counter() - start:.1f} s", highlight=False)
    if verbose:
        console.print(pared.report(fast))
    return fast


def compare(
    console: Console,
    model: str,
    workload: str,
    *,
    dense: dict[str, tuple[nn.Module, Inputs]],
    metrics: dict[str, float],
    candidates: list[Candidate],
    inputs: Inputs,
    seconds: float,
    note: str = "",
) -> Result:
    """Time the dense model and every candidate round by round, and put the numbers together.

    Parameters
    ----------
    dense : the dense model and its inputs, once for each memory layout; the fastest is the baseline of every
        speed-up, so that pared is measured against the best that eager torch does here.
    metrics : of the dense model.
    inputs : of the candidates.
    seconds : for all rounds together.
    """

    def call(module: nn.Module, args: Inputs) -> Callable[[], object]:
        return lambda: module(*args)

    calls = {name: call(*pair) for name, pair in dense.items()}
    calls |= {c.name: call(c.fast, inputs) for c in candidates}
    t = time_in_turns(console, f"{model}: timing, {workload}", calls, seconds)

    def variant(name: str, weighed: nn.Module, saved: nn.Module, metrics: dict[str, float]) -> Variant:
        total, nonzero = weights(weighed)
        speedup = 1.0 if name == base else t.speedup(name, base).value
        return Variant(name, metrics, total, nonzero, file_bytes(saved), t.median(name), t.p95(name), speedup)

    base = min(dense, key=t.median)
    variants = [variant(name, module, module, metrics) for name, (module, _) in dense.items()]
    variants += [variant(c.name, c.pruned, c.fast, c.metrics) for c in candidates]
    return Result(model, workload, tuple(variants), note)
