"""``pared bench``: pared's kernels against torch's own on this machine, in one run.

A short look for users; ``make bench`` measures everything, with more baselines and the project's goals.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from rich import box
from rich.table import Table
from torch import Tensor
from torch.nn import functional

from pared import ops
from pared._timing import Call, Ratio, interleave, rotate


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

    def __str__(self) -> str:
        return f"{self.out} x {self.inp}, {self.tokens}"

    @property
    def flops(self) -> float:
        return 2.0 * self.out * self.inp * self.tokens


class Image(NamedTuple):
    """A convolution of one square image: kernel and stride square too, padded by half the kernel."""

    filters: int
    channels: int
    kernel: int
    stride: int
    size: int

    def __str__(self) -> str:
        stride = f"/{self.stride}" if self.stride > 1 else ""
        return f"{self.channels}-{self.filters} {self.kernel}x{self.kernel}{stride} at {self.size}"

    @property
    def flops(self) -> float:
        out = (self.size - 1) // self.stride + 1
        return 2.0 * self.filters * self.channels * self.kernel**2 * out**2


class Keys(NamedTuple):
    """A selection among so many float32 keys."""

    keys: int

    def __str__(self) -> str:
        return f"{self.keys / 1e6:g} million"

    @property
    def flops(self) -> float:
        return 0.0


Case = Shape | Image | Keys
Made = tuple[dict[str, Call], list[int]]  # the baseline, then one call a sparsity by its index; non-zeros

# The Linear layers of BERT-base and of MiniLM-L6, at one long text or a small batch.
SHAPES = (
    Shape(768, 768, 384),
    Shape(3072, 768, 384),
    Shape(768, 3072, 384),
    Shape(1536, 384, 1024),
    Shape(384, 1536, 1024),
)
SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95)


@dataclass(frozen=True)
class Suite:
    """Cases of one kernel, and how to set them up.

    Attributes
    ----------
    make : ``(case, sparsities) -> Made``.
    case : what a case is called at the head of its column.
    """

    title: str
    baseline: str
    make: Callable[[Any, Sequence[float]], Made]
    cases: tuple[Case, ...]
    sparsities: tuple[float, ...] = SPARSITIES
    case: str = "out x in, tokens"


@dataclass(frozen=True)
class Row:
    """One case at one sparsity; seconds are medians over interleaved rounds."""

    suite: str
    case: Case
    sparsity: float
    dense_s: float
    sparse_s: float
    ratio: Ratio
    nonzeros: int

    @property
    def dense_gflops(self) -> float:
        """GFLOP/s of the dense product."""
        return self.case.flops * 1e-9 / self.dense_s

    @property
    def sparse_gflops(self) -> float:
        """GFLOP/s on the non-zeros."""
        total = float(np.prod(self.case[:2])) * (self.case.kernel**2 if isinstance(self.case, Image) else 1)
        return self.case.flops * self.nonzeros / total * 1e-9 / self.sparse_s


def parse_sparsities(text: str) -> list[float]:
    """Read ``"0.5,0.9"``. Raises ``ValueError``."""
    try:
        values = [float(p) for p in text.split(",")]
    except ValueError:
        values = [-1.0]
    if not all(0 <= v < 1 for v in values):
        raise ValueError(f"expected numbers in [0, 1) with commas between, got {text!r}")
    return values


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32))


def _pruned(w: Tensor, sparsity: float, rows: int = 1) -> Tensor:
    """Zeros at random places, which is what magnitude pruning leaves of normally distributed weights; in
    blocks of `rows` outputs by one input."""
    groups = -(-w.shape[0] // rows)
    count = groups * (w.numel() // w.shape[0])
    keep = torch.ones(count, dtype=torch.bool)
    keep[torch.from_numpy(np.random.default_rng(1).permutation(count))[: round(sparsity * count)]] = False
    mask = keep.reshape(groups, -1).repeat_interleave(rows, 0)[: w.shape[0]]
    return w * mask.reshape(w.shape)


def _layer(case: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """Input, weight and bias."""
    return _normal(case.tokens, case.inp), _normal(case.out, case.inp, seed=2), _normal(case.out, seed=3)


def _linear(pack: Callable[[Tensor], ops.PackedWeight], rows: int = 1) -> Callable[[Any, Any], Made]:
    """Linear layers with weights in one format, warm."""

    def make(case: Shape, sparsities: Sequence[float]) -> Made:
        x, dense, bias = _layer(case)
        packed = [pack(_pruned(dense, s, rows)) for s in sparsities]

        def call(w: ops.PackedWeight) -> Call:
            return lambda: ops.linear(x, w, bias)

        calls: dict[str, Call] = {"dense": lambda: functional.linear(x, dense, bias)}
        return calls | {str(i): call(w) for i, w in enumerate(packed)}, [w.nnz for w in packed]

    return make


def _cold(pack: Callable[[Tensor], ops.PackedWeight]) -> Callable[[Any, Any], Made]:
    """Linear layers whose weights come from memory."""

    def make(case: Shape, sparsities: Sequence[float]) -> Made:
        x, dense, bias = _layer(case)

        def plain(_: int) -> Call:
            mine = dense.clone()
            return lambda: functional.linear(x, mine, bias)

        def sparse(packed: ops.PackedWeight) -> Callable[[int], Call]:
            def make(_: int) -> Call:
                mine = deepcopy(packed)
                return lambda: ops.linear(x, mine, bias)

            return make

        packed = [pack(_pruned(dense, s)) for s in sparsities]
        calls = {"dense": rotate(plain, dense.nbytes)}
        calls |= {str(i): rotate(sparse(w), w.nbytes) for i, w in enumerate(packed)}
        return calls, [w.nnz for w in packed]

    return make


def _quantized(case: Shape, sparsities: Sequence[float]) -> Made:
    """Int8 weights with dynamic activations against torch's dynamically quantized Linear."""
    x, dense, bias = _layer(case)
    layer = torch.nn.Linear(case.inp, case.out)
    layer.load_state_dict({"weight": dense, "bias": bias})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao says that it will move
        theirs = torch.ao.quantization.quantize_dynamic(  # type: ignore[no-untyped-call]
            torch.nn.Sequential(layer), {torch.nn.Linear}
        )
    w = ops.Int8.from_dense(dense)
    return {"dense": lambda: theirs(x), "0": lambda: ops.linear(x, w, bias)}, [dense.numel()]


