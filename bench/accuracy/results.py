"""Bars, and what has been measured against them: paired differences over seeds, tables, JSON, the document.

A measure is a number of one seed, by name; a part's measures of all seeds are what the JSON file keeps, so
that a study can be run in pieces. A row of the table is a function of them.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from scipy.stats import t as students_t

Measures = Mapping[str, float]
BEGIN, END = "<!-- measured: python -m bench.accuracy -->", "<!-- end of measured -->"


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes
    ----------
    claim : what is compared.
    value : a seed's number; differences are taken within the seed.
    bar : ("<=" or ">=", number), or None where there is nothing to reach.
    unit : behind the value: "points" multiplies by 100, "%" too.
    """

    claim: str
    value: Callable[[Measures], float]
    bar: tuple[str, float] | None = None
    unit: str = ""

    @property
    def factor(self) -> float:
        return 100.0 if self.unit in ("points", "%") else 1.0


@dataclass(frozen=True)
class Result:
    """A row's mean over the seeds with its 95 % interval (Student's t; none of one seed), and the verdict."""

    row: Row
    seeds: int
    mean: float
    half_width: float | None

    @property
    def verdict(self) -> str:
        """yes: the mean clears the bar with its whole interval; in the mean: only the mean does."""
        if self.row.bar is None:
            return ""
        sign = 1.0 if self.row.bar[0] == ">=" else -1.0
        slack = sign * (self.mean - self.row.bar[1])
        if slack < 0:
            return "no"
        return "yes" if slack >= (self.half_width or 0.0) else "in the mean"

    def texts(self) -> tuple[str, str, str, str]:
        """Claim, value, bar and verdict, as they are printed."""

        def number(x: float) -> str:
            return (
                f"{x:.2f}"
                if self.row.unit == "points"
                else f"{x:.1f}"
                if self.row.unit == "%"
                else f"{x:.3f}"
            )

        unit = f" {self.row.unit}" if self.row.unit else ""
        half = "" if not self.half_width else f" ± {number(self.half_width)}"
        bar = "" if self.row.bar is None else f"{self.row.bar[0]} {self.row.bar[1]:g}{unit}"
        return self.row.claim, f"{number(self.mean)}{half}{unit}", bar, self.verdict


def evaluate(row: Row, by_seed: Sequence[Measures]) -> Result:
    values = [row.factor * row.value(m) for m in by_seed]
    n = len(values)
    half = None
    if n > 1:
        half = float(students_t.ppf(0.975, n - 1)) * statistics.stdev(values) / math.sqrt(n)
    return Result(row, n, statistics.fmean(values), half)


def of(name: str) -> Callable[[Measures], float]:
    return lambda m: m[name]


def minus(a: str, b: str) -> Callable[[Measures], float]:
    return lambda m: m[a] - m[b]


def ratio(a: str, b: str) -> Callable[[Measures], float]:
    return lambda m: m[a] / m[b]


def _sentence_rows() -> list[Row]:
    rows = [Row("retrieval, dense", of("retrieval, dense"), None, "%")]
    for label in ("50 %", "2:4"):
        for criterion in ("magnitude", "wanda", "sparsegpt"):
            name = f"{criterion}, {label}"
            rows.append(
                Row(
                    f"{name}: retrieval against dense",
                    minus(f"retrieval, {name}", "retrieval, dense"),
                    None,
                    "points",
                )
            )
            rows.append(Row(f"{name}: cosine with dense", of(f"cosine, {name}")))
    rows.append(
        Row(
            "8 bits: retrieval against dense",
            minus("retrieval, int8", "retrieval, dense"),
            (">=", -0.5),
            "points",
        )
    )
    rows.append(Row("8 bits: cosine with dense", of("cosine, int8")))
    return rows


def _layer_rows() -> list[Row]:
    rows = []
    for pattern in ("unstructured", "4:8", "2:4"):
        for criterion in ("sparsegpt", "wanda", "magnitude", "random"):
            rows.append(
                Row(f"{criterion}, {pattern}: mean output error", of(f"error, {criterion}, {pattern}"))
            )
        rows.append(
            Row(
                f"{pattern}: layers on which SparseGPT < Wanda < magnitude < random",
                of(f"in order, {pattern}"),
                (">=", 90),
                "%",
            )
        )
    for bits in (4, 3):
        rows.append(
            Row(
                f"{bits} bits: error of GPTQ / round-to-nearest", of(f"gptq to rtn, {bits} bits"), ("<=", 0.8)
            )
        )
    for bits in (8, 4, 3):
        rows.append(
            Row(
                f"{bits} bits: error of a scale a row / one a matrix, worst layer",
                of(f"worst channel to tensor, {bits} bits"),
                ("<=", 1.0),
            )
        )
    return rows


