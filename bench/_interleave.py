"""From the package's interleaved timer to pytest-benchmark's tables and JSON.

pytest-benchmark times one function to the end before the next begins. Here `pared._timing.interleave` does
the timing, and pytest-benchmark is handed the finished samples through its own interface: the test's timer is
a clock that a replay of the samples sets. Everything else that was learnt goes to ``extra_info``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pared
from pared import _core
from pared._timing import Timings, interleave


class ReplayClock:
    """Stands still except when a replayed sample moves it. Seconds, as pytest-benchmark's timers are."""

    __name__ = "interleaved"

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def replay(self, samples: Iterable[float]) -> Callable[[], None]:
        """A function whose n-th call lasts the n-th sample."""
        following = iter(samples)

        def step() -> None:
            self.now += next(following)

        return step


CLOCK = ReplayClock()

# One dict a benchmark: what bench/table.py prints and the JSON file keeps.
Row = dict[str, Any]


def compare(
    benchmark: Any,
    calls: Mapping[str, Callable[[], object]],
    *,
    suite: str,
    case: str,
    cell: str,
    rivals: Sequence[str],
    target: str = "pared",
    work: float | None = None,
    moved: float | None = None,
    limit_s: float | None = None,
    cold: bool = False,
    facts: Mapping[str, Any] | None = None,
    timings: Timings | None = None,
    **timing: Any,
) -> Timings:
    """Interleave `calls`, hand the target's samples to pytest-benchmark, and record a row.

    Parameters
    ----------
    suite, case, cell : where the row stands: the table, its line, its column. Goals are looked up by suite
        and cell (bench/goals.py).
    rivals : the baselines that a goal counts against: the fastest of them. Others are printed beside.
    work : floating-point operations that count (of the non-zeros: two each and position), for GFLOP/s.
    moved : bytes that have to move, for GB/s.
    limit_s : the least seconds that the roofline model allows; the row gets the share attained.
    cold : the operands come from memory (callables made by `pared._timing.rotate`).
    timings : of `calls`, where they were run before; otherwise they are run now.
    timing : passed to `interleave`.
    """
    missing = [name for name in (target, *rivals) if name not in calls]
    if missing or not rivals:
        raise ValueError(f"calls: expected {target!r} and the rivals among them, got {sorted(calls)}")
    t = timings or interleave(calls, **{"budget": 0.3, "min_rounds": 7, "precision": 0.02, **timing})
    summary = t.summary()
    best = min(rivals, key=t.median)
    seconds = t.median(target)
    row: Row = {
        "suite": suite,
        "case": case,
        "cell": cell,
        "target": target,
        "best_rival": best,
        "speedup": {name: vars(t.speedup(target, name)) for name in calls if name != target},
        "times": summary,
        "threads": _core.num_threads(),
        "isa": pared.isa(),
        "cpu": _core.cpu_brand(),
        "cold": cold,
        "gflops": None if work is None else work / seconds * 1e-9,
        "gbytes_s": None if moved is None else moved / seconds * 1e-9,
        "limit_share": None if limit_s is None else limit_s / seconds,
        **(facts or {}),
    }
    benchmark.group = f"{suite}, {row['threads']} thread{'s' if row['threads'] > 1 else ''}"
    benchmark.extra_info.update(row)
    samples = t.samples[target].tolist()
    benchmark.pedantic(CLOCK.replay(samples), rounds=len(samples), iterations=1)
    return t
