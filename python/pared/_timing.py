"""The one timer of the package: candidates are run round by round, interleaved, and compared as ratios.

Timing one callable to the end and then the next compares two moments of the machine: another process, a
changed clock frequency or a warm cache decides. Here each round runs every callable once, in a random order,
so that whatever disturbs a round disturbs all of them, and the figure is the median over rounds of the ratio
within a round. It is also the honest cache state: between two runs of a kernel the others have run.

What a ratio does not survive is a core that other processes keep busy: the threads of one callable wait for
each other there, those of another do not, and every round says the same. So a run also notes how long its
threads waited for a core; `Timings.gain` is cautious then, and `watched` tells.

Used by `pared.accelerate`, by ``pared bench`` and by every benchmark of the repository.
"""

from __future__ import annotations

import gc
import itertools
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Ratio", "Timings", "Watch", "interleave", "last_level_cache", "rotate", "watched"]

Call = Callable[[], object]

# Twice the cache: with exactly its size, half of the lines would survive a pass under random replacement.
_COLD_FACTOR = 2.0
_MOST_COPIES = 1 << 14
# Above these a run was disturbed: seconds waited for a core, of each second; spread of a callable's samples.
_WAITED = 0.1
_SPREAD = 0.3


@dataclass(frozen=True)
class Ratio:
    """The median over rounds of a ratio within a round, and how far it can be trusted.

    Attributes
    ----------
    value : the median.
    low, high : a 95 % confidence interval of the median, from order statistics: it assumes no distribution.
    q25, q75 : quartiles over the rounds: the spread of a single round.
    """

    value: float
    low: float
    high: float
    q25: float
    q75: float

    def __str__(self) -> str:
        return f"{self.value:.2f}x [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True)
class Timings:
    """Samples of an interleaved run.

    Attributes
    ----------
    samples : name -> float64 array [rounds], seconds a call; index i of every name is round i.
    inner : name -> calls in one sample.
    waited : seconds that the process's threads, all together, were ready to run and had no core, of each
        second of the run; 0 where the system does not say.
    """

    samples: Mapping[str, NDArray[np.float64]]
    inner: Mapping[str, int]
    waited: float = 0.0

    @property
    def rounds(self) -> int:
        """Number of rounds."""
        return len(next(iter(self.samples.values())))

    def median(self, name: str) -> float:
        """Median seconds a call."""
        return float(np.median(self.samples[name]))

    def p95(self, name: str) -> float:
        """95th percentile of the seconds a call."""
        return float(np.quantile(self.samples[name], 0.95))

    def best(self, name: str) -> float:
        """Fastest sample, seconds a call."""
        return float(np.min(self.samples[name]))

    def spread(self, name: str) -> float:
        """Interquartile range over the median: 0.02 is a quiet machine, 0.3 a busy one."""
        q25, q50, q75 = np.quantile(self.samples[name], [0.25, 0.5, 0.75])
        return float((q75 - q25) / q50) if q50 > 0 else 0.0

    def speedup(self, name: str, baseline: str) -> Ratio:
        """How many times faster `name` is than `baseline`: above 1 is faster."""
        ratios = np.sort(self.samples[baseline] / self.samples[name])
        n = len(ratios)
        # Ranks n/2 +- 1.96 * sqrt(n)/2 of the sorted sample enclose the median with 95 % confidence.
        reach = 0.98 * math.sqrt(n)
        low = max(0, math.floor(n / 2 - reach))
        high = min(n - 1, math.ceil(n / 2 + reach))
        q25, q50, q75 = (float(q) for q in np.quantile(ratios, [0.25, 0.5, 0.75]))
        return Ratio(q50, float(ratios[low]), float(ratios[high]), q25, q75)

    @property
    def disturbed(self) -> bool:
        """Whether something else kept the cores busy, so that the times say little."""
        return self.waited > _WAITED or any(self.spread(name) > _SPREAD for name in self.samples)

    def gain(self, name: str, baseline: str) -> float:
        """How many times faster `name` is than `baseline`, to decide by: the median over rounds; of a
        disturbed run the lower end of its interval, or the ratio of the fastest samples where that is less.
        """
        ratio = self.speedup(name, baseline)
        return min(ratio.low, self.best(baseline) / self.best(name)) if self.disturbed else ratio.value

    def summary(self, baseline: str | None = None) -> dict[str, Any]:
        """Everything as plain numbers, for JSON: seconds, and ratios to `baseline` where one is given."""
        out: dict[str, Any] = {}
        for name in self.samples:
            entry: dict[str, Any] = {
                "median_s": self.median(name),
                "p95_s": self.p95(name),
                "best_s": self.best(name),
                "spread": self.spread(name),
                "rounds": self.rounds,
                "inner": self.inner[name],
            }
            if baseline is not None and name != baseline:
                r = self.speedup(name, baseline)
                entry["speedup"] = r.value
                entry["speedup_ci95"] = [r.low, r.high]
                entry["speedup_iqr"] = [r.q25, r.q75]
            out[name] = entry
        return out


