"""``python -m bench.gpu [--only NAME] [--dry-run]``: all suites, a table, a file of results."""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import pkgutil
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench.gpu
from bench.gpu.measure import Machine, measure, table
from pared._timing_cuda import EventClock

RESULTS = Path(__file__).parents[1] / "results"
BUDGET_S = 8 * 60.0


class DryClock:
    """Runs each call once, and gives times that no machine measured: they go nowhere."""

    def prepare(self, call: Callable[[int], object], copies: int, graph: bool) -> Callable[[], float]:
        for i in range(copies):
            call(i)
        return lambda: 1e-6


def suites(only: str) -> list[Any]:
    """The modules of this package that have cases."""
    names = [
        m.name for m in pkgutil.iter_modules(bench.gpu.__path__) if m.name not in {"__main__", "measure"}
    ]
    modules = [importlib.import_module(f"bench.gpu.{n}") for n in names if only in n]
    return [m for m in modules if hasattr(m, "cases")]


def this_machine() -> Machine:
    import torch

    from pared import _cuda

    _cuda.kernels(0)  # says what is missing
    p = torch.cuda.get_device_properties(0)
    return Machine("cuda", p.name, p.L2_cache_size)


def results_path(machine: Machine, now: datetime.datetime) -> Path:
    device = re.sub(r"[^a-z0-9]+", "-", machine.name.lower()).strip("-")
    return RESULTS / f"gpu-{device}-{now:%Y%m%d-%H%M}.json"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.gpu", description=__doc__)
    parser.add_argument("--only", default="", help="suites whose name contains this")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dry-run", action="store_true", help="the flow on tiny problems; measures nothing")
    options = parser.parse_args(arguments)
    chosen = suites(options.only)
    if not chosen:
        parser.error(f"--only: expected part of a suite's name, got {options.only!r}")
    if options.dry_run:
        machine, clock, rounds = Machine("cpu", "dry run", 1 << 20, dry=True), DryClock(), 2
    else:
        machine, clock, rounds = this_machine(), EventClock(), options.rounds
    begin, lines, failed, late = time.monotonic(), [], [], []
    for suite in chosen:
        for case in suite.cases(machine):
            if time.monotonic() - begin > BUDGET_S:
                late.append(f"{case.suite}: {case.name}")
                continue
            try:
                lines.append(measure(case, clock, rounds))
            except Exception as e:  # a kernel that fails must not cost the figures of the others
                failed.append(f"{case.suite}: {case.name}: {type(e).__name__}: {e}")
            else:
                print(f"{case.suite}: {case.name}", file=sys.stderr)
    if options.dry_run:
        print(f"dry run: {len(lines)} cases would be measured; nothing was")
    else:
        now = datetime.datetime.now()
        path = results_path(machine, now)
        path.parent.mkdir(exist_ok=True)
        facts = {"machine": machine.facts(), "date": now.isoformat(timespec="seconds"), "rounds": rounds}
        path.write_text(json.dumps({**facts, "failed": failed, "unmeasured": late, "lines": lines}, indent=1))
        print(table(lines))
        print(f"written to {path}")
    for text in failed:
        print(f"FAILED {text}", file=sys.stderr)
    for text in late:
        print(f"not measured, the {BUDGET_S:.0f} s were spent: {text}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
