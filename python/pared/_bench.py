"""``pared bench``: pared's kernels against torch's own, and with ``--peers`` against every engine at hand.

A short look for users; ``make bench`` measures everything, with the project's goals.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from rich import box
from rich.table import Table
from torch import Tensor
from torch.nn import functional

from pared import _core, _peers, ops
from pared._limits import (
    conv_int8_limit,
    conv_limit,
    expand_limit,
    int8_limit,
    linear_limit,
    read_limit,
)
from pared._machine import Ceilings
from pared._machine import measure as ceilings
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
        if len(parts) != 3 or not all(p.strip().isdecimal() and int(p) > 0 for p in parts):
            raise ValueError(f"expected out,in,tokens as three positive integers, got {text!r}")
        return cls(*map(int, parts))

    def __str__(self) -> str:
        return f"{self.out} x {self.inp}, {self.tokens}"

    @property
    def flops(self) -> float:
        return 2.0 * self.out * self.inp * self.tokens

    @property
    def few(self) -> bool:
        """Whether reading the weight is the cost, so that it matters where it is read from."""
        return self.tokens <= 16


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


class Size(NamedTuple):
    """What a packed weight holds (or a selection reads)."""

    nonzeros: int
    nbytes: int


# The baseline, then one call a sparsity by its index; what each has in memory.
Made = tuple[dict[str, Call], list[Size]]
# (one thread's ceilings, those of all, case, weight, whether it comes from memory) -> seconds
Limit = Callable[[Ceilings, Ceilings, Any, Size, bool], float]

Pack = Callable[[Tensor], ops.PackedWeight]

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
    make : ``(case, sparsities, cold) -> Made``; cold: weights come from memory.
    peers : ``(case, sparsities, cold, threads)`` to the other engines' calls by name; ``"name@1"`` is for the
        second sparsity alone. None: another suite has them.
    limit : the least seconds that the machine's ceilings allow.
    quick : the cases of a short look.
    case : what a case is called at the head of its column.
    dtype : of weights and products.
    """

    title: str
    baseline: str
    make: Callable[[Any, Sequence[float], bool], Made]
    peers: Callable[[Any, Sequence[float], bool, int], dict[str, Call]] | None
    limit: Limit
    cases: tuple[Case, ...]
    quick: tuple[Case, ...]
    sparsities: tuple[float, ...] = SPARSITIES
    case: str = "out x in, tokens"
    dtype: str = "float32"

    def states(self, case: Case, peers: bool) -> tuple[bool, ...]:
        """Whether the weights of a case come from memory: no, and where reading them is the cost, yes; beside
        other engines both."""
        few = isinstance(case, Shape) and case.few
        return (False, True) if few and peers else (few,)


class Peer(NamedTuple):
    """Another engine in the rounds of a row."""

    seconds: float
    ratio: Ratio  # pared over it


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
    cold: bool
    threads: int
    limit_s: float  # the least that the machine's ceilings allow
    peers: dict[str, Peer] | None = None

    @property
    def limit_share(self) -> float:
        """Of the speed that the ceilings allow; above 1 where they were measured beside other work."""
        return self.limit_s / self.sparse_s

    @property
    def best(self) -> tuple[str, Ratio]:
        """The fastest of the baseline and the engines that do the same work, and pared over it."""
        rivals = {SUITES[self.suite].baseline: Peer(self.dense_s, self.ratio)}
        rivals |= {name: p for name, p in (self.peers or {}).items() if name != _peers.BARE}
        name = min(rivals, key=lambda n: rivals[n].seconds)
        return name, rivals[name].ratio

    @property
    def dense_gflops(self) -> float:
        """GFLOP/s of the dense product."""
        return self.case.flops * 1e-9 / self.dense_s

    @property
    def sparse_gflops(self) -> float:
        """GFLOP/s on the non-zeros."""
        total = float(np.prod(self.case[:2])) * (self.case.kernel**2 if isinstance(self.case, Image) else 1)
        return self.case.flops * self.nonzeros / total * 1e-9 / self.sparse_s


