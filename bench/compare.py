"""Compares two benchmark files by their ratios: ``python -m bench.compare before.json after.json``.

Milliseconds differ from machine to machine and from hour to hour; a ratio to a baseline that ran interleaved
does not, or much less. So a row is compared by its speed-up over the same baseline in either file. A row has
become slower when its speed-up fell by more than the tolerance *and* the two 95 % intervals do not meet: a
noisy row is not a regression, and one that moved a little but surely is none either.

Exit code 1 when a row has become slower or is missing, so that a script may stop there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from bench.table import Row, geometric_mean, load

Key = tuple[str, str, str, int, bool]


@dataclass(frozen=True)
class Change:
    """One row in two files, against a baseline that both have."""

    key: Key
    baseline: str
    before: float
    after: float
    apart: bool  # the 95 % intervals do not meet

    @property
    def ratio(self) -> float:
        """Above 1: faster than before."""
        return self.after / self.before

    def verdict(self, tolerance: float) -> str:
        """``"slower"``, ``"faster"`` or ``""``."""
        if not self.apart or 1 - tolerance <= self.ratio <= 1 / (1 - tolerance):
            return ""
        return "slower" if self.ratio < 1 else "faster"


def key(row: Row) -> Key:
    return (row["suite"], row["case"], row["cell"], row["threads"], row["cold"])


def changes(before: Sequence[Row], after: Sequence[Row]) -> tuple[list[Change], list[Key]]:
    """What both files have, and the rows of the first that the second lacks.

    The baseline is the best rival of the first file; a row that lacks it in the second counts as missing.
    """
    new = {key(r): r for r in after}
    found, missing = [], []
    for row in before:
        other = new.get(key(row))
        rival = row["best_rival"]
        if other is None or rival not in other["speedup"]:
            missing.append(key(row))
            continue
        a, b = row["speedup"][rival], other["speedup"][rival]
        apart = a["low"] > b["high"] or b["low"] > a["high"]
        found.append(Change(key(row), rival, a["value"], b["value"], apart))
    return found, missing


def render(
    found: Sequence[Change], missing: Sequence[Key], tolerance: float, console: Console, verbose: bool = False
) -> None:
    """Print what moved, then a line of geometric means for each suite."""
    table = Table()
    for name, justify in (("suite", "left"), ("case", "left"), ("over", "left")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for name in ("before", "after", "ratio"):
        table.add_column(name, justify="right")
    table.add_column("")
    colors = {"slower": "red", "faster": "green", "": "dim"}
    for suite in dict.fromkeys(c.key[0] for c in found):
        rows = [c for c in found if c.key[0] == suite]
        for c in rows:
            word = c.verdict(tolerance)
            if word or verbose:
                _, case, cell, threads, cold = c.key
                name = f"{case}, {cell}, {threads} thr.{', cold' if cold else ''}"
                numbers = (f"{c.before:.2f}", f"{c.after:.2f}", f"{c.ratio:.2f}")
                table.add_row(suite, name, c.baseline, *numbers, word, style=colors[word])
        mean = geometric_mean(c.ratio for c in rows)
        table.add_row(
            suite, f"geometric mean of {len(rows)} rows", "", "", "", f"{mean:.2f}", "", style="bold"
        )
        table.add_section()
    console.print(table)
    for suite, case, cell, threads, cold in missing:
        console.print(f"[red]missing[/]: {suite}, {case}, {cell}, {threads} thr.{', cold' if cold else ''}")


def main(argv: Sequence[str] | None = None, console: Console | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description="Compare two result files.")
    parser.add_argument("before")
    parser.add_argument("after")
    parser.add_argument(
        "--tolerance", type=float, default=0.1, help="a fall of this share is a regression (default 0.1)"
    )
    parser.add_argument("--verbose", action="store_true", help="print unchanged rows as well")
    args = parser.parse_args(argv)
    if not 0 <= args.tolerance < 1:
        parser.error(f"--tolerance: expected a number in [0, 1), got {args.tolerance}")
    before, after = load(args.before), load(args.after)
    if not before:
        parser.error(f"{args.before}: expected benchmark rows, got none")
    found, missing = changes(before, after)
    render(found, missing, args.tolerance, console or Console(), args.verbose)
    slower = sum(c.verdict(args.tolerance) == "slower" for c in found)
    return 1 if slower or missing else 0


if __name__ == "__main__":
    sys.exit(main())