class Watch:
    """What was disturbed of the runs that `watched` has seen.

    Attributes
    ----------
    runs, disturbed : how many, and how many of them were disturbed.
    waited, spread : the largest of the disturbed runs; see `Timings`.
    """

    def __init__(self) -> None:
        self.runs = self.disturbed = 0
        self.waited = self.spread = 0.0

    def see(self, t: Timings) -> None:
        """Count a run."""
        self.runs += 1
        if t.disturbed:
            self.disturbed += 1
            self.waited = max(self.waited, t.waited)
            self.spread = max(self.spread, *map(t.spread, t.samples))

    def __str__(self) -> str:
        why = (
            f"for each second the process's threads waited up to {self.waited:.1f} s for a core, which other "
            "processes kept busy"
            if self.waited > _WAITED
            else f"samples of one kernel differed by up to {100 * self.spread:.0f}%"
        )
        return (
            f"{self.disturbed} of {self.runs} timings were disturbed: {why}; their gains are the least that "
            "they show, and the next call times them again"
        )


_watching: ContextVar[tuple[Watch, ...]] = ContextVar("pared_watching", default=())


@contextmanager
def watched() -> Iterator[Watch]:
    """Sees every run of `interleave` inside."""
    watch = Watch()
    token = _watching.set((*_watching.get(), watch))
    try:
        yield watch
    finally:
        _watching.reset(token)


def waited_for_cores(tasks: Path = Path("/proc/self/task")) -> int:
    """Nanoseconds that the process's threads have been ready to run and had no core; 0 where the system does
    not say (Linux does)."""
    total = 0
    for file in tasks.glob("*/schedstat"):
        with suppress(OSError, ValueError, IndexError):  # a thread that has ended
            total += int(file.read_text().split()[1])
    return total


@lru_cache(maxsize=1)
def last_level_cache() -> int:
    """Bytes of the largest cache that a core can reach; 32 MiB where the system does not say."""
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        unit = {"K": 1 << 10, "M": 1 << 20}.get(text[-1:], 1)
        if text.rstrip("KM").isdigit():
            sizes.append(int(text.rstrip("KM")) * unit)
    return max(sizes, default=32 << 20)


def rotate(make: Callable[[int], Call], nbytes: int) -> Call:
    """A callable that goes round copies of its operands which together exceed the last-level cache, but for
    operands so small that it would take more than 16384 copies: there the call itself is the cost.

    This is how a weight that is read once a token meets the kernel in a large model: from memory, while the
    code and the activations stay warm.

    Parameters
    ----------
    make : ``make(i)`` returns the callable of copy `i`, with memory of its own.
    nbytes : bytes of one copy that a call reads.
    """
    if nbytes <= 0:
        raise ValueError(f"nbytes: expected a positive number of bytes, got {nbytes}")
    copies = min(max(2, math.ceil(_COLD_FACTOR * last_level_cache() / nbytes)), _MOST_COPIES)
    following = itertools.cycle([make(i) for i in range(copies)]).__next__

    def call() -> object:
        return following()()

    return call


