"""``python -m bench.gpu``: the suites in turn, a file of results that grows with every case, a table."""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import pkgutil
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench.gpu
from bench.gpu.measure import Machine, copy_rate, emulated_machine, lost, measure, table, this_machine
from pared._timing_cuda import EventClock

RESULTS = Path(__file__).parents[1] / "results"
BUDGET_S = 8 * 60.0
# What a user gains most from comes first.
ORDER = ("select", "int8", "decode", "stack", "block_sparse", "mlp", "csr", "two_four", "conv")


class DryClock:
    """Runs each call once, and gives times that no machine measured: they go nowhere."""

    def prepare(self, call: Callable[[int], object], copies: int, graph: bool) -> Callable[[], float]:
        for i in range(copies):
            call(i)
        return lambda: 1e-6


def suites(only: str) -> list[Any]:
    """The modules of this package that have cases, or those of them that a list with commas names.

    Raises ``ValueError`` for another name.
    """
    found = {m.name for m in pkgutil.iter_modules(bench.gpu.__path__)} - {"__main__"}
    modules = {n: importlib.import_module(f"bench.gpu.{n}") for n in found}
    known = sorted((n for n, m in modules.items() if hasattr(m, "cases")), key=_place)
    chosen = only.split(",") if only else known
    if unknown := set(chosen) - set(known):
        raise ValueError(f"--only: expected names among {', '.join(known)}, got {', '.join(sorted(unknown))}")
    return [modules[n] for n in known if n in chosen]


def _place(name: str) -> tuple[int, str]:
    return (ORDER.index(name) if name in ORDER else len(ORDER), name)


def results_path(machine: Machine, now: datetime.datetime) -> Path:
    device = re.sub(r"[^a-z0-9]+", "-", machine.name.lower()).strip("-")
    return RESULTS / f"gpu-{device}-{now:%Y%m%d-%H%M}.json"


def default_path() -> Path:
    """`results_path` of this machine, now."""
    return results_path(this_machine(), datetime.datetime.now())


class Results:
    """The file: what it holds of other suites stays, what is measured again is replaced."""

    def __init__(self, path: Path | None, facts: dict[str, Any]) -> None:
        self.path = path
        held = json.loads(path.read_text()) if path is not None and path.exists() else {}
        if held and held["machine"] != facts["machine"]:
            raise ValueError(
                f"--results: expected a file of {facts['machine']}, got one of {held['machine']}"
            )
        self.content: dict[str, Any] = {"failed": [], "unmeasured": [], "lines": [], **held, **facts}

    def forget(self, suite: str) -> None:
        """What failed in a suite or was not measured, before it is tried again."""
        for kind in ("failed", "unmeasured"):
            self.content[kind] = [t for t in self.content[kind] if t.partition(": ")[0] != suite]

    def add(self, kind: str, value: Any) -> None:
        if kind == "lines":
            key = value["suite"], value["case"]
            self.content[kind] = [o for o in self.content[kind] if (o["suite"], o["case"]) != key]
        self.content[kind].append(value)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            new = self.path.with_suffix(".tmp")
            new.write_text(json.dumps(self.content, indent=1))
            new.replace(self.path)  # a process that is killed leaves the file whole


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.gpu", description=__doc__)
    parser.add_argument("--only", default="", help=f"suites, with commas between: {', '.join(ORDER)}")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=BUDGET_S, help="no case begins after so many")
    parser.add_argument("--results", type=Path, help="the file; it may hold other suites")
    parser.add_argument("--skip", type=int, default=0, help="so many cases of the first suite")
    parser.add_argument("--dry-run", action="store_true", help="the flow on tiny problems; measures nothing")
    options = parser.parse_args(arguments)
    try:
        chosen = suites(options.only)
    except ValueError as e:
        parser.error(str(e))
    begin, now = time.monotonic(), datetime.datetime.now()
    if options.dry_run:
        machine, clock, rounds, path = emulated_machine(), DryClock(), 2, None
    else:
        machine, clock, rounds = this_machine(), EventClock(), options.rounds
        path = options.results or results_path(machine, now)
    copied = copy_rate(machine, clock, rounds)
    facts = {"machine": machine.facts(), "date": now.isoformat(timespec="seconds"), "rounds": rounds}
    facts["copy_bytes_s"] = copied
    results, lines, failed, late = Results(path, facts), [], [], []
    lost_at = None
    for suite in chosen:
        name = suite.__name__.rpartition(".")[2]
        if not options.skip:
            results.forget(name)
        for number, make in enumerate(suite.cases(machine)):
            if number < options.skip:
                continue
            if time.monotonic() - begin > options.seconds:
                late.append(f"{name}: from case {number} on")
                results.add("unmeasured", late[-1])
                break
            label = f"{name}: case {number}"
            try:
                case = make()
                label = f"{name}: {case.suite}: {case.name}"
                lines.append(measure(case, clock, rounds, copied))
            except Exception as e:  # a kernel that fails must not cost the figures of the others
                failed.append(f"{label}: {type(e).__name__}: {e}")
                results.add("failed", failed[-1])
                if lost():  # another process goes on
                    lost_at = name, number
                    break
            else:
                results.add("lines", lines[-1])
                print(f"{label} (at {time.monotonic() - begin:.0f} s)", file=sys.stderr, flush=True)
            case = None  # frees its data
        options.skip = 0
        if lost_at:
            break
    if options.dry_run:
        print(f"dry run: {len(lines)} cases would be measured; nothing was")
    else:
        print(table(lines))
        print(f"written to {path}")
    for text in failed:
        print(f"FAILED {text}", file=sys.stderr)
    for text in late:
        print(f"not measured, the {options.seconds:.0f} s were spent: {text}", file=sys.stderr)
    if lost_at:
        left = [m.__name__.rpartition(".")[2] for m in chosen]
        left = left[left.index(lost_at[0]) :]
        seconds = options.seconds - (time.monotonic() - begin)
        again = ["--only", left[0], "--skip", str(lost_at[1] + 1)]
        for rest in (again, ["--only", ",".join(left[1:])] if left[1:] else None):
            if rest and seconds > 0:
                common = ["--results", str(path), "--rounds", str(rounds), "--seconds", f"{seconds:.0f}"]
                begin = time.monotonic()
                subprocess.run([sys.executable, "-m", "bench.gpu", *rest, *common], check=False)
                seconds -= time.monotonic() - begin
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