def check_fits(case: Shape) -> None:
    """Raise ``ValueError`` for a layer whose weight and activations are larger than the machine's memory."""
    needed = 4 * (case.out * case.inp + case.tokens * (case.inp + case.out))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise ValueError(
            f"expected a layer that fits into {memory / 1e9:.0f} GB of memory, got {case}, which takes "
            f"{needed / 1e9:.0f} GB"
        )


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
    drawn = torch.from_numpy(np.random.default_rng(1).random(count, dtype=np.float32))
    keep = torch.as_tensor(ops.topk_mask(drawn, count - round(sparsity * count)))
    mask = keep.reshape(groups, -1).repeat_interleave(rows, 0)[: w.shape[0]]
    return w * mask.reshape(w.shape)


def _layer(case: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """Input, weight and bias."""
    return _normal(case.tokens, case.inp), *_weight(case.out, case.inp)


@lru_cache(maxsize=1)
def _weight(out: int, inp: int) -> tuple[Tensor, Tensor]:
    """And bias, the same for all numbers of tokens."""
    return _normal(out, inp, seed=2), _normal(out, seed=3)


# A layer comes with some numbers of tokens, from cache and from memory, with one thread and several, in one
# suite after the other: it is packed once for what follows each other, and converted once for all suites.
@lru_cache(maxsize=1)
def _packed(
    pack: Pack, out: int, inp: int, block: tuple[int, int], sparsities: tuple[float, ...]
) -> list[ops.PackedWeight]:
    dense, _ = _weight(out, inp)
    return [pack(_blocks_pruned(dense, s, block)) for s in sparsities]


@lru_cache(maxsize=8)
def _converted(out: int, inp: int) -> _peers.Converted:
    return _peers.one_layer(*_weight(out, inp))


def _blocks_pruned(w: Tensor, sparsity: float, block: tuple[int, int]) -> Tensor:
    """The same in blocks of outputs by inputs."""
    rows, columns = block
    small = torch.ones(-(-w.shape[0] // rows), -(-w.shape[1] // columns))
    mask = _pruned(small, sparsity).repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    return w * mask[: w.shape[0], : w.shape[1]]


def _copies(make: Callable[[], Call], nbytes: int, cold: bool) -> Call:
    return rotate(lambda _: make(), nbytes) if cold else make()


def _sizes(packed: Sequence[ops.PackedWeight]) -> list[Size]:
    return [Size(w.nnz, w.nbytes) for w in packed]


def _panel_limit(shared: int) -> Limit:
    """Of float32 panel products in which so many rows use a loaded vector."""

    def limit(one: Ceilings, c: Ceilings, case: Shape, w: Size, cold: bool) -> float:
        return linear_limit(c, *case, w.nonzeros, shared)

    return limit


def _expand_limit(itemsize: int) -> Limit:
    """Of bitmaps, whose weight is read or expanded."""

    def limit(one: Ceilings, c: Ceilings, case: Shape, w: Size, cold: bool) -> float:
        return expand_limit(c, *case, w.nbytes, cold, itemsize)

    return limit


def _bytes_limit(one: Ceilings, c: Ceilings, case: Shape, w: Size, cold: bool) -> float:
    """Of 8-bit products, beside which the weight is read."""
    return max(int8_limit(c, *case, w.nonzeros), read_limit(c, w.nbytes, cold))


def _four_limit(one: Ceilings, c: Ceilings, case: Shape, w: Size, cold: bool) -> float:
    """The same of 4 bits, where a zero is multiplied like any other value."""
    return max(int8_limit(c, *case), read_limit(c, w.nbytes, cold))


def _linear(pack: Pack, block: tuple[int, int] = (1, 1), int8: bool = False) -> dict[str, Any]:
    """Linear layers with weights in one format: what `Suite` needs to make them and their peers."""

    def make(case: Shape, sparsities: Sequence[float], cold: bool) -> Made:
        x, dense, bias = _layer(case)

        def plain() -> Call:
            mine = dense.clone()
            return lambda: functional.linear(x, mine, bias)

        def sparse(packed: ops.PackedWeight) -> Call:
            def one() -> Call:
                mine = deepcopy(packed)
                return lambda: ops.linear(x, mine, bias)

            return _copies(one, packed.nbytes, cold)

        packed = _packed(pack, case.out, case.inp, block, tuple(sparsities))
        calls = {"dense": _copies(plain, dense.nbytes, cold)}
        return calls | {str(i): sparse(w) for i, w in enumerate(packed)}, _sizes(packed)

    def peers(case: Shape, sparsities: Sequence[float], cold: bool, threads: int) -> dict[str, Call]:
        x, dense, _ = _layer(case)
        found = _converted(case.out, case.inp).peers([x], threads, int8)
        if int8:
            found[_peers.BARE] = _peers.int_mm(dense, x)
        calls = {name: _copies(peer.make, peer.nbytes, cold) for name, peer in found.items()}
        if not int8:
            for i, s in enumerate(sparsities):
                w = _peers.sparse_csr(_blocks_pruned(dense, s, block), x)
                calls[f"torch.sparse CSR@{i}"] = _copies(w.make, w.nbytes, cold)
        return calls

    return {"make": make, "peers": peers}


def _int8_torch(case: Shape, sparsities: Sequence[float], cold: bool) -> Made:
    """Int8 weights with dynamic activations against torch's dynamically quantized Linear."""
    x, dense, bias = _layer(case)
    theirs = _peers.torch_dynamic(torch.backends.quantized.engine, _peers.layer_of(dense, bias))
    w = ops.Int8.from_dense(dense)
    return {"dense": lambda: theirs(x), "0": lambda: ops.linear(x, w, bias)}, _sizes([w])


def _convolution(case: Image) -> tuple[Tensor, Tensor, Tensor]:
    """Image, weight and bias."""
    x = _normal(1, case.channels, case.size, case.size)
    return (
        x,
        _normal(case.filters, case.channels, case.kernel, case.kernel, seed=2),
        _normal(case.filters, seed=3),
    )


def _conv(pack: Pack, block: tuple[int, int] = (1, 1), int8: bool = False) -> dict[str, Any]:
    """Convolutions with weights in one format; torch in its faster memory layout."""

    def pruned(w: Tensor, sparsity: float) -> Tensor:
        """Zeros in blocks of filters by channels at a tap."""
        flat = w.permute(0, 2, 3, 1).reshape(len(w), -1)
        f, c, *kernel = w.shape
        return _blocks_pruned(flat, sparsity, block).reshape(f, *kernel, c).permute(0, 3, 1, 2).contiguous()

    def make(case: Image, sparsities: Sequence[float], cold: bool) -> Made:
        x, dense, bias = _convolution(case)
        stride, pad = case.stride, case.kernel // 2
        last = [t.contiguous(memory_format=torch.channels_last) for t in (x, dense)]
        layouts = [
            lambda: functional.conv2d(x, dense, bias, stride, pad),
            lambda: functional.conv2d(last[0], last[1], bias, stride, pad),
        ]
        t = interleave({str(i): call for i, call in enumerate(layouts)}, budget=0.1, min_rounds=5)
        packed = [pack(pruned(dense, s)) for s in sparsities]

        def call(w: Any) -> Call:
            return lambda: ops.conv2d(x, w, bias, stride, pad)

        calls: dict[str, Call] = {"dense": min(enumerate(layouts), key=lambda c: t.median(str(c[0])))[1]}
        return calls | {str(i): call(w) for i, w in enumerate(packed)}, _sizes(packed)

    def peers(case: Image, sparsities: Sequence[float], cold: bool, threads: int) -> dict[str, Call]:
        x, dense, bias = _convolution(case)
        plain = torch.nn.Conv2d(case.channels, case.filters, case.kernel, case.stride, case.kernel // 2)
        plain.load_state_dict({"weight": dense, "bias": bias})
        model = torch.nn.Sequential(plain).eval().requires_grad_(False)
        found = _peers.whole_models(model, [x], threads, int8=False)
        return found | (_peers.int8_convolutions(plain, x, threads) if int8 else {})

    return {"make": make, "peers": peers}


def _conv_limit(one: Ceilings, c: Ceilings, case: Image, w: Size, cold: bool) -> float:
    return conv_limit(one, c, **case._asdict(), images=1, nnz=w.nonzeros, nbytes=w.nbytes)


def _conv_int8_limit(one: Ceilings, c: Ceilings, case: Image, w: Size, cold: bool) -> float:
    out = ((case.size - 1) // case.stride + 1) ** 2
    return conv_int8_limit(c, out * w.nonzeros, case.channels, case.size**2, case.filters, out)


def _keys(case: Keys, sparsity: float) -> tuple[Tensor, Tensor, int]:
    """Weights, their magnitudes, and how many are to be selected."""
    w = _normal(case.keys)
    return w, w.abs(), round(case.keys * (1 - sparsity))


def _selection(case: Keys, sparsities: Sequence[float], cold: bool) -> Made:
    """The threshold that leaves that share out, against ``torch.kthvalue`` of the magnitudes."""
    w, magnitudes, k = _keys(case, *sparsities)
    calls: dict[str, Call] = {
        "dense": lambda: magnitudes.kthvalue(case.keys - k + 1).values,
        "0": lambda: ops.select_threshold(w, k),
    }
    return calls, [Size(k, w.nbytes)]


def _read_limit(one: Ceilings, c: Ceilings, case: Keys, w: Size, cold: bool) -> float:
    """One read of the data."""
    return read_limit(c, w.nbytes, cold=False)


def _selection_peers(case: Keys, sparsities: Sequence[float], cold: bool, threads: int) -> dict[str, Call]:
    _, magnitudes, k = _keys(case, *sparsities)
    array = magnitudes.numpy()
    return {
        "torch.topk": lambda: magnitudes.topk(k, sorted=False),
        "numpy.partition": lambda: np.partition(array, case.keys - k),
    }


_FEW = (Shape(4096, 4096, 1), Shape(4096, 4096, 8))
_IMAGES = (  # of ResNet-50
    Image(64, 64, 3, 1, 56),
    Image(256, 256, 3, 1, 14),
    Image(256, 64, 1, 1, 56),
    Image(512, 256, 1, 2, 56),
)
_QUICK_FEW = (Shape(2048, 2048, 1),)
_QUICK_IMAGES = (_IMAGES[1],)
_FLOAT32, _INT8, _LAYOUT = "torch dense", "torch dense float32", "torch's faster layout"
_FILTERS = "channels-filters, kernel, image"
SUITES: dict[str, Suite] = {
    "csr": Suite(
        "CSR Linear, float32",
        _FLOAT32,
        **_linear(ops.CSR.from_dense),
        limit=_panel_limit(1),
        cases=SHAPES,
        quick=SHAPES[:2],
    ),
    "blocks": Suite(
        "Blocks of 4x1, float32 Linear",
        _FLOAT32,
        **_linear(partial(ops.BSR.from_dense, block=(4, 1)), (4, 1)),
        limit=_panel_limit(4),
        cases=SHAPES,
        quick=SHAPES[:1],
    ),
    "dense": Suite(
        "Dense Linear, float32, packed once",
        _FLOAT32,
        **_linear(ops.Dense.from_dense),
        limit=_panel_limit(4),
        cases=SHAPES,
        quick=SHAPES[:1],
        sparsities=(0.0,),
    ),
    "bitmap": Suite(
        "Few tokens: bitmap, float32",
        _FLOAT32,
        **_linear(ops.Bitmap.from_dense),
        limit=_expand_limit(4),
        cases=_FEW,
        quick=_QUICK_FEW,
        sparsities=(0.5, 0.8, 0.9),
    ),
    "int8": Suite(
        "Int8 Linear, activations quantized on the way",
        _INT8,
        **_linear(ops.Int8.from_dense, int8=True),
        limit=_bytes_limit,
        cases=(*SHAPES, *_FEW),
        quick=(SHAPES[0], *_QUICK_FEW),
        sparsities=(0.0,),
        dtype="int8",
    ),
    "blocks-int8": Suite(
        "Blocks of 4x4, int8 Linear",
        _INT8,
        **_linear(partial(ops.BSRInt8.from_dense, block=(4, 4)), (4, 4), int8=True),
        limit=_bytes_limit,
        cases=SHAPES,
        quick=SHAPES[:1],
        sparsities=(0.5, 0.8, 0.9),
        dtype="int8",
    ),
    "bitmap-int8": Suite(
        "Few tokens: bitmap, int8",
        _INT8,
        **_linear(ops.Bitmap8.from_dense, int8=True),
        limit=_expand_limit(1),
        cases=_FEW,
        quick=_QUICK_FEW,
        sparsities=(0.5, 0.8, 0.9),
        dtype="int8",
    ),
    "int4": Suite(
        "Few tokens: int4, a scale for 64 inputs",
        _INT8,
        **_linear(partial(ops.Int4.from_dense, group=64), int8=True),
        limit=_four_limit,
        cases=_FEW,
        quick=_QUICK_FEW,
        sparsities=(0.0,),
        dtype="int4",
    ),
    "int8-torch": Suite(
        "Int8 Linear against torch's int8",
        "torch dynamically quantized",
        _int8_torch,
        None,
        limit=_bytes_limit,
        cases=SHAPES,
        quick=SHAPES[:1],
        sparsities=(0.0,),
        dtype="int8",
    ),
    "conv": Suite(
        "CSR Conv2d, float32",
        _LAYOUT,
        **_conv(ops.CSR.from_dense),
        limit=_conv_limit,
        cases=_IMAGES,
        quick=_QUICK_IMAGES,
        sparsities=(0.8, 0.9),
        case=_FILTERS,
    ),
    "conv-int8": Suite(
        "Int8 Conv2d, images quantized on the way",
        f"{_LAYOUT}, float32",
        **_conv(ops.Int8.from_dense, int8=True),
        limit=_conv_int8_limit,
        cases=_IMAGES,
        quick=_QUICK_IMAGES,
        sparsities=(0.0,),
        case=_FILTERS,
        dtype="int8",
    ),
    "conv-blocks-int8": Suite(
        "Blocks of 4x4, int8 Conv2d",
        f"{_LAYOUT}, float32",
        **_conv(partial(ops.BSRInt8.from_dense, block=(4, 4)), (4, 4), int8=True),
        limit=_conv_int8_limit,
        cases=_IMAGES,
        quick=_QUICK_IMAGES,
        sparsities=(0.5, 0.8, 0.9),
        case=_FILTERS,
        dtype="int8",
    ),
    "select": Suite(
        "Threshold selection, float32",
        "torch.kthvalue",
        _selection,
        _selection_peers,
        limit=_read_limit,
        cases=(Keys(20_000_000),),
        quick=(Keys(2_000_000),),
        sparsities=(0.9,),
        case="keys",
    ),
}


def measure(
    suite: str,
    case: Case,
    sparsities: Sequence[float],
    seconds: float,
    min_rounds: int = 15,
    cold: bool = False,
    peers: bool = False,
) -> list[Row]:
    """Time one case: the baseline, every sparsity and, if asked for, every other engine take turns; `seconds`
    are for all of them together."""
    s = SUITES[suite]
    threads = torch.get_num_threads()
    with torch.inference_mode():
        calls, sizes = s.make(case, sparsities, cold)
        others: dict[str, Call] = {}
        if peers and s.peers is not None:
            others = s.peers(case, sparsities, cold, threads)
        t = interleave(calls | others, budget=seconds, min_rounds=min_rounds)
    one, machine = ceilings(1), ceilings(threads)

    def beside(i: str) -> dict[str, Peer] | None:
        found = {
            name.partition("@")[0]: Peer(t.median(name), t.speedup(i, name))
            for name in others
            if name.partition("@")[2] in ("", i)
        }
        return found if peers else None

    return [
        Row(
            suite,
            case,
            zeros,
            t.median("dense"),
            t.median(str(i)),
            t.speedup(str(i), "dense"),
            size.nonzeros,
            cold,
            threads,
            s.limit(one, machine, case, size, cold),
            beside(str(i)),
        )
        for i, (zeros, size) in enumerate(zip(sparsities, sizes, strict=True))
    ]


def to_json(row: Row) -> dict[str, Any]:
    """Everything as plain numbers: seconds, shares of one, GFLOP/s. What the files of ``make bench`` have too
    has its name and meaning there, so that one script plots and compares both."""
    suite, case = SUITES[row.suite], row.case
    best, _ = row.best
    over = {suite.baseline: row.ratio, **{name: p.ratio for name, p in (row.peers or {}).items()}}
    shape = {"out": case.out, "in": case.inp, "tokens": case.tokens} if isinstance(case, Shape) else {}
    return {
        "suite": row.suite,
        "title": suite.title,
        "case": str(case),
        "cell": f"{100 * row.sparsity:g} %",
        "baseline": suite.baseline,
        "best_rival": best,
        "speedup": {name: asdict(ratio) for name, ratio in over.items()},
        "threads": row.threads,
        "isa": _core.isa(),
        "cpu": _core.cpu_brand(),
        "cold": row.cold,
        "dtype": suite.dtype,
        "sparsity": row.sparsity,
        "nnz": row.nonzeros,
        **(shape or case._asdict()),
        "seconds": row.sparse_s,
        "baseline_s": row.dense_s,
        "peers_s": {name: p.seconds for name, p in (row.peers or {}).items()},
        "limit_s": row.limit_s,
        "limit_share": row.limit_share,
        "gflops": row.sparse_gflops if case.flops else None,
        "gbytes_s": None,
        "baseline_gflops": row.dense_gflops if case.flops else None,
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
    t.add_column("% of\nlimit", justify="right")
    t.add_column("ratio", justify="right")
    t.add_column("95 %\ninterval", justify="right")
    for r, case in _grouped(t, rows):
        t.add_row(
            case,
            f"{100 * r.sparsity:g} %",
            f"{r.dense_s * 1e3:.3f}",
            *([f"{r.dense_gflops:.0f}"] if rates else []),
            f"{r.sparse_s * 1e3:.3f}",
            *([f"{r.sparse_gflops:.0f}"] if rates else []),
            f"{100 * r.limit_share:.0f}",
            _colored(r.ratio),
            f"{r.ratio.low:.2f}-{r.ratio.high:.2f}",
        )
    return t


def peers_table(rows: Sequence[Row]) -> Table:
    """The rows of one suite beside the other engines, each in times the baseline's speed."""
    suite = SUITES[rows[0].suite]
    engines = list(dict.fromkeys(name for r in rows for name in r.peers or ()))
    threads = rows[0].threads
    count = f"{threads} thread{'s' if threads > 1 else ''}"
    t = Table(title=f"{suite.title}: times {suite.baseline}, {count}", box=box.SIMPLE_HEAVY, padding=(0, 1))
    t.add_column(suite.case, min_width=20)
    t.add_column("zeros", justify="right")
    t.add_column(f"{suite.baseline}\nms", justify="right", max_width=12)
    for name in engines:
        t.add_column(name.replace(" ", "\n"), justify="right")
    t.add_column("pared", justify="right")
    t.add_column("% of\nlimit", justify="right")
    t.add_column("over the\nbest other", justify="right")
    t.add_column("95 %\ninterval", justify="right")
    for r, case in _grouped(t, rows):
        peers = r.peers or {}
        _, best = r.best
        t.add_row(
            case,
            f"{100 * r.sparsity:g} %",
            f"{r.dense_s * 1e3:.3f}",
            *(f"{r.dense_s / peers[name].seconds:.2f}" if name in peers else "" for name in engines),
            f"{r.dense_s / r.sparse_s:.2f}",
            f"{100 * r.limit_share:.0f}",
            _colored(best),
            f"{best.low:.2f}-{best.high:.2f}",
        )
    return t


def _grouped(table: Table, rows: Sequence[Row]) -> Iterator[tuple[Row, str]]:
    """Each row, and its case where it is the first of it; a line between cases."""
    previous = None
    for r in rows:
        case = f"{r.case}{', from memory' if r.cold else ''}"
        if previous is not None and case != previous:
            table.add_section()
        yield r, "" if case == previous else case
        previous = case


def _colored(ratio: Ratio) -> str:
    color = "green" if ratio.low > 1 else "red" if ratio.high < 1 else "yellow"
    return f"[bold {color}]{ratio.value:.2f}x[/]"