def _digit_rows() -> list[Row]:
    cubic, iterative, one_shot = ("95 %, cubic", "95 %, iterative", "95 %, one-shot")
    fewer = "12 times fewer weights"
    return [
        Row("dense: accuracy", of("dense"), None, "%"),
        Row(
            f"{fewer}, against dense after as many epochs", minus("12x", "12x, dense"), (">=", -1.0), "points"
        ),
        Row(f"{fewer}: counted", of("12x, times fewer"), (">=", 11.99)),
        Row(
            "95 % zeros, one-shot, against the dense model it starts from",
            minus(one_shot, "dense"),
            None,
            "points",
        ),
        Row("95 % zeros, cubic against iterative", minus(cubic, iterative), (">=", -0.5), "points"),
        Row("95 % zeros, cubic against one-shot", minus(cubic, one_shot), (">=", 0.0), "points"),
        Row("95 % zeros, iterative against one-shot", minus(iterative, one_shot), (">=", 0.0), "points"),
        Row("8 bits against the same in float32", minus("int8", "dense"), (">=", -0.5), "points"),
        Row("Taylor: rank correlation with removing each neuron", of("oracle, taylor"), (">=", 0.8)),
        Row("the same, above magnitude's by", minus("oracle, taylor", "oracle, magnitude"), (">=", 0.0)),
        Row("the same after training, Taylor", of("oracle of a trained model, taylor")),
        Row("the same after training, magnitude", of("oracle of a trained model, magnitude")),
        Row("the same after training, Fisher", of("oracle of a trained model, fisher")),
    ]


# part -> (title, rows)
TABLES: dict[str, tuple[str, list[Row]]] = {
    "layers": ("Layer outputs of MiniLM on held-out text", _layer_rows()),
    "digits": ("LeNet-300-100's shape on digits", _digit_rows()),
    "sentences": ("MiniLM's embeddings, without training", _sentence_rows()),
}


def results(study: Mapping[str, Any], part: str) -> list[Result]:
    """The rows of a part, from what a study's file keeps."""
    by_seed = [study[part]["seeds"][s] for s in sorted(study[part]["seeds"], key=int)]
    return [evaluate(row, by_seed) for row in TABLES[part][1]]


def caption(study: Mapping[str, Any], part: str) -> str:
    own = study[part]
    settings = ", ".join(f"{value} {key}" for key, value in own["settings"].items())
    return f"{len(own['seeds'])} seed(s); {settings}; {own['machine']}"


def table(study: Mapping[str, Any], part: str) -> Table:
    """For the terminal."""
    out = Table(title=TABLES[part][0], caption=caption(study, part))
    for heading in ("", "mean, 95 % interval", "bar", "holds"):
        out.add_column(heading, justify="left" if not heading else "right")
    styles = {"no": "red", "yes": "green", "in the mean": "yellow", "": None}
    for result in results(study, part):
        out.add_row(*result.texts(), style=styles[result.verdict])
    return out


def markdown(study: Mapping[str, Any]) -> str:
    """What belongs between the markers of the document."""
    lines = []
    for part, (title, _) in TABLES.items():
        if part not in study:
            continue
        lines += [
            f"## {title}",
            "",
            f"{caption(study, part)}.",
            "",
            "| | mean, 95 % interval | bar | holds |",
            "|---|---|---|---|",
        ]
        lines += ["| " + " | ".join(result.texts()) + " |" for result in results(study, part)]
        lines.append("")
    return "\n".join(lines)


def rewrite(document: str, study: Mapping[str, Any]) -> str:
    """The document with what is between its markers replaced."""
    head, begin, rest = document.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"document: expected the markers {BEGIN!r} and {END!r}, got none")
    return f"{head}{BEGIN}\n\n{markdown(study)}\n{END}{tail}"


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def write(path: Path, study: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(study, indent=1, sort_keys=True) + "\n")
