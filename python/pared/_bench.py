"""``pared bench``: sparse Linear against torch's dense one on this machine, in one run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from rich import box
from rich.table import Table

from pared import ops
from pared._timing import Ratio, interleave

# The Linear layers of BERT-base and of MiniLM-L6, at one long text or a small batch.
SHAPES = ("768,768,384", "3072,768,384", "768,3072,384", "1536,384,1024", "384,1536,1024")


class Shape(NamedTuple):
    """``y[tokens, out] = x[tokens, in] @ w[out, in].T``"""

    out: int
    inp: int
    tokens: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """Read ``"out,in,tokens"``. Raises ``ValueError``."""
        parts = text.split(",")
        if len(parts) != 3 or not all(p.strip().isdigit() and int(p) > 0 for p in parts):
            raise ValueError(f"expected out,in,tokens as three positive integers, got {text!r}")
        return cls(*map(int, parts))


def parse_sparsities(text: str) -> list[float]:
    """Read ``"0.5,0.9"``. Raises ``ValueError``."""
    try:
        values = [float(p) for p in text.split(",")]
    except ValueError:
        values = [-1.0]
    if not all(0 <= v < 1 for v in values):
        raise ValueError(f"expected numbers in [0, 1) with commas between, got {text!r}")
    return values


@dataclass(frozen=True)
class Row:
    """One shape at one sparsity; seconds are medians over interleaved rounds."""

    shape: Shape
    sparsity: float
    dense_s: float
    sparse_s: float
    ratio: Ratio
    nonzeros: int

    @property
    def dense_gflops(self) -> float:
        """GFLOP/s of the dense product."""
        return 2e-9 * self.shape.out * self.shape.inp * self.shape.tokens / self.dense_s

    @property
    def sparse_gflops(self) -> float:
        """GFLOP/s on the non-zeros."""
        return 2e-9 * self.nonzeros * self.shape.tokens / self.sparse_s


def measure(
    shape: Shape, sparsities: Sequence[float], seconds: float, advance: Callable[[], object]
) -> list[Row]:
    """Time one shape: dense and every sparsity take turns; `seconds` are for all of them together."""
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.standard_normal((shape.tokens, shape.inp), dtype=np.float32))
    dense = torch.from_numpy(rng.standard_normal((shape.out, shape.inp), dtype=np.float32))
    bias = torch.from_numpy(rng.standard_normal(shape.out, dtype=np.float32))
    # Zeros at random places are what magnitude pruning leaves of normally distributed weights.
    order = torch.from_numpy(rng.permutation(dense.numel()))
    packed = []
    for s in sparsities:
        w = dense.clone()
        w.view(-1)[order[: round(s * w.numel())]] = 0
        packed.append(ops.CSR.from_dense(w))

    def call(w: ops.CSR) -> Callable[[], object]:
        return lambda: ops.linear(x, w, bias)

    calls: dict[str, Callable[[], object]] = {"dense": lambda: torch.nn.functional.linear(x, dense, bias)}
    calls |= {str(i): call(w) for i, w in enumerate(packed)}
    with torch.inference_mode():
        t = interleave(calls, budget=seconds, min_rounds=15)
    advance()
    return [
        Row(shape, s, t.median("dense"), t.median(str(i)), t.speedup(str(i), "dense"), w.nnz)
        for i, (s, w) in enumerate(zip(sparsities, packed, strict=True))
    ]


def to_json(row: Row) -> dict[str, Any]:
    """Everything as plain numbers; seconds, shares of one, GFLOP/s."""
    return {
        **asdict(row),
        "shape": list(row.shape),
        "dense_gflops": row.dense_gflops,
        "sparse_gflops": row.sparse_gflops,
    }


def table(rows: Sequence[Row], machine: str) -> Table:
    """All rows; `machine` says what they ran on."""
    t = Table(title="CSR Linear, float32, against torch dense", box=box.SIMPLE_HEAVY, caption_justify="left")
    t.add_column("out x in, tokens")
    for name in ("zeros", "dense\nms", "dense\nGFLOP/s", "pared\nms", "pared GFLOP/s\non non-zeros"):
        t.add_column(name, justify="right")
    t.add_column("ratio", justify="right")
    t.add_column("95 %\ninterval", justify="right")
    previous = None
    for r in rows:
        first = r.shape != previous
        if first and previous is not None:
            t.add_section()
        previous = r.shape
        color = "green" if r.ratio.low > 1 else "red" if r.ratio.high < 1 else "yellow"
        t.add_row(
            f"{r.shape.out} x {r.shape.inp}, {r.shape.tokens}" if first else "",
            f"{100 * r.sparsity:g} %",
            f"{r.dense_s * 1e3:.3f}",
            f"{r.dense_gflops:.0f}",
            f"{r.sparse_s * 1e3:.3f}",
            f"{r.sparse_gflops:.0f}",
            f"[bold {color}]{r.ratio.value:.2f}x[/]",
            f"{r.ratio.low:.2f}-{r.ratio.high:.2f}",
        )
    t.caption = f"{machine}\nMedians; dense and every sparsity of a shape take turns, round by round."
    return t
