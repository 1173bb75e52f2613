"""Draws the plots of the documents from benchmark files: ``python -m bench.plots results.json --out FOLDER``.

- ``speedup_<threads>t.svg``: times faster than the fastest dense rival, against the share of zeros; a line
  for each kernel, the geometric mean over its shapes, and the rival that was the fastest most often.
- ``latency_tokens.svg``: time of a layer against the number of tokens, from bench_tokens.py; a panel for each
  thread count.
- ``roofline_<threads>t.svg``: GFLOP/s that float32 Linear reaches against the operations a byte, under the
  machine's ceilings (measured when the plot is drawn: draw it where the file was made).

Needs matplotlib: ``pip install 'pared[report]'``.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.table import Row, geometric_mean, load, ratio_to_best

# Colours that the colour-blind can tell apart (Okabe and Ito), and a marker each for print.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8A8A00")
_MARKERS = "osD^vPX*"


def _sparsity(row: Row) -> float | None:
    found = re.fullmatch(r"([\d.]+) %", row["cell"])
    return float(found[1]) / 100 if found else None


def _figure(panels: int = 1) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    # The same file from the same numbers: no random ids, no date.
    matplotlib.rcParams.update(
        {"svg.hashsalt": "pared", "font.size": 10, "axes.grid": True, "grid.alpha": 0.3}
    )
    from matplotlib import pyplot

    return pyplot.subplots(
        1, panels, figsize=(8 if panels == 1 else 6 * panels, 5.4), layout="constrained", sharey=True
    )


def _save(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot

    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return path


def _machine(rows: Sequence[Row]) -> str:
    threads = rows[0]["threads"]
    return f"{rows[0]['cpu']}, {rows[0]['isa']}, {threads} thread{'s' if threads > 1 else ''}"


def _style(i: int) -> dict[str, Any]:
    return {"color": _COLORS[i % len(_COLORS)], "marker": _MARKERS[i % len(_MARKERS)], "markersize": 5}


def speedup(rows: Sequence[Row], out: Path) -> Path | None:
    """Speed-up over the best rival against sparsity, one line a suite and cache state."""
    lines: dict[str, dict[float, list[float]]] = {}
    rivals: dict[str, Counter[str]] = {}
    for row in rows:
        s = _sparsity(row)
        if s is not None and s > 0:
            lines.setdefault(row["suite"], {}).setdefault(s, []).append(ratio_to_best(row))
            rivals.setdefault(row["suite"], Counter())[row["best_rival"]] += 1
    lines = {name: points for name, points in lines.items() if len(points) > 1}
    if not lines:
        return None
    figure, axes = _figure()
    for i, (name, points) in enumerate(sorted(lines.items())):
        xs = sorted(points)
        axes.plot(
            [100 * x for x in xs],
            [geometric_mean(points[x]) for x in xs],
            label=f"{name}; over {rivals[name].most_common(1)[0][0]}",
            **_style(i),
        )
    axes.axhline(1.0, color="gray", linewidth=1)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}x")
    axes.set_xlabel("zeros, %")
    axes.set_ylabel("times faster than the fastest dense rival")
    axes.set_title(_machine(rows), fontsize=9)
    figure.legend(fontsize=7, loc="outside lower center", ncols=2)
    return _save(figure, out)


def tokens(rows: Sequence[Row], out: Path) -> Path | None:
    """Milliseconds against tokens: the first layer that was swept, each kernel at its largest sparsity."""
    swept = [r for r in rows if r.get("sweep")]
    if not swept:
        return None
    layer = (swept[0]["out"], swept[0]["in"])
    most = {r["kernel"]: max(q["sparsity"] for q in swept if q["kernel"] == r["kernel"]) for r in swept}
    counts = sorted({r["threads"] for r in swept})
    figure, panels = _figure(len(counts))
    for axes, threads in zip([panels] if len(counts) == 1 else panels, counts, strict=True):
        mine = [r for r in swept if r["threads"] == threads and (r["out"], r["in"]) == layer]
        for i, (kernel, sparsity) in enumerate(most.items()):
            for r in (r for r in mine if (r["kernel"], r["sparsity"]) == (kernel, sparsity)):
                xs = sorted(map(int, r["sweep"]))
                ys = [1e3 * {int(t): s for t, s in r["sweep"].items()}[x] for x in xs]
                label = f"{kernel}, {100 * sparsity:.0f} % zeros" if sparsity else kernel
                style = _style(i) | {"markersize": 3, "linestyle": "--" if i >= len(_COLORS) else "-"}
                axes.plot(xs, ys, label=label if threads == counts[0] else None, **style)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
        axes.set_xlabel("tokens")
        axes.set_title(f"{layer[0]}x{layer[1]}; {_machine(mine)}", fontsize=9)
    (panels if len(counts) == 1 else panels[0]).set_ylabel("ms a call")
    figure.legend(fontsize=7, loc="outside lower center", ncols=4)
    return _save(figure, out)


def roofline(rows: Sequence[Row], out: Path) -> Path | None:
    """GFLOP/s of the non-zeros against operations a byte of input, weight and output, under the ceilings."""
    from bench.roofline import measure

    suites: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        # The ceilings are float32's, and the bytes a non-zero those of the panel formats.
        panel = row.get("dtype") == "float32" and not row["cold"]
        if not panel or row["gflops"] is None or "nnz" not in row or not row.get("tokens"):
            continue
        work = 2.0 * row["tokens"] * row["nnz"]
        moved = 4.0 * row["tokens"] * (row["in"] + row["out"]) + 6.0 * row["nnz"]
        suites.setdefault(row["suite"], []).append((work / moved, row["gflops"]))
    if not suites:
        return None
    ceilings = measure(rows[0]["threads"])
    figure, axes = _figure()
    reach = [x for points in suites.values() for x, _ in points]
    xs = [min(reach) / 2 * (4 * max(reach) / min(reach)) ** (i / 99) for i in range(100)]
    for level in ceilings.levels:
        ys = [min(ceilings.fma, level.load * x) * 1e-9 for x in xs]
        axes.plot(xs, ys, color="gray", linewidth=1)
        axes.annotate(level.name, (xs[4], ys[4]), fontsize=7, color="gray")
    axes.axhline(ceilings.panel * 1e-9, color="gray", linestyle=":", linewidth=1)
    axes.annotate("one load a multiply-add", (xs[55], ceilings.panel * 1e-9), fontsize=7, color="gray")
    for i, (name, points) in enumerate(sorted(suites.items())):
        axes.plot(*zip(*points, strict=True), label=name, linestyle="", **_style(i))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    axes.set_xlabel("operations a byte of input, weight and output")
    axes.set_ylabel("GFLOP/s of the non-zeros")
    axes.set_title(_machine(rows), fontsize=9)
    figure.legend(fontsize=7, loc="outside lower center", ncols=2)
    return _save(figure, out)


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Every plot that the rows have data for."""
    made: list[Path | None] = [tokens(rows, folder / "latency_tokens.svg")]
    for n in sorted({r["threads"] for r in rows}):
        mine = [r for r in rows if r["threads"] == n]
        made += (
            speedup(mine, folder / f"speedup_{n}t.svg"),
            roofline(mine, folder / f"roofline_{n}t.svg"),
        )
    return [path for path in made if path is not None]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.plots", description="Draw the plots.")
    parser.add_argument("results", nargs="+", help="files of pytest's --benchmark-json")
    parser.add_argument("--out", type=Path, default=Path("docs/images"), help="folder (default docs/images)")
    args = parser.parse_args(argv)
    rows: Iterable[Row] = (row for file in args.results for row in load(file))
    args.out.mkdir(parents=True, exist_ok=True)
    made = draw(list(rows), args.out)
    for path in made:
        print(path)
    if not made:
        print("no rows that a plot could show", file=sys.stderr)
    return 0 if made else 1


if __name__ == "__main__":
    sys.exit(main())