def _conv(case: Image, sparsities: Sequence[float]) -> Made:
    """Convolutions; torch in its faster memory layout."""
    x = _normal(1, case.channels, case.size, case.size)
    dense = _normal(case.filters, case.channels, case.kernel, case.kernel, seed=2)
    bias = _normal(case.filters, seed=3)
    stride, pad = case.stride, case.kernel // 2
    last = [t.contiguous(memory_format=torch.channels_last) for t in (x, dense)]
    layouts = [
        lambda: functional.conv2d(x, dense, bias, stride, pad),
        lambda: functional.conv2d(last[0], last[1], bias, stride, pad),
    ]
    t = interleave({str(i): call for i, call in enumerate(layouts)}, budget=0.1, min_rounds=5)
    packed = [ops.CSR.from_dense(_pruned(dense, s)) for s in sparsities]

    def call(w: ops.CSR) -> Call:
        return lambda: ops.conv2d(x, w, bias, stride, pad)

    calls: dict[str, Call] = {"dense": min(enumerate(layouts), key=lambda c: t.median(str(c[0])))[1]}
    return calls | {str(i): call(w) for i, w in enumerate(packed)}, [w.nnz for w in packed]


def _selection(case: Keys, sparsities: Sequence[float]) -> Made:
    """The threshold that leaves that share out, against ``torch.kthvalue`` of the magnitudes."""
    (sparsity,) = sparsities
    w = _normal(case.keys)
    magnitudes, k = w.abs(), round(case.keys * (1 - sparsity))
    calls: dict[str, Call] = {
        "dense": lambda: magnitudes.kthvalue(case.keys - k + 1).values,
        "0": lambda: ops.select_threshold(w, k),
    }
    return calls, [k]


