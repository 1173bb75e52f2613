"""Prints benchmark results against the project's goals: ``python -m bench.table results.json``.

For each suite, thread count and cache state one table: a line a case, a column a cell, the entry the speed-up
over the fastest rival. Below: geometric means, also against each baseline alone, the share of the roofline
limit, the goal, and whether it is reached. A line that falls short of the goal has the limit beside it:
"2.10 (60 % of 3.5)" is 2.10 times the rival where the roofline model allows 3.50. Under the table, for each
cell that does not reach its goal: how far it is from goal and limit, and why, where that has been found out.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.goals import ENOUGH, GOALS, REASONS, SOURCE

Row = dict[str, Any]

# (key of a row, label of the table's line, factor)
_RATES = (
    ("gflops", "  GFLOP/s", 1.0),
    ("gbytes_s", "  GB/s", 1.0),
    ("limit_share", "  % of the limit", 100.0),
)


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(v) for v in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def ratio_to_best(row: Row) -> float:
    return float(row["speedup"][row["best_rival"]]["value"])


def verdict(suite: str, cell: str, rows: Sequence[Row]) -> tuple[float | None, bool]:
    """The goal of a cell, if there is one, and whether its rows reach it."""
    goal = GOALS.get(suite, {}).get(cell)
    if goal is None:
        return None, False
    shares = [r["limit_share"] for r in rows if r["limit_share"] is not None]
    return goal, (
        geometric_mean(map(ratio_to_best, rows)) >= ENOUGH * goal
        # More than all of a limit says that its ceilings were measured beside other work.
        or (len(shares) == len(rows) and max(shares) <= 1 and geometric_mean(shares) >= ENOUGH)
    )


def _speedup(rows: Sequence[Row], goal: float | None) -> str:
    """The rows' mean speed-up; where that is short of the goal also the share of the limit, and the limit."""
    mean = geometric_mean(map(ratio_to_best, rows))
    shares = [r["limit_share"] for r in rows if r["limit_share"] is not None]
    if goal is None or mean >= ENOUGH * goal or len(shares) < len(rows):
        return f"{mean:.2f}"
    share = geometric_mean(shares)
    return f"{mean:.2f} ({share * 100:.0f} % of {mean / share:.1f})"


def shortfalls(suite: str, rows: Sequence[Row]) -> list[str]:
    """A line for each cell that does not reach its goal, and one with the reason where it is known."""
    lines = []
    for cell in _ordered(r["cell"] for r in rows):
        chosen = [r for r in rows if r["cell"] == cell]
        goal, reached = verdict(suite, cell, chosen)
        if goal is None or reached:
            continue
        mean = geometric_mean(map(ratio_to_best, chosen))
        shares = [r["limit_share"] for r in chosen if r["limit_share"] is not None]
        line = f"{cell}: {mean:.2f} of {goal:g}"
        if len(shares) == len(chosen):
            share = geometric_mean(shares)
            line += f", {share * 100:.0f} % of the machine's limit of {mean / share:.1f}"
            if mean / share < ENOUGH * goal:
                line += ", which is below the goal"
        lines.append(line)
    return [*lines, f"because {REASONS[suite]}"] if lines and suite in REASONS else lines


def _ordered(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def _table(suite: str, rows: Sequence[Row]) -> Table:
    cells = _ordered(r["cell"] for r in rows)
    by_cell = {c: [r for r in rows if r["cell"] == c] for c in cells}
    verdicts = {c: verdict(suite, c, by_cell[c]) for c in cells}
    table = Table()
    table.add_column("times faster than the best rival", no_wrap=True)
    for c in cells:
        table.add_column(c, justify="right", no_wrap=True)

    def line(label: str, entries: Iterable[str], **style: Any) -> None:
        table.add_row(label, *entries, **style)

    for case in _ordered(r["case"] for r in rows):
        found = {r["cell"]: r for r in rows if r["case"] == case}
        line(case, (_speedup([found[c]], verdicts[c][0]) if c in found else "" for c in cells))
    table.add_section()
    line(
        "geometric mean",
        (_speedup(by_cell[c], verdicts[c][0]) for c in cells),
        style="bold",
    )
    for baseline in _ordered(name for r in rows for name in r["speedup"]):
        means = []
        for c in cells:
            having = [r["speedup"][baseline]["value"] for r in by_cell[c] if baseline in r["speedup"]]
            means.append(f"{geometric_mean(having):.2f}" if having else "")
        line(f"  over {baseline}", means, style="dim")
    for key, label, scale in _RATES:
        if any(r[key] is not None for r in rows):
            means = [[r[key] * scale for r in by_cell[c] if r[key] is not None] for c in cells]
            line(label, (f"{geometric_mean(m):.0f}" if m else "" for m in means), style="dim")
    if any(goal is not None for goal, _ in verdicts.values()):
        goals = ("" if goal is None else f"{goal:g}" for goal, _ in verdicts.values())
        line(f"goal ({SOURCE})", goals)
        reached = (
            "" if goal is None else "[green]yes" if ok else "[red]no" for goal, ok in verdicts.values()
        )
        line("reached", reached)
    return table


def render(rows: Sequence[Row], console: Console) -> None:
    """Print every table of the rows."""
    if not rows:
        return
    machine = rows[0]
    console.print(f"\n{machine['cpu']}, {machine['isa']}; medians of ratios within interleaved rounds")
    for suite, threads, cold in _ordered((r["suite"], r["threads"], r["cold"]) for r in rows):
        chosen = [r for r in rows if (r["suite"], r["threads"], r["cold"]) == (suite, threads, cold)]
        plural = "s" if threads > 1 else ""
        console.print(f"\n[bold]{suite}[/] - {threads} thread{plural}, {'cold' if cold else 'warm'}")
        console.print(_table(suite, chosen))
        for line in shortfalls(suite, chosen):
            console.print(f"  {line}", highlight=False)


def load(path: str | Path) -> list[Row]:
    """The rows of a ``--benchmark-json`` file, or of one that ``pared bench --json`` wrote."""
    data = json.loads(Path(path).read_text())
    if "benchmarks" not in data:
        rows: list[Row] = data["results"]
        return rows
    return [b["extra_info"] for b in data["benchmarks"] if "suite" in b["extra_info"]]


def main(argv: Sequence[str]) -> int:
    if len(argv) != 1:
        print("usage: python -m bench.table results.json", file=sys.stderr)
        return 2
    render(load(argv[0]), Console())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