def _sample(call: Call, inner: int, clock: Callable[[], int]) -> float:
    start = clock()
    for _ in itertools.repeat(None, inner):
        call()
    return (clock() - start) * 1e-9 / inner


def _inner_count(call: Call, min_sample: float, clock: Callable[[], int]) -> int:
    inner = 1
    while True:
        seconds = _sample(call, inner, clock)
        if seconds * inner >= min_sample:
            return inner
        inner = max(2 * inner, math.ceil(1.2 * min_sample / max(seconds, 1e-9)))


def interleave(
    calls: Mapping[str, Call],
    *,
    budget: float = 0.5,
    min_rounds: int = 9,
    max_rounds: int = 2000,
    precision: float | None = None,
    min_sample: float = 50e-6,
    warmup: int = 2,
    flush: bool = False,
    seed: int = 0,
    clock: Callable[[], int] = time.perf_counter_ns,
    waits: Callable[[], int] = waited_for_cores,
) -> Timings:
    """Time callables against each other, round by round, in an order drawn anew for each round.

    Parameters
    ----------
    calls : name -> callable without arguments. What it returns is dropped.
    budget : seconds after which no further round begins, once `min_rounds` are done.
    min_rounds, max_rounds : bounds on the rounds, whatever the budget.
    precision : stop early, after `min_rounds`, when the 95 % interval of every ratio to the first callable is
        within this relative distance of it; None uses the whole budget.
    min_sample : seconds that one sample lasts at least; a shorter callable is repeated inside the sample.
    warmup : calls of each before anything is timed.
    flush : evict the caches before each sample, which then is a single call: everything is cold, the code
        too. For cold weights alone give callables from `rotate`.
    seed : of the order.
    clock : nanoseconds, monotonic.
    waits : nanoseconds that threads have waited for a core.

    Raises
    ------
    ValueError : no callables, or bounds that contradict each other. What a callable raises passes through.
    """
    if not calls:
        raise ValueError("calls: expected at least one callable, got none")
    if not 1 <= min_rounds <= max_rounds:
        raise ValueError(
            f"min_rounds: expected 1 <= min_rounds <= max_rounds, got {min_rounds} and {max_rounds}"
        )
    for call in calls.values():
        for _ in range(warmup):
            call()
    inner = {name: 1 if flush else _inner_count(call, min_sample, clock) for name, call in calls.items()}
    evict = np.ones(int(_COLD_FACTOR * last_level_cache()) // 8) if flush else None

    names = list(calls)
    order = random.Random(seed)
    samples: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.disable()
    try:
        begin, waited = clock(), waits()
        for done in range(1, max_rounds + 1):
            for name in order.sample(names, len(names)):
                if evict is not None:
                    evict += 1.0
                samples[name].append(_sample(calls[name], inner[name], clock))
            if done < min_rounds:
                continue
            if (clock() - begin) * 1e-9 >= budget:
                break
            # The interval is cheap beside a round of milliseconds, not beside one of microseconds.
            if precision is not None and done % 8 == 0 and _within(samples, precision, names):
                break
    finally:
        if collecting:
            gc.enable()
    t = _timings(samples, inner, max(0, waits() - waited) / max(1, clock() - begin))
    for watch in _watching.get():
        watch.see(t)
    return t


def _timings(samples: Mapping[str, list[float]], inner: Mapping[str, int], waited: float = 0.0) -> Timings:
    # A clock tick of nothing would make a ratio of nothing: a nanosecond is below any clock's resolution.
    return Timings({n: np.maximum(np.asarray(s), 1e-9) for n, s in samples.items()}, dict(inner), waited)


def _within(samples: Mapping[str, list[float]], precision: float, names: list[str]) -> bool:
    t = _timings(samples, {})
    ratios = (t.speedup(name, names[0]) for name in names[1:])
    return all(r.high - r.value <= precision * r.value >= r.value - r.low for r in ratios)