_COLD_SHAPES = (Shape(4096, 4096, 1), Shape(4096, 4096, 8))
_IMAGES = (  # of ResNet-50
    Image(64, 64, 3, 1, 56),
    Image(256, 256, 3, 1, 14),
    Image(256, 64, 1, 1, 56),
    Image(512, 256, 1, 2, 56),
)
SUITES: dict[str, Suite] = {
    "csr": Suite("CSR Linear, float32", "torch dense", _linear(ops.CSR.from_dense), SHAPES),
    "blocks": Suite(
        "Blocks of 4x1, float32 Linear",
        "torch dense",
        _linear(lambda w: ops.BSR.from_dense(w, block=(4, 1)), rows=4),
        SHAPES,
    ),
    "dense": Suite(
        "Dense Linear, float32, packed once", "torch dense", _linear(ops.Dense.from_dense), SHAPES, (0.0,)
    ),
    "bitmap": Suite(
        "Few tokens, weights from memory: bitmap, float32",
        "torch dense",
        _cold(ops.Bitmap.from_dense),
        _COLD_SHAPES,
        (0.5, 0.8, 0.9),
    ),
    "int8": Suite(
        "Int8 Linear, activations quantized on the way",
        "torch dense float32",
        _linear(ops.Int8.from_dense),
        SHAPES,
        (0.0,),
    ),
    "int8-torch": Suite(
        "Int8 Linear against torch's int8", "torch dynamically quantized", _quantized, SHAPES, (0.0,)
    ),
    "conv": Suite(
        "CSR Conv2d, float32",
        "torch's faster layout",
        _conv,
        _IMAGES,
        (0.8, 0.9),
        "channels-filters, kernel, image",
    ),
    "select": Suite(
        "Threshold selection, float32", "torch.kthvalue", _selection, (Keys(20_000_000),), (0.9,), "keys"
    ),
}


def measure(
    suite: str, case: Case, sparsities: Sequence[float], seconds: float, min_rounds: int = 15
) -> list[Row]:
    """Time one case: the baseline and every sparsity take turns; `seconds` are for all of them together."""
    with torch.inference_mode():
        calls, nonzeros = SUITES[suite].make(case, sparsities)
        t = interleave(calls, budget=seconds, min_rounds=min_rounds)
    return [
        Row(suite, case, s, t.median("dense"), t.median(str(i)), t.speedup(str(i), "dense"), n)
        for i, (s, n) in enumerate(zip(sparsities, nonzeros, strict=True))
    ]


def to_json(row: Row) -> dict[str, Any]:
    """Everything as plain numbers; seconds, shares of one, GFLOP/s."""
    return {
        **asdict(row),
        "case": list(row.case),
        "baseline": SUITES[row.suite].baseline,
        "dense_gflops": row.dense_gflops,
        "sparse_gflops": row.sparse_gflops,
    }


def table(rows: Sequence[Row]) -> Table:
    """The rows of one suite."""
    suite = SUITES[rows[0].suite]
    rates = any(r.case.flops for r in rows)
    t = Table(title=f"{suite.title}, against {suite.baseline}", box=box.SIMPLE_HEAVY)
    t.add_column(suite.case, min_width=22)
    t.add_column("zeros", justify="right")
    t.add_column(f"{'dense' if rates else 'theirs'}\nms", justify="right")
    if rates:
        t.add_column("dense\nGFLOP/s", justify="right")
    t.add_column("pared\nms", justify="right")
    if rates:
        t.add_column("pared GFLOP/s\non non-zeros", justify="right")
    t.add_column("ratio", justify="right")
    t.add_column("95 %\ninterval", justify="right")
    previous = None
    for r in rows:
        first = r.case != previous
        if first and previous is not None:
            t.add_section()
        previous = r.case
        color = "green" if r.ratio.low > 1 else "red" if r.ratio.high < 1 else "yellow"
        t.add_row(
            str(r.case) if first else "",
            f"{100 * r.sparsity:g} %",
            f"{r.dense_s * 1e3:.3f}",
            *([f"{r.dense_gflops:.0f}"] if rates else []),
            f"{r.sparse_s * 1e3:.3f}",
            *([f"{r.sparse_gflops:.0f}"] if rates else []),
            f"[bold {color}]{r.ratio.value:.2f}x[/]",
            f"{r.ratio.low:.2f}-{r.ratio.high:.2f}",
        )
    return t
